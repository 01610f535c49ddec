"""Two processes that share a model answer as one does, and each holds its share of the weights."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ranks
from checkpoints import Sizes, config, write

from mlx_onevision.api import load
from mlx_onevision.bench import checkpoint as published
from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.load import open_checkpoint
from mlx_onevision.checkpoint.plan import make_plan
from mlx_onevision.checkpoint.recipes import Recipe, uniform
from mlx_onevision.checkpoint.sharing import check_ranks, make_stage, plan_of_stage, share
from mlx_onevision.checkpoint.tensors import Tensor, canonical_name
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.distributed import group, launched, rank
from mlx_onevision.engine import engine
from mlx_onevision.engine.memory import working_set
from mlx_onevision.engine.ranks import compare
from mlx_onevision.errors import RequestError
from mlx_onevision.network.stages import Split, Stage

SIZES = Sizes(hidden=128, intermediate=512, layers=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), sizes=SIZES, tied=False)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """What each of two ranks found and made, and how it ended."""
    target = tmp_path_factory.mktemp("ranks")
    command = [ranks.__file__, str(target), str(folder)]
    with ranks.running(command, command, folder=target) as started:
        ended = ranks.ended(started)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [json.loads((target / f"{number}.json").read_text()) for number in range(2)], ended


@pytest.mark.parametrize("bits", [None, 4])
def test_two_ranks_answer_as_one_process_and_hold_a_share_each(
    folder: Path, made: tuple[list[Any], Any], bits: int | None
) -> None:
    (leading, answers), (following, nothing) = made[0]
    assert nothing == {}
    alone = ranks.answers(folder, bits)
    for way in ranks.SPLITS:
        found = answers[f"{way} {bits}"]
        for prompt in ranks.PROMPTS:
            got, wanted = np.array(found[prompt]["logits"]), np.array(alone[prompt]["logits"])
            assert np.abs(got - wanted).max() <= 5e-5, (way, prompt)
            assert found[prompt]["tokens"] == list(alone[prompt]["tokens"]), (way, prompt)
            assert found[prompt]["tokens"], prompt
        for space in {"vision", "joint"} & found.keys():
            assert np.abs(np.array(found[space]) - alone[space]).max() <= 1e-5, (way, space)
        for sizes in (leading[f"{way} {bits}"], following[f"{way} {bits}"]):
            assert sizes["limit"] == pytest.approx(
                working_set() / 2, rel=1e-6
            )  # float32, agreed on
            assert sizes["active"] <= sizes["planned"] + 10_000  # tables, what is not weights
            assert sizes["language"] + sizes["others"] == sizes["planned"]
    model = load(folder, quantize=bits)
    whole = model._engine._worker.call(lambda runner: ranks.sizes(runner, 0))
    for sizes in (leading[f"tensor {bits}"], following[f"tensor {bits}"]):
        assert sizes["planned"] <= 0.55 * whole["language"] + whole["others"]
        assert sizes["position"] * 2 == whole["position"]
    last, first = leading[f"stages {bits}"], following[f"stages {bits}"]  # of layers: 1 and 3 of 4
    assert [last["position"] * 4, first["position"] * 4] == [whole["position"] * n for n in (1, 3)]
    norm = SIZES.hidden * 4  # which both have, to know the type
    assert last["language"] + first["language"] == whole["language"] + norm
    assert (last["others"], first["others"]) == (0, whole["others"])
    assert last["language"] < 0.3 * whole["language"]


@pytest.mark.parametrize("bits", [None, 4])
def test_what_a_token_costs_on_the_wire(made: tuple[list[Any], Any], bits: int | None) -> None:
    """As docs/several-macs.md has it. Of two ranks, each sends as many bytes as a sum has."""
    (_, answers), _ = made[0]
    assert len(answers[f"tensor {bits}"]["text"]["tokens"]) == 12  # none has ended early
    values = 4 * SIZES.hidden  # bytes of a token's
    in_layers, embedding = 2 * SIZES.layers * values, values // 2
    # And the chosen token, and a few bytes whenever ranks ask for events.
    assert 0 < answers[f"tensor {bits}"]["sent"] - in_layers - embedding <= 64
    assert 0 < answers[f"stages {bits}"]["sent"] <= 64


def test_rank_0_prints_the_answer_and_the_other_nothing(made: tuple[list[Any], Any]) -> None:
    (_, out, report), other = made[1]
    assert out.strip()
    assert re.search(r"^sent     \d+\.\d{3} MB to other ranks$", report, re.MULTILINE)
    assert other == (0, "", "")


@pytest.mark.parametrize("recipe", [None, uniform(4)])
@pytest.mark.parametrize(("size", "most"), [("0.5b", 0.64), ("7b", 0.54), ("72b", 0.52)])
def test_the_share_of_a_rank_at_the_published_sizes(
    size: str, most: float, recipe: Recipe | None
) -> None:
    """By arithmetic; the embedding of the 0.5B model is its head, too, and whole on every rank."""
    shape = published.SIZES[size]
    own = (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.intermediate, shape.vocab)
    names = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocab")
    about = config(Sizes(**dict(zip(names, own, strict=True))), tied=shape.tied, dtype="bfloat16")
    whole = OneVisionConfig.from_dict(about)
    tensors: dict[str, Tensor] = {}
    for source, dims in published.tensors(shape):
        if (name := canonical_name(source)) is not None:
            tensors[name] = Tensor(name, source, Path(), "BF16", dims, 0, 2 * prod(dims))

    def language(config: OneVisionConfig, tensors: Mapping[str, Tensor]) -> int:
        outputs = make_plan(config, tensors, {}, recipe=recipe).transforms
        made = [output for transform in outputs for output in transform.outputs]
        return sum(output.nbytes for output in made if output.name.startswith(ranks.LANGUAGE))

    parts = [language(*share(whole, tensors, number, 2)) for number in range(2)]
    assert parts[0] == parts[1] <= most * language(whole, tensors)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "recipe", "working"),
    [(14, 2, None, "1 or 2"), (16, 8, None, "1 or 2 or 4 or 8"), (16, 8, uniform(4), "1 or 2")],
)
def test_a_number_of_ranks_that_does_not_divide_is_refused(
    tmp_path: Path, heads: int, kv_heads: int, recipe: Recipe | None, working: str
) -> None:
    """With quantized matrices, groups of 64 inputs stay together."""
    sizes = Sizes(hidden=8 * heads, heads=heads, kv_heads=kv_heads)
    opened = open_checkpoint(write(tmp_path, sizes=sizes))
    plan = make_plan(opened.config, opened.tensors, opened.quantized, recipe=recipe)
    check_ranks(plan, 2)
    with pytest.raises(RequestError, match=f"among 3 ranks; start mlx.launch with -n {working}$"):
        check_ranks(plan, 3)


@dataclass(frozen=True)
class Numbers:
    """A group that is asked for its numbers only."""

    own: int
    ranks: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


FOUR: Any = Numbers(3, 4)


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_that_divide_the_layers_read_nothing_twice(tmp_path: Path, tied: bool) -> None:
    """But for the norm, which says the type, and an embedding that is the head, too."""
    opened = open_checkpoint(write(tmp_path, sizes=SIZES, tied=tied))
    plan = make_plan(opened.config, opened.tensors, opened.quantized)
    read: list[set[str]] = []
    for number in range(2):
        group: Any = Numbers(number, 2)
        own = plan_of_stage(plan, Stage(group, (1, 3)))
        read.append({tensor.name for one in own.transforms for tensor in one.sources})
    assert read[0] | read[1] == set(opened.tensors)
    both = {"language_model.norm.weight"}
    assert read[0] & read[1] == both | ({"language_model.embed_tokens.weight"} if tied else set())
    assert {name.split(".")[2] for name in read[0] if ".layers." in name} == {"3"}


@pytest.mark.parametrize(
    ("split", "layers", "said"),
    [
        ((30, 50), 4, "--split has 2 shares for 4 ranks; give one above 0 for each"),
        ((1, 1, 1, 0), 4, "give one above 0 for each rank, in the order of the hostfile, or auto"),
        ("auto", 2, "2 layers cannot be divided among 4 ranks; start mlx.launch with fewer"),
    ],
)
def test_layers_that_cannot_be_divided_are_refused(
    tmp_path: Path, split: Split, layers: int, said: str
) -> None:
    opened = open_checkpoint(write(tmp_path, sizes=Sizes(layers=layers)))
    plan = make_plan(opened.config, opened.tensors, opened.quantized)
    with pytest.raises(RequestError, match=said):
        make_stage(plan, FOUR, split, 1)


def test_layers_are_not_divided_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX has no send."""
    opened = open_checkpoint(write(tmp_path))
    plan = make_plan(opened.config, opened.tensors, opened.quantized)
    monkeypatch.setattr("mlx_onevision.checkpoint.sharing.on_cuda", lambda: True)
    with pytest.raises(RequestError, match=r"cannot send .* on CUDA; leave --split out"):
        make_stage(plan, FOUR, "auto", 1)


