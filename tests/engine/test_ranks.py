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
from checkpoints import Sizes, arrays, config, layout_name, write, write_weights
from mcp_clients import VERSION
from PIL import Image

from mlx_onevision.api import load
from mlx_onevision.bench import checkpoint as published
from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.adapters import Adapter, LowRank
from mlx_onevision.checkpoint.load import open_checkpoint
from mlx_onevision.checkpoint.plan import LazyTensorFiles, make_plan
from mlx_onevision.checkpoint.recipes import Recipe, uniform
from mlx_onevision.checkpoint.sharing import (
    check_ranks,
    make_stage,
    plan_of_stage,
    share,
    share_adapter,
)
from mlx_onevision.checkpoint.tensors import EMBEDDING, Tensor, canonical_name, read_header
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.distributed import group, launched, rank
from mlx_onevision.engine import engine
from mlx_onevision.engine.memory import working_set
from mlx_onevision.engine.ranks import compare
from mlx_onevision.errors import RequestError
from mlx_onevision.network.stages import Split, Stage

WHOLE = (  # that an adapter puts in the place of the model's
    "lm_head.weight",
    "language_model.embed_tokens.weight",
    "language_model.layers.1.self_attn.k_proj.bias",
    "multi_modal_projector.linear_1.weight",
)
TURNS = ("user", "assistant", "user")
SIZES = Sizes(hidden=128, intermediate=512, layers=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), sizes=SIZES, tied=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of PEFT: DoRA of all matrices in the language model's layers, and whole tensors."""
    folder, rng = tmp_path_factory.mktemp("adapter"), np.random.default_rng(5)
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays(sizes=SIZES, tied=False).items():
        module, leaf = f"base_model.model.{layout_name(name, 'hub')}".rsplit(".", 1)
        if name.startswith("language_model.layers.") and name.endswith("_proj.weight"):
            outputs, inputs = array.shape
            tensors[f"{module}.lora_A.weight"] = 0.2 * rng.standard_normal((2, inputs))
            tensors[f"{module}.lora_B.weight"] = 0.2 * rng.standard_normal((outputs, 2))
            tensors[f"{module}.lora_magnitude_vector"] = 1.1 * np.linalg.norm(array, axis=1)
        elif name in WHOLE:
            tensors[f"{module}.{leaf}"] = 1.1 * array + 0.01
    write_weights(folder, {name: t.astype(np.float32) for name, t in tensors.items()})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True})
    )
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def made(
    folder: Path, adapter: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], list[Any]]:
    """What each of two ranks found and made, and how it ended."""
    target = tmp_path_factory.mktemp("ranks")
    command = [ranks.__file__, str(target), str(folder), str(adapter), str(other)]
    with ranks.running(command, command, folder=target) as started:
        ended = ranks.ended(started, sent="hello\nhello\n/quit\n")
    assert all((target / f"{number}.json").is_file() for number in range(2)), ended
    return [json.loads((target / f"{number}.json").read_text()) for number in range(2)], ended


@pytest.mark.parametrize("bits", [None, 4])
def test_two_ranks_answer_as_one_process_and_hold_a_share_each(
    folder: Path, made: tuple[list[Any], Any], bits: int | None
) -> None:
    (leading, answers, _), (following, nothing, _) = made[0]
    assert nothing == {}
    alone = ranks.answers(folder, bits)
    for way in ranks.SPLITS:
        found = answers[f"{way} {bits}"]
        for prompt in ranks.PROMPTS:
            got, wanted = np.array(found[prompt]["logits"]), np.array(alone[prompt]["logits"])
            assert np.abs(got - wanted).max() <= 5e-5, (way, prompt)
            assert found[prompt]["tokens"] == list(alone[prompt]["tokens"]), (way, prompt)
            assert found[prompt]["tokens"], prompt
        for space in ("vision", "joint"):
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
    last, first = leading[f"stages {bits}"], following[f"stages {bits}"]  # of layers: 1 and 2 of 3
    assert [last["position"] * 3, first["position"] * 3] == [whole["position"] * n for n in (1, 2)]
    norm = SIZES.hidden * 4  # which both have, to know the type
    assert last["language"] + first["language"] == whole["language"] + norm
    assert (last["others"], first["others"]) == (0, whole["others"])
    assert last["language"] < 0.4 * whole["language"]


