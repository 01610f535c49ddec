"""The measured loss: nothing against itself, the right number where it is known, more with fewer
bits.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import quantize
from checkpoints import arrays, dump, write

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import Recipe, vision_spec
from mlx_onevision.convert.conversion import convert
from mlx_onevision.convert.loss import probes
from mlx_onevision.convert.loss.measure import measure
from mlx_onevision.convert.loss.metrics import Loss, diverge
from mlx_onevision.convert.loss.probes import Probe
from mlx_onevision.convert.loss.recording import count_values
from mlx_onevision.convert.report import comparison, table
from mlx_onevision.errors import CheckpointError, RequestError

PARTS = ("language_model", "multi_modal_projector", "vision_tower")


def asked(name: str, question: str, **media: Any) -> Probe:
    """A small probe of one medium."""
    content = [{"type": kind, kind: value} for kind, value in media.items()]
    content.append({"type": "text", "text": question})
    return Probe(name, ({"role": "user", "content": content},))


FEW = [
    asked("shapes", "What is in the image?", image=probes.shapes(100, 140)),
    asked("number", "How many shapes are there?", image=probes.shapes(56, 110)),
    asked("video", "What is in the video?", video=list(probes.moving_disc(3, 60, 80))),
    Probe("captions", text="A red circle and a blue square. There are two shapes."),
]


def packed(target: Path, language: int, vision: int) -> Path:
    """The demo model in so many bits, groups of 64."""
    loaded: Any = mx.load(str(EMBEDDED / "model.safetensors"))
    ways: dict[str, Any] = {}
    for name, value in loaded.items():
        if value.ndim == 2 and name.endswith(".weight"):
            bits = language if name.startswith("language_model") else vision
            ways[name.removesuffix(".weight")] = {"bits": bits, "group_size": 64, "mode": "affine"}
    return quantize(EMBEDDED, target, group_size=64, parts=PARTS, modules=ways)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Loss]:
    folder = tmp_path_factory.mktemp("packed")
    ways = ((8, 8), (4, 8), (4, 4), (2, 8))
    return {way: measure(EMBEDDED, packed(folder / f"{way}", *way), probe_set=FEW) for way in ways}


def test_a_folder_has_lost_nothing_against_itself() -> None:
    """In the demo model's own half precision; exactly, not nearly."""
    loss = measure(EMBEDDED, EMBEDDED, probe_set=FEW, dtype=None)
    assert (loss.all.kl_mean, loss.all.kl_p99, loss.all.kl_max) == (0, 0, 0)
    assert loss.all.top1_agreement == 1
    assert (loss.tower_cosine_mean, loss.tower_cosine_min) == (1, 1)
    assert loss.perplexity_ratio == 1
    assert {layer.error for layer in loss.layers} == {0}
    assert loss.dtype == "bfloat16" and loss.bits_per_weight == 16


def test_what_fewer_visual_tokens_cost() -> None:
    """Nothing where an image has one tile; more, the fewer there are; the tower is as it was."""
    found = [measure(EMBEDDED, EMBEDDED, probe_set=FEW, visual_tokens=n) for n in (1, 0.5, 0.1)]
    for name in ("shapes", "number", "video"):
        kl = [probe.kl_mean for loss in found for probe in loss.probes if probe.name == name]
        assert kl[0] == 0 < kl[1] <= kl[2]
    for loss in found:
        assert loss.tower_cosine_min == loss.perplexity_ratio == 1
    assert {layer.part for layer in found[0].layers} == {"tower", "projector", "language"}
    assert {layer.part for layer in found[1].layers} == {"tower", "projector"}


def uniform_but_for_one(weights: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """A network whose state at every word is all ones, and whose head finds the first token
    ``factor`` times as likely as any other.
    """
    weights = dict(weights)
    for name, value in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) or name == "lm_head.weight":
            weights[name] = np.zeros_like(value)
        elif name in ("language_model.embed_tokens.weight", "language_model.norm.weight"):
            weights[name] = np.ones_like(value)
    weights["lm_head.weight"][0] = math.log(factor) / weights["lm_head.weight"].shape[1]
    return weights


@pytest.mark.parametrize(("one", "other"), [(383.0, 1.0), (1.0, 383.0), (383.0, 40.0)])
def test_a_divergence_that_is_known(tmp_path: Path, one: float, other: float) -> None:
    weights = arrays(tied=False)
    folders = [
        write(tmp_path / name, tied=False, weights=uniform_but_for_one(weights, factor))
        for name, factor in (("one", one), ("other", other))
    ]
    loss = measure(*folders, probe_set=FEW)
    first, second = one / (one + 383), other / (other + 383)  # 384 tokens
    expected = first * math.log(first / second)
    expected += (1 - first) * math.log((1 - first) / (1 - second))
    for probe in loss.probes:
        assert probe.kl_mean == pytest.approx(expected, rel=1e-5)
        assert probe.kl_max == pytest.approx(expected, rel=1e-5)
    # No text among them holds the first token, so each token is one of the other 383.
    assert loss.source_perplexity == pytest.approx(383 / (1 - first), rel=1e-5)
    assert loss.result_perplexity == pytest.approx(383 / (1 - second), rel=1e-5)


