"""Folders that other programs write: transformers' own ``save_pretrained`` and mlx-vlm's converter,
each in the version that the parity environment has.
"""

# pyright: reportMissingImports=false
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from parity.layouts import read_config
from safetensors.numpy import load_file, save_file

CONVERT = """
import sys
from parity import torchvision_ops
from mlx_vlm.convert import convert
source, target, bits, group, recipe = sys.argv[1:]
convert(source, mlx_path=target, quantize=True, q_bits=int(bits), q_group_size=int(group),
        quant_predicate=recipe or None)
"""


def by_transformers(hub: Path, folder: Path) -> Path:
    """What transformers 5 saves of a network that it did not itself load from the Hub's layout."""
    from parity.oracle import Oracle

    loaded = Oracle(hub)
    fresh = type(loaded.model)(loaded.model.config)
    fresh.load_state_dict(loaded.model.state_dict())
    # A freshly made model does not remember an older layout, so it is saved in the present one.
    fresh.generation_config = loaded.model.generation_config
    fresh.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


def resaved_by_transformers(hub: Path, folder: Path) -> Path:
    """What transformers 5 saves of a Hub checkpoint: new configuration, old tensor names."""
    from parity.oracle import Oracle

    loaded = Oracle(hub)
    loaded.model.save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return folder


def by_mlx_vlm(hub: Path, folder: Path, bits: int, group: int, recipe: str = "") -> Path:
    """A quantised folder by mlx-vlm's converter, in a process of its own: it sets things up for the
    whole process when it is imported.
    """
    tests = Path(__file__).parent.parent
    arguments = [str(hub), str(folder), str(bits), str(group), recipe]
    subprocess.run(
        [sys.executable, "-c", CONVERT, *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=tests,
        timeout=300,
    )
    return folder


def dequantized(quantized: Path, hub: Path, folder: Path) -> Path:
    """A quantised folder's network in the Hub's layout and float32: what it has to compute.

    ``hub`` is the folder that was quantised: names and shapes are taken from it.
    """
    shutil.copytree(hub, folder)
    config = read_config(quantized)
    packing = config["quantization"]
    stored: dict[str, mx.array] = {}
    for file in quantized.glob("*.safetensors"):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        stored.update(tensors)
    original = load_file(hub / "model.safetensors")
    weights = {}
    for name, tensor in original.items():
        module = _theirs(name.removesuffix(".weight"), stored)
        if f"{module}.scales" in stored:
            entry = packing.get(module, packing)
            entry = packing if entry is True else entry
            values = mx.dequantize(
                stored[f"{module}.weight"],
                stored[f"{module}.scales"],
                stored[f"{module}.biases"],
                group_size=entry["group_size"],
                bits=entry["bits"],
            )
        else:
            values = stored[_theirs(name, stored)]
        values = np.array(values.astype(mx.float32))
        if "patch_embedding.weight" in name:
            values = values.transpose(0, 3, 1, 2)  # MLX convolutions have channels last
        assert values.shape == tensor.shape, name
        weights[name] = np.ascontiguousarray(values)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _theirs(name: str, stored: dict[str, mx.array]) -> str:
    """mlx-vlm's name for a tensor or module of the Hub's original layout."""
    if name in stored or f"{name}.weight" in stored:
        return name
    for pattern, replacement in ((r"vision_tower\.vision_model\.", "vision_tower."),):
        name = re.sub(pattern, replacement, name)
    assert name in stored or f"{name}.weight" in stored, name
    return name


def packed_modules(folder: Path) -> dict[str, int]:
    """How many modules of a quantised folder have each packing, by its JSON."""
    packing = json.loads((folder / "config.json").read_text())["quantization"]
    entries = [json.dumps(entry) for entry in packing.values() if isinstance(entry, dict)]
    return {entry: entries.count(entry) for entry in set(entries)}