def test_ranks_with_an_adapter_answer_as_one_process(
    folder: Path, adapter: Path, made: tuple[list[Any], Any]
) -> None:
    (leading, answers, _), (following, _, _) = made[0]
    alone = ranks.answers(folder, None, adapter=adapter)
    for way in ranks.SPLITS:
        found, plain = answers[f"{way} adapter"], answers[f"{way} None"]
        for prompt in ("text", "image"):
            got, wanted = np.array(found[prompt]["logits"]), np.array(alone[prompt]["logits"])
            assert np.abs(got - wanted).max() <= 5e-5, (way, prompt)
            assert np.abs(got - plain[prompt]["logits"]).max() > 0.1, (way, prompt)
            assert found[prompt]["tokens"] == list(alone[prompt]["tokens"]), (way, prompt)
    both = [sizes["tensor adapter"]["language"] for sizes in (leading, following)]
    model = load(folder, adapter=adapter)
    whole = model._engine._worker.call(lambda runner: ranks.sizes(runner, 0))
    assert both[0] == both[1] <= 0.56 * whole["language"]


@pytest.mark.parametrize("transposed", [True, False])
def test_a_rank_reads_its_part_of_an_adapter(tmp_path: Path, transposed: bool) -> None:
    """Of o_proj of the inputs, of q_proj and the embedding of the outputs, of the head all."""
    rng = np.random.default_rng(0)
    layer = "language_model.layers.0.self_attn"
    inputs = {f"{layer}.o_proj": 8, f"{layer}.q_proj": 6, EMBEDDING: 384, "lm_head": 6}
    divided = {f"{layer}.o_proj": "a", f"{layer}.q_proj": "b", EMBEDDING: "b", "lm_head": ""}
    values = {f"{n}.a": rng.standard_normal((rows, 2)) for n, rows in inputs.items()}
    values |= {f"{n}.b": rng.standard_normal((2, 4)) for n in inputs}
    if transposed:
        values = {name: array.T for name, array in values.items()}
    write_weights(tmp_path, {n: np.ascontiguousarray(v, np.float32) for n, v in values.items()})
    header = read_header(tmp_path / "model.safetensors")
    terms = {n: LowRank(header[f"{n}.a"], header[f"{n}.b"], None, 1.0, transposed) for n in inputs}
    whole = Adapter(tmp_path, terms, {}, ties=False)
    parts = [share_adapter(whole, False, rank, 2).low_rank for rank in range(2)]
    for name in inputs:
        assert [part[name].summed for part in parts] == [divided[name] == "a"] * 2
        for factor in "ab":
            tensors = [getattr(part[name], factor) for part in parts]
            read = [np.array(LazyTensorFiles().take(tensor)) for tensor in tensors]
            read = [array if transposed else array.T for array in read]
            wanted = values[f"{name}.{factor}"] if transposed else values[f"{name}.{factor}"].T
            if factor == divided[name]:
                joined = np.concatenate(read, axis=1 if factor == "a" else 0)
                assert np.array_equal(joined, wanted.astype(np.float32)), name
            else:
                assert all(np.array_equal(one, wanted.astype(np.float32)) for one in read), name


@pytest.mark.parametrize("bits", [None, 4])
def test_what_a_token_costs_on_the_wire(made: tuple[list[Any], Any], bits: int | None) -> None:
    """As docs/several-macs.md has it. Of two ranks, each sends as many bytes as a sum has."""
    (_, answers, _), _ = made[0]
    assert len(answers[f"tensor {bits}"]["text"]["tokens"]) == ranks.TOKENS  # none has ended early
    values = 4 * SIZES.hidden  # bytes of a token's
    in_layers, embedding = 2 * SIZES.layers * values, values // 2
    # And the chosen token, and a few bytes whenever ranks ask for events.
    assert 0 < answers[f"tensor {bits}"]["sent"] - in_layers - embedding <= 64
    assert 0 < answers[f"stages {bits}"]["sent"] <= 64