def test_divergence_in_numbers() -> None:
    rng = np.random.default_rng(0)
    source, result = rng.normal(0, 4, (2, 50, 300)).astype(np.float32)
    following = rng.integers(0, 300, 50)
    found = diverge(source, result, following)
    p = np.exp(source.astype(np.longdouble))
    q = np.exp(result.astype(np.longdouble))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert np.allclose(found.kl, (p * np.log(p / q)).sum(-1), rtol=1e-12)
    assert np.allclose(found.source_loss, -np.log(p[np.arange(50), following]), rtol=1e-12)
    assert (found.same == (p.argmax(-1) == q.argmax(-1))).all()
    # Shifted logits are the same distribution; enormous ones do not overflow.
    assert diverge(source, source + np.float32(1024), following).kl.max() < 1e-6
    assert np.isfinite(diverge(source * 1e4, result * 1e4, following).kl).all()


def test_fewer_bits_lose_more(losses: dict[tuple[int, int], Loss]) -> None:
    kl = {way: loss.all.kl_mean for way, loss in losses.items()}
    assert 0 < kl[8, 8] < kl[4, 8] < kl[2, 8]
    for lighter, heavier in (((8, 8), (4, 8)), ((4, 8), (2, 8))):
        one, other = losses[lighter], losses[heavier]
        assert one.all.top1_agreement > other.all.top1_agreement
        assert one.bits_per_weight > other.bits_per_weight
        assert one.weights_bytes > other.weights_bytes
        last = [loss.layers[-1].error for loss in (one, other)]
        assert last[0] < last[1]
    # The tower is the same, so what it sees is.
    assert losses[4, 8].tower_cosine_min == losses[2, 8].tower_cosine_min


def test_the_aims(losses: dict[tuple[int, int], Loss], tmp_path: Path) -> None:
    """8 bits, on what the demo model was trained for; and 8 bits for the tower against 4. The
    default recipe against plain 4 needs more positions than these to be told apart (see README).
    """
    conversations = losses[8, 8].conversations
    assert conversations is not None
    assert conversations.kl_mean <= 1e-3
    assert conversations.top1_agreement >= 0.99
    alone = []
    for bits in (8, 4):
        recipe = Recipe(f"vision-{bits}", None, vision_spec(bits))
        folder = convert(EMBEDDED, tmp_path / f"{bits}", recipe=recipe).target
        alone.append(measure(EMBEDDED, folder, probe_set=FEW).all.kl_mean)
    assert alone[0] < alone[1] / 10
    assert losses[4, 8].layers[4].part == "projector"
    assert losses[4, 8].layers[4].error < losses[4, 4].layers[4].error / 8


def test_where_an_error_begins(tmp_path: Path) -> None:
    """Layers below a damaged one have lost nothing, and the damaged one has."""
    weights = arrays()
    source = write(tmp_path / "source", weights=weights)
    weights["language_model.layers.1.mlp.down_proj.weight"] *= 1.1
    result = write(tmp_path / "result", weights=weights)
    loss = measure(source, result, probe_set=FEW)
    errors = {(layer.part, layer.number): layer.error for layer in loss.layers}
    assert errors.pop(("language", 1)) > 1e-3
    assert set(errors.values()) == {0} and len(errors) == 4
    assert loss.tower_cosine_min == 1 and loss.all.kl_mean > 0


def test_the_error_of_a_layer_is_relative(tmp_path: Path) -> None:
    """A projector whose output is 1.25 times as large is off by a quarter."""
    weights = arrays()
    source = write(tmp_path / "source", weights=weights)
    for part in ("weight", "bias"):
        weights[f"multi_modal_projector.linear_2.{part}"] *= 1.25
    loss = measure(source, write(tmp_path / "result", weights=weights), probe_set=FEW)
    (error,) = (layer.error for layer in loss.layers if layer.part == "projector")
    assert error == pytest.approx(0.25, rel=1e-5)