def test_a_split_needs_ranks(folder: Path) -> None:
    with pytest.raises(RequestError, match="split divides a model that ranks share; add sharded"):
        load(folder, split="auto")


def test_a_process_by_itself_has_no_group() -> None:
    assert not launched() and rank() == 0 and group() is None


def test_a_rank_with_another_checkpoint_is_refused_on_every_rank(
    folder: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other")
    shown = [f"{path.name} ({hub.identify(path)[1][:12]})" for path in (other, folder)]
    commands = [
        ["-m", "mlx_onevision", "generate", "--model", str(path), "--prompt", "hello"]
        for path in (folder, other)
    ]
    with ranks.running(*commands, folder=tmp_path) as started:
        ended = ranks.ended(started)
    for number, (code, out, error) in enumerate(ended):
        assert (code, out) == (1, "")
        assert error == (
            f"error: rank {number}: rank 1 has the checkpoint {shown[0]}, and rank 0 has "
            f"{shown[1]}; give every rank the same\n"
        )


def test_a_rank_with_another_version_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = engine.settings(folder, {"dtype": None})
    assert {"mlx-onevision", "MLX", "the checkpoint", "--dtype"} == ours.keys()
    for name in ours:
        texts = [json.dumps(ours), json.dumps({**ours, name: "another"})]
        monkeypatch.setattr("mlx_onevision.engine.ranks.gather_texts", lambda *_, t=texts: t)
        with pytest.raises(RequestError, match=f"rank 1 has {name} another, and rank 0 has "):
            compare(cast(Any, None), ours)
