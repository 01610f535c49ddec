"""The example programs, run as they stand on a small random checkpoint."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from checkpoints import write
from PIL import Image, ImageChops, ImageStat
from served import serving

from mlx_onevision import load
from mlx_onevision.media.video import load_video
from mlx_onevision.plugins.adapters.fake import FakeBackend

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPES = EXAMPLES / "shapes.png"
CIRCLE = EXAMPLES / "circle.mp4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model")


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


def run(name: str, *arguments: str | Path) -> Done:
    """In this process: most of what one of its own would take goes by before a program begins."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return Done(out.getvalue(), error.getvalue())


def test_the_index_names_all_of_them() -> None:
    index = EXAMPLES.joinpath("README.md").read_text(encoding="utf-8")
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix != ".md"} - {"__pycache__"}
    named = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", index)}
    assert named == there
    linked = re.findall(r"\]\((.*?)\)", index)
    assert all((EXAMPLES / link).exists() for link in linked)


def test_ask(folder: Path) -> None:
    """As a user starts it."""
    command = [sys.executable, EXAMPLES / "ask.py", SHAPES, "What is in this image?", folder]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


def test_train_demo(tmp_path: Path) -> None:
    """A tenth of a minute of training; what the whole of it reaches is in docs/training.md."""
    done = run("train_demo.py", tmp_path, "8", "4", "1")
    assert "step 1: " in done.stdout
    assert "old shapes: 4 of 4 right before" in done.stdout
    assert done.stdout.count("the fused model says the same of 4 of 4") == 2
    assert (tmp_path / "adapter/adapters.safetensors").is_file()


def test_conversation(folder: Path) -> None:
    done = run("conversation.py", SHAPES, folder)
    assert [line for line in done.stdout.splitlines() if line.startswith("? ")] == [
        "? How many shapes are there?",
        "? Where is the star?",
        "? Which colour is the circle?",
    ]
    counts = [line for line in done.stdout.splitlines() if "were in the cache)" in line]
    cached = [int(line.split("(")[1].split()[0]) for line in counts]
    assert cached[0] == 0 < cached[1] < cached[2]


def test_batch() -> None:
    """The demo model's own answers; a row that cannot be answered says why, in its place."""
    done = run("batch.py")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(row) for row in rows] == [["text", "tokens"]] * 3 + [
        ["error", "tokens"],
        ["text", "tokens"],
    ]
    assert rows[0]["text"] == "A red circle, a blue star and an orange triangle."
    assert "missing.png" in rows[3]["error"] and rows[2]["text"] and rows[1]["text"]
    assert done.stderr == ""


def test_caption_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copy(SHAPES, tmp_path / "b.png")
    Image.new("RGB", (80, 50), "red").save(tmp_path / "c.jpg")
    (tmp_path / "a.txt").write_text("not a picture")
    done = run("caption_folder.py", tmp_path, folder)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == ["b.png", "c.jpg"]
    assert all(row["text"] for row in rows)
    assert "a.txt" in done.stderr and len(done.stderr.splitlines()) == 1


def test_similar_pictures(folder: Path, tmp_path: Path) -> None:
    with Image.open(SHAPES) as shapes:
        shapes.save(tmp_path / "same.webp", lossless=True)
        shapes.resize((480, 320)).save(tmp_path / "smaller.jpg")
    Image.new("RGB", (80, 50), "red").save(tmp_path / "red.png")
    (tmp_path / "a.txt").write_text("not a picture")
    done = run("similar_pictures.py", tmp_path, SHAPES, folder)
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    assert [Path(name).name for _, name in rows] == ["same.webp", "smaller.jpg", "red.png"]
    assert rows[0][0] == "1.000" and float(rows[1][0]) > 0.9 > float(rows[2][0])
    assert "a.txt" in done.stderr and len(done.stderr.splitlines()) == 1
    # The next search finds what is new; another model's vectors do not mix with these.
    Image.new("RGB", (80, 50), "blue").save(tmp_path / "blue.png")
    again = run("similar_pictures.py", tmp_path, tmp_path / "blue.png", folder)
    assert again.stdout.splitlines()[0] == f"1.000  {tmp_path / 'blue.png'}"
    with pytest.raises(SystemExit, match="delete it to begin anew"):
        run("similar_pictures.py", tmp_path, SHAPES)


