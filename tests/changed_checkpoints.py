"""Checkpoints that are changed, and what the tests look at in a loaded one.

Edited, quantized as mlx-vlm writes them, without the bytes of their weights, and without an end.
"""

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Sizes, arrays, config, dump, layout_name, pinpoints, write, write_processor
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.errors import CheckpointError
from mlx_onevision.network.onevision import OneVision

IDS = [[1, 7, 200, 319, 5, 90, 2, 33]]


def logits(model: OneVision) -> np.ndarray:
    return np.array(model(mx.array(IDS)))


def features(model: OneVision, edge: int = 28) -> np.ndarray:
    """The projected features of a fixed tile: they depend on every vision weight."""
    pixels = mx.arange(edge * edge * 3).reshape(1, edge, edge, 3) % 255 / 127.5 - 1
    return np.array(model.multi_modal_projector(model.vision_features(pixels)).astype(mx.float32))


def dtypes(model: OneVision) -> set[mx.Dtype]:
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {value.dtype for value in parameters.values()}


def edit(folder: Path, file: str = "config.json", **values: Any) -> Path:
    """Changes fields of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as refused:
        load_checkpoint(folder)
    message = str(refused.value)
    assert len(message) < 400 and "\n" not in message
    return message


# Quantized, as mlx-vlm writes them.


def quantize(
    folder: Path,
    target: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    mode: str = "affine",
    parts: tuple[str, ...] = ("language_model",),
    modules: Mapping[str, dict[str, Any] | bool] = {},
) -> Path:
    """A quantised copy of an mlx-vlm folder, as mlx-vlm writes it: packed are the matrices of
    ``parts``, ``modules`` (in the file's names) being packed differently or, at False, not at all.
    """
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    default = {"group_size": group_size, "bits": bits, "mode": mode}
    packed: dict[str, Any] = {}
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    for name, value in loaded.items():
        path = name.removesuffix(".weight")
        way = modules.get(path, True)
        if value.ndim == 2 and way and name.startswith(parts):
            kind = default if way is True else way
            assert isinstance(kind, dict)
            weight, scales, *biases = mx.quantize(value, **kind)
            packed |= {name: weight, f"{path}.scales": scales}
            if biases:
                packed[f"{path}.biases"] = biases[0]
        else:
            packed[name] = value
    mx.save_safetensors(str(target / "model.safetensors"), packed, {"format": "mlx"})
    settings = json.loads((target / "config.json").read_text())
    settings["quantization"] = settings["quantization_config"] = {**default, **modules}
    dump(target / "config.json", settings)
    return target


def dequantized(folder: Path, target: Path) -> Path:
    """The same folder with every packed matrix unpacked again, in float32, by MLX alone."""
    target.mkdir()
    settings = json.loads((folder / "config.json").read_text())
    default = settings.pop("quantization")
    del settings["quantization_config"]
    (target / "config.json").write_text(json.dumps(settings))
    loaded: Any = mx.load(str(folder / "model.safetensors"))
    plain = {}
    for name, value in loaded.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in loaded and name.endswith(".weight"):
            way = default.get(path, default)
            value = mx.dequantize(
                value,
                loaded[f"{path}.scales"],
                loaded.get(f"{path}.biases"),
                **{key: way[key] for key in ("group_size", "bits", "mode")},
            ).astype(mx.float32)
        elif name.endswith((".scales", ".biases")):
            continue
        plain[name] = value
    mx.save_safetensors(str(target / "model.safetensors"), plain)
    return target


# Without the bytes of their weights.


def write_hollow(folder: Path, sizes: Sizes, shards: int = 1) -> Path:
    """A checkpoint of the Hub's layout in bfloat16, all zeros; a layer of the language model is
    never divided between shards.
    """
    write(folder)  # for everything but the network
    dump(folder / "config.json", config(sizes, dtype="bfloat16"))
    write_processor(folder, "space", sizes.image_size, sizes.patch_size, pinpoints(sizes))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    shapes = shapes_of(sizes)
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        file = file if shards > 1 else "model.safetensors"
        header, at = {}, 0
        for name, shape in shapes.items():
            parts = name.split(".")
            layer = int(parts[2]) if name.startswith("language_model.layers.") else 0
            if layer * shards // sizes.layers == n:
                end = at + 2 * prod(shape)
                entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
                header[layout_name(name, "hub")] = entry
                at = end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + at)
        weight_map |= dict.fromkeys(header, file)
    if shards > 1:
        dump(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of a large network's tensors, from those of a small one: no weights are drawn."""
    few = arrays(
        Sizes(
            **{
                **vars(sizes),
                "layers": 1,
                "hidden": 48,
                "intermediate": 96,
                "heads": 4,
                "kv_heads": 2,
            }
        )
    )
    keys = sizes.hidden * sizes.kv_heads // sizes.heads
    larger = {24: keys, 48: sizes.hidden, 96: sizes.intermediate}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in few.items():
        shape: tuple[int, ...] = tuple(value.shape)
        if not name.startswith("vision"):
            shape = tuple(larger.get(edge, edge) for edge in shape)
        layered = name.startswith("language_model.layers.0.")
        for n in range(sizes.layers if layered else 1):
            shapes[name.replace("language_model.layers.0.", f"language_model.layers.{n}.")] = shape
    return shapes


# Without an end of text.


def endless(folder: Path) -> Path:
    """Makes its folder, which must not exist."""
    shutil.copytree(EMBEDDED, folder)
    settings = folder / "generation_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**values, "eos_token_id": [0]}), encoding="utf-8")
    return folder
