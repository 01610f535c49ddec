"""Joined matrices and dequantized steps compute what the checkpoint's own matrices do."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from changed_checkpoints import features, logits, quantize
from checkpoints import Sizes, write
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.network import layers
from mlx_onevision.network.layers import fewest_dense_rows, fuse
from mlx_onevision.network.onevision import OneVision

PARTS = ("language_model", "multi_modal_projector", "vision_tower")
FOUR: dict[str, Any] = {"bits": 4, "group_size": 32}
FP4: dict[str, Any] = {"mode": "mxfp4", **FOUR}
LAYER = "language_model.model.layers.0"


def both(folder: Path, dtype: str | None = None) -> tuple[OneVision, OneVision]:
    apart = load_checkpoint(folder, dtype, fused=False).model
    return load_checkpoint(folder, dtype).model, apart


def nbytes(model: OneVision) -> int:
    return sum(value.nbytes for value in dict[str, Any](tree_flatten(model.parameters())).values())


def require_same(fused: OneVision, apart: OneVision) -> None:
    assert np.abs(logits(fused) - logits(apart)).max() < 1e-5
    assert np.abs(features(fused) - features(apart)).max() < 1e-5


@pytest.mark.parametrize("way", [None, FOUR, FP4], ids=str)
def test_joined_matrices_compute_the_same(tmp_path: Path, way: dict[str, Any] | None) -> None:
    """In the language model and in the tower; no bias, scale or row is lost or swapped."""
    folder = write(tmp_path / "plain", "mlx-vlm")
    if way is not None:
        folder = quantize(folder, tmp_path / "packed", parts=PARTS, **way)
    fused, apart = both(folder)
    layer, tower = fused.language_model.layers[1], fused.vision_tower.encoder.layers[0]
    assert layer.self_attn.keys() == {"qkv_proj", "o_proj"}
    assert layer.mlp.keys() == {"gate_up_proj", "down_proj"}
    assert tower.self_attn.keys() == {"qkv_proj", "out_proj"}
    require_same(fused, apart)
    assert nbytes(fused) == nbytes(apart)


def test_parts_of_other_precision_stay_apart(tmp_path: Path) -> None:
    modules: dict[str, Any] = {
        f"{LAYER}.self_attn.v_proj": {"bits": 8, "group_size": 32},
        f"{LAYER}.mlp.gate_proj": False,
    }
    source = write(tmp_path / "source", "mlx-vlm")
    fused, apart = both(quantize(source, tmp_path / "packed", modules=modules, **FOUR))
    mixed, alike = fused.language_model.layers[:2]
    assert mixed.self_attn.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert mixed.mlp.keys() == {"gate_proj", "up_proj", "down_proj"}
    assert alike.self_attn.keys() == {"qkv_proj", "o_proj"}
    require_same(fused, apart)


def test_what_is_more_than_a_matrix_stays_apart(tmp_path: Path) -> None:
    model = load_checkpoint(write(tmp_path), fused=False).model
    attention: Any = model.language_model.layers[0].self_attn
    attention.q_proj = LoRALinear.from_base(attention.q_proj)
    attention.q_proj.lora_b = mx.ones_like(attention.q_proj.lora_b)
    before = logits(model)
    fuse(model)
    assert attention.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "qkv_proj" in model.language_model.layers[1].self_attn
    assert np.abs(logits(model) - before).max() < 1e-5


@pytest.mark.parametrize("way", [None, FOUR], ids=str)
def test_fusing_holds_no_matrix_twice(tmp_path: Path, way: dict[str, Any] | None) -> None:
    """Neither mapped weights nor what a recipe has read: the parts go as the joined ones come."""
    sizes = Sizes(layers=12, hidden=256, intermediate=1024, vocab=64)
    folder = write(tmp_path / "plain", "mlx-vlm", sizes=sizes)
    if way is not None:
        folder = quantize(folder, tmp_path / "packed", parts=PARTS, **way)
    before = mx.get_active_memory()
    model = load_checkpoint(folder).model
    mx.reset_peak_memory()
    mx.eval(model.parameters())
    assert mx.get_peak_memory() - before < 1.4 * nbytes(model)


@pytest.fixture
def dense_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the steps that were dequantized: all that may be, whatever would be measured."""
    rows: list[int] = []
    dense = layers._dense_product

    def counted(layer: Any, x: mx.array) -> mx.array:
        rows.append(x.shape[1])
        return dense(layer, x)

    monkeypatch.setattr(layers, "fewest_dense_rows", lambda *_: 0)
    monkeypatch.setattr(layers, "_dense_product", counted)
    return rows


@pytest.mark.parametrize("way", [FOUR, FP4, {"bits": 8, "group_size": 32}], ids=str)
def test_long_steps_are_dequantized(
    tmp_path: Path, way: dict[str, Any], dense_rows: list[int]
) -> None:
    sizes = Sizes(hidden=256, intermediate=320)
    source = write(tmp_path / "source", "mlx-vlm", sizes=sizes)
    model, apart = both(quantize(source, tmp_path / "packed", parts=PARTS, **way))
    ids = mx.arange(80)[None] % 64
    assert np.abs(np.array(model(ids) - apart(ids))).max() < 5e-5
    assert dense_rows == [80] * 2 * 5  # gate and up by themselves
    model(ids[:, :63])
    assert len(dense_rows) == 2 * 5


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_long_steps_keep_the_type(
    tmp_path: Path, dtype: str, mode: str, dense_rows: list[int]
) -> None:
    source = write(tmp_path / "source", "mlx-vlm", dtype=dtype)
    folder = quantize(source, tmp_path / "packed", parts=PARTS, **{**FOUR, "mode": mode})
    model = load_checkpoint(folder).model
    h = model.language_model(mx.zeros((1, 70, model.config.text_config.hidden_size), model.dtype))
    assert h.dtype == getattr(mx, dtype) and dense_rows


def test_the_faster_way_is_measured() -> None:
    """On the machine as it is, once: dense where it is much faster, as it is on every CPU, and
    never where nothing is won.
    """
    layer: Any = nn.QuantizedLinear(1024, 512, bits=5, group_size=128)
    found = fewest_dense_rows(layer, mx.float32)
    x = mx.random.normal((2048, 1024))
    slow, fast = (
        layers._seconds(type(layer).__call__, layer, x),
        layers._seconds(layers._dense_product, layer, x),
    )
    assert (found <= 2048) == (fast < 0.9 * slow) or 0.6 < fast / slow < 1.5
    assert fewest_dense_rows(layer, mx.float32) is found


@pytest.mark.parametrize(
    ("interval", "points"),
    [(0, []), (1, [1, 2, 3, 4, 5, 6]), (2, [1, 2, 3, 4, 5, 6]), (4, [2, 4, 6])],
)
def test_the_host_is_one_half_of_an_interval_ahead(
    interval: int, points: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is waited for at a point is the point before it, or with an interval of 1 itself."""
    waited: list[Any] = []
    wait = mx.eval
    monkeypatch.setattr(mx, "eval", lambda given: (waited.append(given), wait(given)))
    pace, values, due = layers.Pace(interval), {}, []
    for number in range(1, 7):
        values[number] = mx.ones(number) + 1
        if pace.is_due(number):
            pace.evaluate(values[number])
            due.append(number)
    assert due == points
    sizes = [sum(value.size for value in given) for given in waited]
    assert sizes == (points if interval == 1 else [0, *points][: len(points)])
