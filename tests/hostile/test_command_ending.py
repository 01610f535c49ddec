"""Commands that are asked to end (SIGTERM) at whatever moment: they are gone in time with all that
they started, nothing half is left, and the same command then does it whole. Servers:
test_server_ending.py and test_mcp_ending.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from changed_checkpoints import endless
from checkpoints import write
from hostile.processes import alive, descendants
from hostile.sizes import cases
from PIL import Image

from mlx_onevision.api import load
from mlx_onevision.checkpoint.adapters import MLX_WEIGHTS
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.train.loop import STATE

TIMES = cases(1, 20)
SECONDS = 5.0
EXAMPLES = Path(__file__).parents[2] / "examples"
VIDEO, SHAPES = EXAMPLES / "circle.mp4", EXAMPLES / "shapes.png"


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

    return ["describe", *options, "--output", str(out), "--force", str(VIDEO)], whole


def embedded(place: Path) -> tuple[list[str], Callable[[], None]]:
    folder, out = place / "images", place / "vectors.npz"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (300, 200 + number), (4 * number, 0, 0)).save(folder / f"{number}.png")

    def whole() -> None:
        assert len(Embeddings.load(out)) == 60
        assert {path.name for path in place.iterdir()} <= {"images", "vectors.npz", "user"}

    return ["embed", str(folder), "--model", "demo", "--output", str(out)], whole


def answered(place: Path) -> tuple[list[str], Callable[[], None]]:
    """The file of the KV cache is written at the end, and replaced by the next run."""
    cache = place / "cache.safetensors"
    options = ["--image", str(SHAPES), "-p", "What?", "--stream", "--temp", "3", "-m", "150"]

    def whole() -> None:
        model = load("demo")
        assert model.load_prompt_cache(cache)[0] > 150
        model.close()
        assert {path.name for path in place.iterdir()} <= {cache.name, "user"}

    return ["generate", *options, "--prompt-cache", str(cache)], whole


COMMANDS = {
    "convert": converted,
    "train": trained,
    "describe": described,
    "embed": embedded,
    "generate": answered,
}


def started(
    place: Path,
    arguments: list[str],
    stdout: int = subprocess.DEVNULL,
    program: Sequence[str] = ("-m", "mlx_onevision"),
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env={**os.environ, "XDG_CACHE_HOME": str(place / "user")},
        stdin=subprocess.PIPE,
        stdout=stdout,
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
        # It was done before: training, once it has deleted what it would go on from.
        trains = name == "train" and (place / "out" / MLX_WEIGHTS).exists()
        if process.returncode == 0 or (trains and not (place / "out" / STATE).exists()):
            whole()
            place = tmp_path / str(number)
            place.mkdir()
            arguments, whole = COMMANDS[name](place)
    process = started(place, arguments)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    whole()


# In the middle of what each has begun to print.


def ended(process: "subprocess.Popen[str]") -> str:
    """What it still prints, asked to end; held to the time, the exit code and no traceback."""
    with process:
        process.terminate()
        began = time.monotonic()
        assert process.stdout is not None and process.stderr is not None
        rest, log = process.stdout.read(), process.stderr.read()
        process.wait(30)
        assert time.monotonic() - began <= SECONDS
    assert process.returncode == 143 and "Traceback" not in log and "error" not in log, log
    return rest


def test_generate_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    model, cache = endless(tmp_path / "model"), tmp_path / "cache"
    arguments = ["generate", "--model", str(model), "-p", "x", "--prompt-cache", str(cache)]
    whole = started(tmp_path, [*arguments, "-m", "4"])
    whole.communicate(timeout=60)
    before, files = cache.read_bytes(), sorted(tmp_path.iterdir())
    process = started(tmp_path, [*arguments, "-m", "9000", "--stream"], subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(9)
    ended(process)
    assert cache.read_bytes() == before and sorted(tmp_path.iterdir()) == files


def test_chat_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    """What was saved is whole, the conversation's own file is as it was."""
    model, cache, saved = endless(tmp_path / "model"), tmp_path / "cache", tmp_path / "saved.json"
    arguments = ["chat", "--model", str(model), "--prompt-cache", str(cache)]
    whole = started(tmp_path, [*arguments, "-m", "4"])
    whole.communicate("One?\n", timeout=60)
    before, files = cache.read_bytes(), sorted([*tmp_path.iterdir(), saved])
    process = started(tmp_path, [*arguments, "-m", "900"], subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"/save {saved}\nTwo?\n")
    process.stdin.flush()
    assert process.stdout.read(9)
    ended(process)
    assert [turn["role"] for turn in json.loads(saved.read_text())] == ["user", "assistant"]
    assert cache.read_bytes() == before and sorted(tmp_path.iterdir()) == files


def test_chat_while_it_waits_for_a_line(tmp_path: Path) -> None:
    process = started(tmp_path, ["chat", "--model", "demo"], subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("What?\n")
    process.stdin.flush()
    assert process.stdout.readline()
    time.sleep(0.2)
    ended(process)


def test_where_what_is_raised_is_dropped(tmp_path: Path) -> None:
    """As in the callbacks of imports: Python prints what they raise, and goes on."""
    program = tmp_path / "program.py"
    program.write_text(
        "import time, weakref\n"
        "from mlx_onevision import api\n"
        "def load(*_, **__):\n"
        "    class Thing: pass\n"
        "    thing = Thing()\n"
        "    kept = weakref.ref(thing, lambda _: (print('now', flush=True), time.sleep(60)))\n"
        "    del thing\n"
        "    time.sleep(60)\n"
        "api.load = load\n"
        "from mlx_onevision.__main__ import main\n"
        "main()\n"
    )
    process = started(tmp_path, ["generate", "-p", "x"], subprocess.PIPE, [str(program)])
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    ended(process)


def test_embed_between_two_vectors(tmp_path: Path) -> None:
    """The lines are whole."""
    arguments, _ = embedded(tmp_path)
    arguments[arguments.index("--output") :] = ["--jsonl", *[arguments[1]] * 40]
    process = started(tmp_path, arguments, subprocess.PIPE)
    assert process.stdout is not None
    lines = [process.stdout.readline(), *ended(process).splitlines()]
    assert 1 <= len(lines) < 41 * 60
    assert {len(json.loads(line)["vector"]) for line in lines} == {
        len(json.loads(lines[0])["vector"])
    }