def test_the_pictures_are_those_that_their_program_draws(tmp_path: Path) -> None:
    run("draw_shapes.py", tmp_path)
    for name in ("shapes.png", "square.png"):
        with Image.open(EXAMPLES / name) as kept, Image.open(tmp_path / name) as drawn:
            assert kept.size == drawn.size
            apart = ImageStat.Stat(ImageChops.difference(kept, drawn))
            assert max(apart.mean) < 0.05  # of 255: a few edge pixels, between versions of Pillow


def test_two_images_on_the_demo_model() -> None:
    assert run("two_images.py").stdout.splitlines() == [
        "? What is in the first image?",
        "A red circle, a blue star and an orange triangle.",
        "? What is in the second image?",
        "A green square.",
        "? Which image has a star?",
        "The first image has the star.",
    ]


def test_video_on_the_demo_model() -> None:
    lines = run("video.py").stdout.splitlines()
    assert lines[1] == "A red circle and a blue square."
    assert lines[4] == "The circle moves from left to right."


def test_as_in_transformers(folder: Path) -> None:
    """Pictures by URL, a video by path. That the reference sees the same is held in tests/parity,
    for conversations of this form.
    """
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    server = HTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(EXAMPLES)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    shapes, square = f"{address}/shapes.png", f"{address}/square.png"
    try:
        done = run("as_in_transformers.py", folder, shapes, shapes, square, shapes, CIRCLE)
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(asked) == ["/shapes.png"] * 3 + ["/square.png"]  # several are fetched at once
    assert done.stdout.startswith("<|im_start|>user")
    assert "This image shows a red stop sign.<|im_end|>" in done.stdout
    model = load(folder, dtype="float16")
    about_a_picture = model.generate(
        "What is shown in this image?", images=[SHAPES], max_tokens=100
    )
    about_a_video = model.generate(
        "Why is this video funny?", videos=[CIRCLE], num_frames=8, max_tokens=60
    )
    model.close()
    assert about_a_picture.text in done.stdout and about_a_video.text in done.stdout


def test_video(folder: Path) -> None:
    done = run("video.py", CIRCLE, folder, "8")
    assert done.stdout.count(" tokens of video)") == 2 and done.stderr == ""


def test_the_video_is_small_and_its_program_draws_it(tmp_path: Path) -> None:
    run("draw_circle.py", tmp_path / "drawn.mp4")
    assert CIRCLE.stat().st_size < 20_000
    kept, drawn = (load_video(path, 56) for path in (CIRCLE, tmp_path / "drawn.mp4"))
    assert kept.total == drawn.total == 48
    apart = abs(kept.tiles.astype(int) - drawn.tiles)
    assert apart.mean() < 2  # of 255: encoders differ


def test_speculation(folder: Path) -> None:
    settings = ("--answers", "4", "--tokens", "8", "--pairs", "1")
    done = run("speculation.py", "--model", folder, "--draft-model", folder, *settings)
    for way in ("prompt_lookup", "draft_tokens"):
        assert f"{way}: 4 of 4 answers have the same tokens" in done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_says_how_it_is_used(path: Path) -> None:
    command = [sys.executable, path, "--help"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and path.name in done.stdout


def test_throughput_without_a_server() -> None:
    for url in ("http://127.0.0.1:9", "--nothing", "nothing"):
        command = [sys.executable, EXAMPLES / "throughput.py", url]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr and url in done.stderr


def test_throughput() -> None:
    with serving(FakeBackend(delay=0.03)) as client:
        done = run("throughput.py", f"http://127.0.0.1:{client.port}", "4", "16")
    said = re.fullmatch(
        r"1 stream: +([\d.]+) tokens/s\n4 streams: +[\d.]+ tokens/s, ([\d.]+) times as many\n",
        done.stdout,
    )
    # The fake takes its time for each token, so four take no longer than one, or little.
    assert said and 0 < float(said[1]) <= 1 / 0.03 and float(said[2]) > 2
