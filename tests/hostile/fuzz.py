"""Untrusted bytes, driven by what code they reach (atheris, which there is for Linux):
``python fuzz.py TARGET SECONDS``. Ends with another code than 0 at the first error that is none of
this package's, and prints where it has left the bytes.
"""

import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Any: it is not installed everywhere, and its types are not declared.
atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["mlx_onevision"]):
    from pydantic import TypeAdapter, ValidationError

    from mlx_onevision.checkpoint.hub import EMBEDDED
    from mlx_onevision.checkpoint.tensors import read_header
    from mlx_onevision.config.generation import GenerationDefaults
    from mlx_onevision.config.model import OneVisionConfig
    from mlx_onevision.errors import OneVisionError
    from mlx_onevision.media.image import load_image
    from mlx_onevision.plugins.contract.errors import PluginError
    from mlx_onevision.plugins.hosts.http.schemas import ChatRequest

FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
FILE = Path(FOLDER.name) / "model.safetensors"
CHAT = TypeAdapter(ChatRequest)
PHOTO = Path(__file__).parents[2] / "examples/shapes.png"


def header(data: bytes) -> None:
    FILE.write_bytes(data)
    read_header(FILE)


def config(data: bytes) -> None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        GenerationDefaults.from_dict(values, values)
        OneVisionConfig.from_dict(values)


def request(data: bytes) -> None:
    CHAT.validate_json(data)


def image(data: bytes) -> None:
    load_image(data)


def small_header() -> bytes:
    text = b'{"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {}}'
    return len(text).to_bytes(8, "little") + text + bytes(8)


ASKED = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:,"}},
            ],
        }
    ],
    "logit_bias": {"1": 2},
    "stream": True,
}
# What each begins from.
TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], bytes]]] = {
    "header": (header, small_header),
    "config": (config, lambda: (EMBEDDED / "config.json").read_bytes()),
    "request": (request, lambda: json.dumps(ASKED).encode()),
    "image": (image, PHOTO.read_bytes),
}


def main() -> None:
    target, seconds = sys.argv[1:]
    try_, seed = TARGETS[target]
    seeds = Path(FOLDER.name) / "seeds"
    seeds.mkdir()
    (seeds / "one").write_bytes(seed())

    def one(data: bytes) -> None:
        try:
            try_(data)
        except (OneVisionError, PluginError, ValidationError):
            pass

    logging.disable()
    left = Path(tempfile.gettempdir()) / f"fuzz-{target}-"
    options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=3000", "-max_len=20000"]
    options += [f"-artifact_prefix={left}", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