def test_sizes(tmp_path: Path, losses: dict[tuple[int, int], Loss]) -> None:
    source = write(tmp_path / "source", "mlx-vlm", dtype="float16")
    values = sum(value.size for value in arrays().values()) - 2 * 64  # post_layernorm is left out
    assert count_values(load_checkpoint(source).model) == values
    result = quantize(source, tmp_path / "packed", bits=4, group_size=32)
    assert count_values(load_checkpoint(result).model) == values
    loss = measure(source, result, probe_set=FEW[:1])
    assert loss.source_weights_bytes == 2 * values
    language = sum(
        v.size for n, v in arrays().items() if n.startswith("language_model") and v.ndim == 2
    )
    # A group of 32 has 4 bits a value and 2 * 16 beside: 5 bits.
    assert loss.weights_bytes == 2 * (values - language) + language * 5 // 8
    assert loss.bits_per_weight == pytest.approx(8 * loss.weights_bytes / values)
    assert loss.disk_bytes == sum(path.stat().st_size for path in result.iterdir())
    assert loss.memory.weights == loss.weights_bytes < loss.memory.total


def test_two_networks_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"is not a conversion of .* their vocabularies are 384"):
        measure(EMBEDDED, write(tmp_path), probe_set=FEW)


def test_a_folder_that_makes_other_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(EMBEDDED, folder)
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    dump(folder / "chat_template.json", {"chat_template": template.replace("user", "reader") + "!"})
    with pytest.raises(CheckpointError, match=r"makes another prompt .* 'shapes'"):
        measure(EMBEDDED, folder, probe_set=FEW)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    weights = arrays()
    source = write(tmp_path / "source", weights=weights)
    weights["language_model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    result = write(tmp_path / "result", weights=weights)
    with pytest.raises(CheckpointError, match=r"result computes values that are no finite numbers"):
        measure(source, result, probe_set=FEW)


@pytest.mark.parametrize("after", [0, 3, 11])
def test_it_can_be_ended(tmp_path: Path, after: int) -> None:
    folder = write(tmp_path)
    calls: list[object] = []

    def progress(*now: int) -> None:
        calls.append(now)
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(folder, folder, probe_set=FEW, progress=progress)
    assert len(calls) == after + 1


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    folder = write(tmp_path)
    seen: list[tuple[int, int]] = []
    measure(folder, folder, probe_set=FEW, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 12) for n in range(1, 13)]


def test_one_model_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the result is loaded, of the source there is its head and no other weight."""
    from mlx_onevision.convert.loss import recording

    folder = write(tmp_path, tied=False)
    alive: list[Any] = []
    real: Callable[..., Any] = recording.load_checkpoint

    def watched(*given: Any, **named: Any) -> Any:
        import gc
        import weakref

        gc.collect()
        assert all(reference() is None for reference in alive)
        checkpoint = real(*given, **named)
        alive.append(weakref.ref(checkpoint.model.language_model))
        return checkpoint

    monkeypatch.setattr(recording, "load_checkpoint", watched)
    measure(folder, folder, probe_set=FEW)
    assert len(alive) == 2


def test_tables(losses: dict[tuple[int, int], Loss]) -> None:
    loss = losses[8, 8]
    shown = table(loss)
    assert f"{loss.all.kl_mean:.2e}" in shown and f"{loss.all.top1_agreement:.2%}" in shown
    assert "projector" in shown and "language 3" in shown and "perplexity" in shown
    assert all(line == line.rstrip() for line in shown.splitlines())
    lines = comparison([(f"{way}", loss) for way, loss in losses.items()]).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    values = json.loads(json.dumps(loss.to_dict(), allow_nan=False))
    assert values["all"]["kl_mean"] == loss.all.kl_mean
    assert values["perplexity_ratio"] == loss.perplexity_ratio
    assert values["memory"]["total_bytes"] == loss.memory.total


def test_without_media_or_texts(tmp_path: Path) -> None:
    folder = write(tmp_path)
    alone = measure(folder, folder, probe_set=[Probe("text", text="Where is the star?")])
    assert alone.conversations is None and alone.tower_cosine_min is None
    asked = measure(folder, folder, probe_set=FEW[:1])
    assert asked.texts is None and asked.perplexity_ratio is None
    json.dumps(asked.to_dict(), allow_nan=False)
    assert "perplexity" not in table(asked) and "cosine" not in table(alone)


def test_probes_are_the_same_everywhere() -> None:
    """Recorded: a picture that changes makes figures that compare with no older ones."""
    pictures = (
        probes.gradient(9, 16),
        probes.shapes(30, 40),
        probes.strokes(60, 50),
        probes.noise(8, 8),
        probes.landscape(24, 32),
        probes.moving_disc(3, 20, 30),
    )
    marks = [hashlib.blake2b(picture.tobytes(), digest_size=4).hexdigest() for picture in pictures]
    assert marks == ["38fe2770", "7f90186f", "faccd555", "dcdcfef8", "afdfef56", "c7d62887"]
