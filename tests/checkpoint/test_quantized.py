"""Packed folders: the same network as their weights unpacked, module by module."""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from changed_checkpoints import IDS, dequantized, edit, features, logits, quantize, refusal
from checkpoints import Sizes, arrays, write

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.errors import ConfigError

PACKINGS = [
    {"bits": 4, "group_size": 64},
    {"bits": 8, "group_size": 32},
    {"bits": 3, "group_size": 32},
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": "nvfp4", "bits": 4, "group_size": 16},
    {"mode": "mxfp8", "bits": 8, "group_size": 32},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", PACKINGS, ids=str)
def test_quantized_folders(tmp_path: Path, way: dict[str, Any], tied: bool) -> None:
    """Language model, projector and tower packed, against the same weights unpacked beforehand."""
    parts = ("language_model", "multi_modal_projector", "vision_tower")
    source = write(tmp_path / "source", "mlx-vlm", tied=tied)
    folder = quantize(source, tmp_path / "packed", parts=parts, **way)
    checkpoint = load_checkpoint(folder)
    model = checkpoint.model
    layer = model.language_model.layers[1].mlp.down_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert (layer.bits, layer.group_size) == (way["bits"], way["group_size"])
    assert isinstance(model.language_model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(model.vision_tower.embeddings.position_embedding, nn.Embedding)
    plain = load_checkpoint(dequantized(folder, tmp_path / "plain")).model
    assert np.abs(logits(model) - logits(plain)).max() < 1e-4
    assert np.abs(features(model) - features(plain)).max() < 1e-4


def test_modules_may_be_packed_differently_or_not_at_all(tmp_path: Path) -> None:
    """Entries are in the file's names, and map to ours."""
    modules: dict[str, Any] = {
        "language_model.model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 64},
        "language_model.model.layers.1.mlp.up_proj": False,
        "language_model.lm_head": {"mode": "mxfp4", "bits": 4, "group_size": 32},
    }
    source = write(tmp_path / "source", "mlx-vlm", tied=False)
    modules["language_model.model.layers.0.mlp.up_proj"]["mode"] = "affine"
    folder = quantize(source, tmp_path / "packed", modules=modules)
    model = load_checkpoint(folder, fused=False).model
    first, second = (layer.mlp.up_proj for layer in model.language_model.layers)
    assert (first.bits, first.group_size) == (8, 64)
    assert isinstance(second, nn.Linear) and not isinstance(second, nn.QuantizedLinear)
    assert model.lm_head.mode == "mxfp4"
    assert model.language_model.layers[0].mlp.gate_proj.bits == 4
    plain = load_checkpoint(dequantized(folder, tmp_path / "plain")).model
    assert np.abs(logits(model) - logits(plain)).max() < 1e-4


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_embeddings_come_in_the_model_s_type(tmp_path: Path, dtype: str, mode: str) -> None:
    source = write(tmp_path / "source", "mlx-vlm", dtype=dtype)
    parts = ("language_model", "vision_tower")
    folder = quantize(source, tmp_path / "packed", parts=parts, mode=mode)
    model = load_checkpoint(folder).model
    assert model.embed(mx.array(IDS)).dtype == getattr(mx, dtype)
    pixels = mx.zeros((1, 28, 28, 3))
    assert model.vision_features(pixels).dtype == getattr(mx, dtype)
    cast = load_checkpoint(folder, "float32").model
    assert cast.embed(mx.array(IDS)).dtype == mx.float32
    packed, unpacked = (np.array(m.embed(mx.array(IDS)).astype(mx.float32)) for m in (model, cast))
    assert np.allclose(packed, unpacked, rtol=2**-7, atol=1e-3)


def test_a_tied_head_may_be_packed_twice(tmp_path: Path) -> None:
    weights = arrays()
    weights["lm_head.weight"] = weights["language_model.embed_tokens.weight"]
    folder = quantize(write(tmp_path / "a", "mlx-vlm", weights=weights), tmp_path / "b")
    assert load_checkpoint(folder).config.tie_word_embeddings


def test_a_padded_tower_is_the_same_one(tmp_path: Path) -> None:
    """Zero columns up to a width that packs: how a 4,304-wide MLP is quantised as a 4,352-wide.

    The zeros add nothing, but a matrix product of another width may sum in another order.
    """
    weights = arrays()
    for name, value in weights.items():
        if "fc1" in name:
            weights[name] = np.concatenate([value, np.zeros((32, *value.shape[1:]), np.float32)])
        elif name.endswith("fc2.weight"):
            weights[name] = np.concatenate([value, np.zeros((len(value), 32), np.float32)], axis=1)
    wide = dataclasses.replace(Sizes(), vision_intermediate=160)
    padded = load_checkpoint(write(tmp_path / "padded", sizes=wide, weights=weights)).model
    plain = load_checkpoint(write(tmp_path / "plain")).model
    difference = np.abs(features(padded) - features(plain)).max()
    assert difference < 32 * np.finfo(np.float32).eps * np.abs(features(plain)).max()


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "awq", "compressed-tensors"])
def test_other_quantizations_are_named(tmp_path: Path, method: str) -> None:
    folder = edit(write(tmp_path), quantization_config={"quant_method": method, "bits": 4})
    assert method in refusal(folder, ConfigError)


def test_packed_weights_and_a_config_that_disagrees(tmp_path: Path) -> None:
    folder = quantize(write(tmp_path / "a", "mlx-vlm"), tmp_path / "b")
    edit(folder, quantization=None, quantization_config=None)
    assert "quantized, but config.json does not say how" in refusal(folder)
    way = {"group_size": 32, "bits": 4, "mode": "affine"}
    path = "language_model.model.layers.0.mlp.up_proj"
    edit(folder, quantization={**way, path: False})
    assert "up_proj is not quantized, but it is" in refusal(folder)
    edit(folder, quantization={**way, "bits": 8})
    assert "has the shape" in refusal(folder)
    edit(folder, quantization={**way, "group_size": 128})
    assert "does not divide into groups of 128" in refusal(folder)
    edit(folder, quantization={**way, "mode": "mxfp4", "group_size": 64})
    assert "MLX cannot read this quantization" in refusal(folder)
    edit(folder, quantization={**way, "mode": "mxfp4"})
    assert "biases" in refusal(folder)
