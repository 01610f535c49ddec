"""What a rank, or one process alone, makes of a checkpoint; as a program, for every rank of
``start``: ``python ranks.py TARGET FOLDER``.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_onevision.api import load
from mlx_onevision.cli.main import cli
from mlx_onevision.engine.runner import Runner
from mlx_onevision.network.stages import Split

SECONDS = 60
SPLITS: dict[str, Split | None] = {"tensor": None, "stages": (1, 3)}
LANGUAGE = ("language_model", "lm_head")
rng = np.random.default_rng(3)
IMAGES = [rng.integers(0, 256, size, np.uint8) for size in ((70, 40, 3), (28, 28, 3), (30, 90, 3))]
VIDEO = rng.integers(0, 256, (5, 28, 28, 3), np.uint8)
PROMPTS: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {
    "text": ([], []),
    "image": (IMAGES[:1], []),
    "images": (IMAGES, []),
    "video": ([], [VIDEO]),
}


def answers(folder: Path, quantize: int | None, split: Split | None = None) -> dict[str, Any]:
    """The last logits and greedy tokens of every prompt, and bytes of weights: ``active`` are those
    that MLX has given out.
    """
    before = mx.get_active_memory()
    model = load(folder, quantize=quantize, sharded=True, split=split)
    found: dict[str, Any] = model._engine._worker.call(lambda runner: sizes(runner, before))
    for name, (images, videos) in PROMPTS.items():
        blocks = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
        content = [*blocks, {"type": "text", "text": "hello"}]
        messages = [{"role": "user", "content": content}]
        inputs = model.prepare(messages, images=images, videos=videos)
        logits = model.logits(inputs, last=9)
        answer = model.generate(
            messages=messages, images=images, videos=videos, max_tokens=12, temperature=0
        )
        found[name] = {"logits": logits.tolist(), "tokens": answer.tokens}
    sampled = model.generate("hello", max_tokens=12, temperature=1.5)
    found["sampled"] = sampled.tokens  # without a seed
    model.close()
    return found


def sizes(runner: Runner, before: int) -> dict[str, int]:
    model = runner.model
    mx.eval(model.parameters())
    mx.clear_cache()
    leaves: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    language = sum(a.nbytes for name, a in leaves.items() if name.startswith(LANGUAGE))
    return {
        "active": mx.get_active_memory() - before,
        "language": language,
        "others": sum(a.nbytes for a in leaves.values()) - language,
        "planned": runner.memory.weights,
        "position": runner.memory.position,
    }


def start(
    command: list[str], folder: Path, ranks: int = 2, seconds: float = SECONDS
) -> list[tuple[int, str, str]]:
    """Runs a Python command as ``mlx.launch`` does, on the ring backend: of every rank its exit
    code, stdout and stderr.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        ended = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    return [(code, *streams) for code, streams in zip(codes, ended, strict=True)]


if __name__ == "__main__":
    target, folder = map(Path, sys.argv[1:])
    made = {
        f"{way} {bits}": answers(folder, bits, split)
        for way, split in SPLITS.items()
        for bits in (None, 4)
    }
    (target / f"{os.environ['MLX_RANK']}.json").write_text(json.dumps(made))
    arguments = ["generate", "--model", str(folder), "--prompt", "hello", "--max-tokens", "4"]
    cli(arguments, standalone_mode=False)
