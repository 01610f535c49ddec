"""Quantised checkpoints as mlx-vlm writes them, and the same ones unpacked again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from processor_files import dump


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
