"""Checkpoints whose weights are holes in their files: as large as one likes, and made at once."""

import json
from math import prod
from pathlib import Path

from checkpoints import Sizes, arrays, config, layout_name, pinpoints, write
from processor_files import dump, write_processor


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
