"""What a rank, or one process alone, makes of a checkpoint; as a program, for every rank of
``running``: ``python ranks.py TARGET FOLDER ADAPTER OTHER``.

Ranks that wait keep a core busy, so that each sum takes long where there are fewer cores: answers
are short, and there are few layers.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_onevision.api import Model, load
from mlx_onevision.cli.main import cli, main
from mlx_onevision.distributed import TRAFFIC
from mlx_onevision.engine.ranks import Ranks
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.network.language import DecoderLayer
from mlx_onevision.network.stages import Split

SECONDS = 180  # a busy machine takes its time
SPLITS: dict[str, Split | None] = {"tensor": None, "stages": (1, 2)}
TOKENS = 8
CHUNK = 256  # tokens of a prompt that are prefilled at once on a CPU
LONG = "tell me more " * 100  # of five chunks
LAYER_SECONDS = 0.03
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


def answers(
    folder: Path, quantize: int | None, split: Split | None = None, adapter: Path | None = None
) -> dict[str, Any]:
    """The last logits and greedy tokens of every prompt, and vectors; with an adapter, of the first
    two prompts alone. On other ranks than 0 this ends with SystemExit.
    """
    model = load(folder, quantize=quantize, sharded=True, split=split, adapter=adapter)
    found: dict[str, Any] = {}
    for name, (images, videos) in list(PROMPTS.items())[: None if adapter is None else 2]:
        blocks = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
        content = [*blocks, {"type": "text", "text": "hello"}]
        messages = [{"role": "user", "content": content}]
        inputs = model.prepare(messages, images=images, videos=videos)
        logits = model.logits(inputs, last=9)
        answer = model.generate(
            messages=messages, images=images, videos=videos, max_tokens=TOKENS, temperature=0
        )
        found[name] = {"logits": logits.tolist(), "tokens": answer.tokens}
    if adapter is not None:
        model.close()
        return found
    found["sampled"] = model.generate("hello", max_tokens=TOKENS, temperature=1.5).text  # any
    for space in ("vision", "joint"):
        found[space] = model.embed([IMAGES[0], VIDEO], space).vectors.tolist()

    def sent(tokens: int) -> int:
        before = TRAFFIC.sent
        model.generate("hello", max_tokens=tokens, temperature=0)
        return TRAFFIC.sent - before

    if split is not None and quantize is None:
        found["cancelled"] = answers_after_cancellations(model)
    found["sent"] = (sent(TOKENS) - sent(2)) / (TOKENS - 2)  # bytes a token
    model.close()
    return found


def answers_after_cancellations(model: Model) -> list[str]:
    """What follows a request that was cancelled while its long prompt was prefilled."""
    found = []
    for number in range(3):
        stream = model.stream(f"{number} {LONG}", max_tokens=4)
        time.sleep(number * LAYER_SECONDS)
        stream.cancel()
        with suppress(CancelledError):
            stream.result()
        found.append(model.generate("hello", max_tokens=4, temperature=0).text)
    model.generate(LONG, max_tokens=1)
    return found


@contextmanager
def slowed(spans: list[tuple[float, float]]) -> Iterator[None]:
    """Layers take their time over chunks of a prompt, as large ones do. ``spans`` : is given when
    each layer began and ended.
    """
    plain = DecoderLayer.before_attention

    def slow(layer: DecoderLayer, x: mx.array, *others: Any) -> Any:
        if x.shape[1] >= CHUNK:
            began = time.monotonic()
            time.sleep(LAYER_SECONDS)
            spans.append((began, time.monotonic()))
        return plain(layer, x, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderLayer, "before_attention", slow)
        yield


def sizes(runner: Runner, before: int) -> dict[str, int]:
    """Bytes of weights: ``active`` are those that MLX has given out."""
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
        "limit": runner.limit,
        "position": runner.memory.position,
    }


@contextmanager
def running(*commands: list[str], folder: Path) -> Iterator[list[Popen[str]]]:
    """Python commands, one a rank, as ``mlx.launch`` runs them on the ring backend: the process of
    each.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    started = [
        Popen(
            [sys.executable, *command],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")},
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ended(
    started: list[Popen[str]], seconds: float = SECONDS, sent: str | None = None
) -> list[tuple[int, str, str]]:
    """Of every rank its exit code, stdout and stderr, once it has ended. ``sent`` : rank 0's
    stdin.
    """
    until = time.monotonic() + seconds
    streams = [
        process.communicate(None if rank else sent, timeout=until - time.monotonic())
        for rank, process in enumerate(started)
    ]
    return [(process.returncode, *pair) for process, pair in zip(started, streams, strict=True)]


if __name__ == "__main__":
    target, folder, adapter, other = map(Path, sys.argv[1:])
    run, before = Ranks.run, 0
    sized: dict[str, dict[str, int]] = {}
    made: dict[str, dict[str, Any]] = {}
    spans: dict[str, list[tuple[float, float]]] = {}

    def measured(self: Ranks, runner: Runner) -> None:
        sized[name] = sizes(runner, before)
        run(self, runner)

    Ranks.run = measured
    for way, split in SPLITS.items():
        for bits, given in ((None, None), (4, None), (None, adapter)):
            name, before = f"{way} {'adapter' if given else bits}", mx.get_active_memory()
            with suppress(SystemExit), slowed(spans.setdefault(name, [])):
                made[name] = answers(folder, bits, split, given)
    (target / f"{os.environ['MLX_RANK']}.json").write_text(json.dumps([sized, made, spans]))
    Ranks.run = run
    # What is run as a command: two that end well, and one of ranks that do not fit together.
    answer = ["--model", str(folder), "--max-tokens", "4", "--verbose"]
    for command in (["generate", "--prompt", "hello", *answer], ["chat", *answer]):
        with suppress(SystemExit):
            cli(command, standalone_mode=False)
        for stream in (sys.stdout, sys.stderr):
            print("---", file=stream, flush=True)
    own = other if os.environ["MLX_RANK"] == "1" else folder
    sys.argv[1:] = ["generate", "--model", str(own), "--prompt", "hello"]
    main()
