"""Commands that are asked to end (SIGTERM) at whatever moment: they are gone in time with all that
they started, nothing half is left, and the same command then does it whole. Servers:
tests/hosts/test_ending.py and test_mcp_ending.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write
from hostile.processes import alive, descendants
from hostile.sizes import cases
from PIL import Image

from mlx_onevision.api import load

TIMES = cases(1, 20)
SECONDS = 5.0
FILM = Path(__file__).parents[2] / "examples/circle.mp4"


def converted(place: Path) -> tuple[list[str], Callable[[], None]]:
    target = place / "converted"
    options = ["--model", str(write(place / "model")), "--output", str(target), "--no-verify"]

    def whole() -> None:
        load(target).close()
        assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []

    return ["convert", *options, "--overwrite"], whole


def trained(place: Path) -> tuple[list[str], Callable[[], None]]:
    Image.new("RGB", (56, 56), "red").save(place / "a.png")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A heart."}]
    row = json.dumps({"messages": turns, "images": ["a.png"]})
    (place / "rows.jsonl").write_text(f"{row}\n{row}\n")
    out = place / "out"
    options = ["--model", str(write(place / "model")), "--data", str(place / "rows.jsonl")]
    options += ["--adapter", str(out), "--cache", str(place / "cache"), "--steps", "20"]

    def whole() -> None:
        load(place / "model", adapter=out).close()
        assert [path.name for path in place.rglob("*") if "part" in path.name] == []

    return ["train", *options, "--save-every", "1"], whole


def described(place: Path) -> tuple[list[str], Callable[[], None]]:
    out = place / "film.json"
    options = ["--segments", "0.5", "--frames", "2", "--max-tokens", "4", "--format", "json"]

    def whole() -> None:
        assert len(json.loads(out.read_text())["segments"]) >= 4
        assert [path.name for path in place.iterdir() if "partial" in path.name] == []

    return ["describe", *options, "--output", str(out), "--force", str(FILM)], whole


COMMANDS = {"convert": converted, "train": trained, "describe": described}


def started(place: Path, arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_onevision", *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(place / "user")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_asked_to_end(tmp_path: Path, name: str) -> None:
    place, moments = tmp_path, random.Random(name)
    arguments, whole = COMMANDS[name](place)
    for number in range(TIMES):
        process = started(place, arguments)
        try:
            process.wait(moments.uniform(0.2, 3.0))
        except subprocess.TimeoutExpired:
            pass
        children = descendants(process.pid)
        process.terminate()
        began = time.monotonic()
        _, log = process.communicate(timeout=30)
        assert time.monotonic() - began <= SECONDS
        assert process.returncode in (0, 143, -signal.SIGTERM), log
        assert "Traceback" not in log
        until = time.monotonic() + 2
        while any(map(alive, children)):
            assert time.monotonic() < until, "it left a process behind"
            time.sleep(0.05)
        if process.returncode == 0:  # it was done before
            whole()
            place = tmp_path / str(number)
            place.mkdir()
            arguments, whole = COMMANDS[name](place)
    process = started(place, arguments)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    whole()
