"""The real ``llm`` command on the demo model, a program of its own each time, as people run it."""

import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llm
import pytest
from checkpoints import write
from PIL import Image

LLM = Path(sys.executable).with_name("llm")
EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES, SQUARE, CIRCLE = (EXAMPLES / name for name in ("shapes.png", "square.png", "circle.mp4"))
ANSWER = "A red circle, a blue star and an orange triangle."
MODEL = ("-m", "onevision-demo")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llm"
    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def run(*arguments: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [LLM, *map(str, arguments)], capture_output=True, input=given, timeout=120
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def said(*arguments: str | Path, given: bytes = b"") -> str:
    done = run(*arguments, given=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def refused(*arguments: str | Path) -> str:
    """The one sentence of an error."""
    done = run(*arguments)
    assert done.returncode == 1 and done.stdout == "", done.stdout
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
    return done.stderr.removeprefix("Error: ").rstrip("\n")


def logs() -> list[dict[str, Any]]:
    """What llm has kept, the first question first."""
    return json.loads(said("logs", "-n", "0", "--json"))


def test_images_and_videos() -> None:
    question = "What is in the image?"
    assert said(*MODEL, question, "-a", SHAPES) == ANSWER
    assert said(*MODEL, question, "-a", SHAPES, "--no-stream") == ANSWER
    assert said(*MODEL, question, "-a", SHAPES, "--async") == ANSWER
    assert said(*MODEL, question, "-a", "-", given=SHAPES.read_bytes()) == ANSWER
    both = ("-a", SHAPES, "-a", SQUARE)
    assert said(*MODEL, "What is in the second image?", *both) == "A green square."
    assert said(*MODEL, "Which image has a star?", *both) == "The first image has the star."
    video = said(*MODEL, "How does the circle move?", "-a", CIRCLE, "-o", "num_frames", "8")
    assert video == "The circle moves from left to right."


def test_a_conversation_keeps_its_image_between_programs(tmp_path: Path) -> None:
    shutil.copy(SHAPES, tmp_path / "seen.png")
    said(*MODEL, "How many shapes are there?", "-a", tmp_path / "seen.png", "-s", "You are brief.")
    assert said("-c", "Where is the star?") == "The star is in the centre."
    assert said("-c", "Which colour is the circle?", "--async") == "The circle is red."
    first, second, third = logs()
    assert first["model"] == "onevision-demo" and first["resolved_model"] == "demo"
    assert first["system"] == "You are brief."
    assert first["conversation_id"] == second["conversation_id"] == third["conversation_id"]
    # The image's tokens are there each time, and the prompt grows by what was said.
    counts = [row["input_tokens"] for row in (first, second, third)]
    media = {json.loads(row["token_details"])["media_tokens"] for row in (first, second, third)}
    assert counts[0] < counts[1] < counts[2] and len(media) == 1
    assert first["output_tokens"] > 0 and first["response_json"]["seconds"]["decode"] > 0
    (tmp_path / "seen.png").unlink()
    assert refused("-c", "Where is the star?").endswith("seen.png': there is no such file")


def test_chat() -> None:
    """Its turns share one model; an error ends it with its sentence."""
    typed = b"How many shapes are there?\nWhere is the star?\nquit\n"
    done = run("chat", *MODEL, "-o", "max_tokens", "20", given=typed)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("There is no image.") == 2
    assert [row["prompt"] for row in logs()] == typed.decode().splitlines()[:2]
    assert logs()[0]["input_tokens"] < logs()[1]["input_tokens"]
    wrong = run("chat", *MODEL, "-o", "num_frames", "2", "-o", "fps", "2", given=b"Hello\nquit\n")
    assert wrong.returncode == 1
    assert wrong.stderr == "Error: there are both num_frames and fps; give one of them\n"


def test_options_are_listed_and_heeded() -> None:
    listed = said("models", "--options", *MODEL)
    for name in ("max_tokens", "temperature", "num_frames", "fps", "tiling", "order", "stop"):
        assert f"    {name}: " in listed
    assert "image/heic" in listed and "video/quicktime" in listed and "- schemas" in listed
    ask = (*MODEL, "What is in the image?", "-a", SHAPES)
    assert said(*ask, "-o", "max_tokens", "2") == "A red"
    stopped = run(*ask, "-o", "stop", " star", "-u")
    assert stopped.stdout == "A red circle, a blue\n" and "Token usage: " in stopped.stderr
    said(*ask, "-o", "tiling", "never")
    tiled, _, alone = (row["input_tokens"] for row in logs())
    assert alone < tiled
    hot = (*ask, "-o", "temperature", "3")
    assert said(*hot, "-o", "seed", "5") == said(*hot, "-o", "seed", "5") != ANSWER


def test_schemas() -> None:
    """The demo model knows no JSON; what it says is of the schema all the same."""
    ask = (*MODEL, "Which colour is the circle?", "-a", SHAPES)
    assert json.loads(said(*ask, "--schema", '{"enum": ["blue", "red"]}')) == "red"
    count = {"type": "integer", "minimum": 0, "maximum": 9}
    schema = {"type": "object", "properties": {"count": count}, "required": ["count"]}
    closed = json.dumps({**schema, "additionalProperties": False})
    for way in ((), ("--no-stream",), ("--async",)):
        answer = json.loads(said(*ask, "--schema", closed, *way))
        assert list(answer) == ["count"] and answer["count"] in range(10)
    assert logs()[1]["schema_json"] == json.loads(closed)
    assert "schema" in refused(*ask, "--schema", '{"type": "nonsense"}')


def test_wrong_names_and_types(tmp_path: Path) -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    with Image.open(SHAPES) as shapes:
        shapes.save(tmp_path / "photo.heic", quality=90)
    shutil.copy(tmp_path / "photo.heic", tmp_path / "photo.mov")
    shutil.copy(CIRCLE, tmp_path / "film.png")
    question = "What is in the image?"
    # llm takes HEIC for a video.
    assert llm.Attachment(path=str(tmp_path / "photo.heic")).resolve_type() == "video/mp4"
    for name in ("photo.heic", "photo.mov"):
        assert said(*MODEL, question, "-a", tmp_path / name) == ANSWER
    assert said(*MODEL, question, "--at", tmp_path / "photo.heic", "video/mp4") == ANSWER
    how = "How does the circle move?"
    video = said(*MODEL, how, "--at", tmp_path / "film.png", "image/png", "-o", "num_frames", "8")
    assert video == "The circle moves from left to right."


def test_refusals_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello, I am no picture")
    (tmp_path / "broken.png").write_bytes(SHAPES.read_bytes()[:2000])
    ask = (*MODEL, "What is in the image?")
    # llm itself does not know what a text is.
    text = refused(*ask, "--at", tmp_path / "a.txt", "image/png")
    assert text.endswith("a.txt is neither an image nor a video; attach one in a usual format")
    assert "broken.png" in refused(*ask, "-a", tmp_path / "broken.png")
    assert refused(*MODEL, " ") == "the conversation is empty; ask something"
    window = (*ask, "-a", CIRCLE, "-o", "start", "9", "-o", "end", "3")
    assert refused(*window) == "end is 3 s, which is not after start, 9 s"
    missing = refused("-m", "onevision-7b", "hi")
    assert "is not in the cache" in missing and "unset it once to download" in missing
    assert "onevision-demo-joint" in refused("embed", "-m", "onevision-demo-vision", "-c", "hi")
    joint = ("embed", "-m", "onevision-demo-joint", "--binary", "-i")
    assert refused(*joint, tmp_path / "a.txt").startswith("the input is neither")


def test_vectors(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (SHAPES, SQUARE):
        shutil.copy(path, photos)
    with Image.open(SHAPES) as shapes:
        shapes.convert("RGB").resize((480, 320)).save(photos / "smaller.jpg")
    vision = ("-m", "onevision-demo-vision", "--binary")
    alone = json.loads(said("embed", *vision, "-i", SHAPES))
    assert abs(sum(x * x for x in alone) - 1) < 1e-5  # float32
    said("embed-multi", "photos", "--files", photos, "*", *vision)
    found = said("similar", "photos", "-i", SHAPES, "--binary").splitlines()
    rows = [json.loads(line) for line in found]
    assert [row["id"] for row in rows] == ["shapes.png", "smaller.jpg", "square.png"]
    assert rows[0]["score"] > rows[1]["score"] > 0.9 > rows[2]["score"]
    joint = ("-m", "onevision-demo-joint")
    texts = json.loads(said("embed", *joint, "-c", "a red circle"))
    assert len(texts) == len(json.loads(said("embed", *joint, "--binary", "-i", CIRCLE)))


def test_a_model_of_ones_own_and_ctrl_c(tmp_path: Path) -> None:
    """A random one, whose answers do not end."""
    folder = write(tmp_path / "mine")
    said("onevision", "add", folder, "--alias", "mine")
    assert f"onevision-mine: {folder} (aliases: mine)" in said("onevision", "list")
    assert said("-m", "mine", "hi", "-o", "max_tokens", "3")
    for way in ((), ("--async",)):
        endless = [LLM, "-m", "mine", "hi", "-o", "max_tokens", "30000", *way]
        asking = subprocess.Popen(
            endless,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A process that is started in the background ignores Ctrl-C, and hands that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert asking.stdout is not None
        assert asking.stdout.read(20)  # it has begun
        asking.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, err = asking.communicate(timeout=30)
        assert time.monotonic() - began < 10  # of the minute that the answer would take
        assert asking.returncode == 1 and err.decode().strip() == "Aborted!"
    said("onevision", "remove", "mine")
    assert "Unknown model" in refused("-m", "mine", "hi")


def test_as_a_library() -> None:
    """Several answers at once, sync and async, over the one loaded model."""

    async def several() -> list[str]:
        model = llm.get_async_model("onevision-demo")
        shown = [llm.Attachment(path=str(SHAPES))]
        conversation = model.conversation()
        first = conversation.prompt("How many shapes are there?", attachments=shown)
        pieces = [piece async for piece in first]
        assert len(pieces) > 1
        second = await conversation.prompt("Where is the star?").text()
        asked = [model.prompt("What is in the image?", attachments=shown) for _ in range(4)]
        return [second, *await asyncio.gather(*(one.text() for one in asked))]

    assert asyncio.run(several()) == ["The star is in the centre.", *[ANSWER] * 4]
    model = llm.get_model("onevision-demo")
    content = llm.Attachment(content=SHAPES.read_bytes())
    assert model.prompt("What is in the image?", attachments=[content]).text() == ANSWER


def test_the_program_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    page = Path("docs/llm.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(program, "docs/llm.md", "exec"), {})
    assert capsys.readouterr().out == "There are three shapes.\nThe star is in the centre.\n"