def test_stages_prefill_at_once(made: tuple[list[Any], Any]) -> None:
    """The first begins a chunk while the last computes the one before."""
    last, first = (spans["stages None"] for *_, spans in made[0])
    ended = [end for _, end in last[-4:]]  # of the four chunks before the last one
    begun = [began for began, _ in first[-8::2]]  # of two layers
    assert len(ended) == len(begun) == 4
    assert any(one < other for one, other in zip(begun[1:], ended, strict=False))
    assert all(one < other for one, other in zip(begun, ended, strict=True))


def test_stages_go_on_after_requests_that_were_cancelled_in_prefill(
    folder: Path, made: tuple[list[Any], Any]
) -> None:
    (_, answers, _), _ = made[0]
    wanted = load(folder).generate("hello", max_tokens=4, temperature=0).text
    assert answers["stages None"]["cancelled"] == [wanted] * 3


def test_rank_0_prints_the_answer_and_the_other_nothing(
    folder: Path, made: tuple[list[Any], Any]
) -> None:
    (_, out, report), (_, nothing, other_report) = made[1]
    model = load(folder)
    answer = model.generate("hello", max_tokens=4).text
    assert out.split("---\n")[0] == f"{answer}\n"
    assert re.search(r"^sent     \d+\.\d{3} MB to other ranks$", report, re.MULTILINE)
    assert nothing == "---\n---\n" and other_report.startswith(nothing)
    # The second answer of chat knows of the first.
    texts = ("hello", answer, "hello")
    turns = [{"role": r, "content": text} for r, text in zip(TURNS, texts, strict=True)]
    second = model.generate(messages=turns, max_tokens=4).text
    assert out.split("---\n")[1] == f"{answer}\n{second}\n"


def test_a_rank_with_another_checkpoint_is_refused_on_every_rank(
    folder: Path, other: Path, made: tuple[list[Any], Any]
) -> None:
    shown = [f"{path.name} ({hub.identify(path)[1][:12]})" for path in (other, folder)]
    for number, (code, out, report) in enumerate(made[1]):
        assert (code, out.split("---\n")[2]) == (1, "")
        assert report.split("---\n")[2] == (
            f"error: rank {number}: rank 1 has the checkpoint {shown[0]}, and rank 0 has "
            f"{shown[1]}; give every rank the same\n"
        )


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
        own = plan_of_stage(plan, Stage(group, (1, 2)))
        read.append({tensor.name for one in own.transforms for tensor in one.sources})
    assert read[0] | read[1] == set(opened.tensors)
    both = {"language_model.norm.weight"}
    assert read[0] & read[1] == both | ({"language_model.embed_tokens.weight"} if tied else set())
    assert {name.split(".")[2] for name in read[0] if ".layers." in name} == {"2"}


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


def test_mcp_among_ranks_answers_as_one_process_and_ends_with_its_host(
    folder: Path, tmp_path: Path
) -> None:
    Image.fromarray(ranks.IMAGES[0]).save(tmp_path / "a.png")
    command = ["-m", "mlx_onevision", "mcp", "--model", str(folder), "--allow-dir", str(tmp_path)]
    client = {"name": "test", "version": "1"}
    hello = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
    asked = {"path": str(tmp_path / "a.png"), "question": "hello", "max_tokens": 4}
    with ranks.running(command, command, folder=tmp_path) as started:

        def send(method: str, params: Any, number: int | None = None) -> None:
            pipe, line = started[0].stdin, {"jsonrpc": "2.0", "method": method, "params": params}
            assert pipe is not None
            pipe.write(json.dumps(line | ({} if number is None else {"id": number})) + "\n")
            pipe.flush()

        def received() -> Any:
            assert started[0].stdout is not None
            return json.loads(started[0].stdout.readline())["result"]

        send("initialize", hello, 1)
        assert received()["serverInfo"]["name"] == "mlx-onevision"
        send("notifications/initialized", {})
        send("tools/call", {"name": "ask_image", "arguments": asked}, 2)
        answer = received()["structuredContent"]
        assert [(code, out) for code, out, _ in ranks.ended(started)] == [(0, "")] * 2
    model = load(folder)
    wanted = model.generate("hello", images=[tmp_path / "a.png"], max_tokens=4, temperature=0)
    assert answer["answer"] == wanted.text


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
