"""The commands that the README, docs/ and every --help show: each is run here, on stand-ins for the
models and files that it names; servers are asked once. Those that measure for minutes or need the
Hub or several machines are read by the command's own parser only, and run by the tests beside their
subject.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import llm.cli
import pytest
from click.testing import CliRunner
from crowding import command
from mcp_clients import Piped
from PIL import Image
from videos import counting, written

from mlx_onevision.__main__ import cli
from mlx_onevision.bench import checkpoint
from mlx_onevision.bench.checkpoint import Shape
from mlx_onevision.checkpoint import hub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]
COMMAND = re.compile(
    r"(^ {4,}|^\$ |`)"  # a block, or in a sentence
    r"(mlx\.launch .*-- |claude .*-- )?"
    r"(?:\"\$\(which )?(mlx-onevision|llm)(?:\)\")? ([^`\n]*)",
    re.MULTILINE,
)
SMALL = Shape(64, 2, 4, 2, 128, 152000, True, 64, 2, 4, 128, image_size=28)
SERVERS = ("serve", "mcp")
HUB = (["models", "pull"], ["models", "rm"])


@dataclass(frozen=True)
class Shown:
    """program : mlx-onevision or llm. words : behind it, without what is said of it. launched : by
    another program.
    """

    program: str
    words: list[str]
    launched: bool

    @property
    def runs(self) -> bool:
        measured = {"--compare", "fit"} & {*self.words}
        alone = not self.launched or self.words == ["doctor"]
        own = self.program == "mlx-onevision" and alone
        elsewhere = self.words[0] in SERVERS or self.words[:2] in HUB
        return own and not elsewhere and not measured

    @property
    def asked(self) -> bool:
        """Whether it serves, on this machine alone."""
        return self.words[0] in SERVERS and not (self.launched and self.words[0] == "serve")


def shown() -> Iterator[Shown]:
    helps = [cli.load(name).help or "" for name in cli.commands]
    for page in [*(page.read_text(encoding="utf-8") for page in PAGES), *helps]:
        for place, launcher, program, rest in COMMAND.findall(page):
            words = shlex.split(rest.partition("  ")[0].partition(" < ")[0])
            named = place == "`" and not any(word.startswith("-") for word in words)
            if not named and not re.search(r"[A-Z]{4}", " ".join(words[:2])):
                yield Shown(program, words, bool(launcher))


SHOWN = {" ".join([one.program, *one.words]): one for one in shown()}
RUN = [line for line, one in SHOWN.items() if one.runs]
ASKED = [line for line, one in SHOWN.items() if one.asked]
APPLYING_LAST = sorted(RUN, key=lambda line: "--adapter" in SHOWN[line].words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is named."""
    place = tmp_path_factory.mktemp("place")
    for name in ("7b", "0.5b", "72b", "my-model", "7b-4bit", "llava-onevision-7b-4bit"):
        (place / name).symlink_to(hub.EMBEDDED, target_is_directory=True)
    for folder in ("lmms-lab", "photos", "holidays", "videos", "Pictures", "Movies", "my-org"):
        (place / folder).mkdir()
    (place / "lmms-lab/LLaVA-Video-7B-Qwen2").symlink_to(hub.EMBEDDED, target_is_directory=True)
    (place / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    images = ("photo.jpg", "page.png", "a.jpg", "photos/a.jpg", "one.jpg", "two.jpg", "picture.png")
    for name in (*images, "part.jpg", "photo.heic"):
        Image.new("RGB", (40, 30), "red").save(place / name, "PNG")
    for name in (
        "film.mp4",
        "video.mp4",
        "clip.mp4",
        "holiday.mp4",
        "holidays/a.mp4",
        "videos/a.mp4",
    ):
        written(place / name, counting(9))
    (place / "my-adapter").symlink_to(place / "mine", target_is_directory=True)
    (place / "schema.json").write_text('{"enum": ["red", "blue"]}')
    said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A heart."}]
    row = json.dumps({"messages": said, "images": ["a.jpg"]})
    (place / "parts").mkdir()
    Image.new("RGB", (40, 30), "red").save(place / "parts/a.jpg")
    for name in ("rows.jsonl", "parts.jsonl", "parts/train.jsonl"):
        (place / name).write_text(f"{row}\n")
    return place


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("LLM_USER_PATH", str(place / "llm"))
    monkeypatch.setattr(hub, "ALIASES", {})  # the sizes are folders here


def parse(program: str, words: list[str]) -> None:
    """Raises what a command reports of wrong usage."""
    group: Any = cli if program == "mlx-onevision" else llm.cli.cli
    context: click.Context = group.make_context(program, list(words))
    while isinstance(context.command, click.Group) and (
        rest := [*context._protected_args, *context.args]
    ):
        name, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def test_there_are_many() -> None:
    assert len(SHOWN) > 45 and len(RUN) > 20
    own = {one.words[0] for one in SHOWN.values() if one.program == "mlx-onevision"}
    assert own >= {*cli.commands}


@pytest.mark.parametrize("line", SHOWN)
def test_its_options_are_there(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = SHOWN[line]
    if one.launched:
        monkeypatch.setenv("MLX_RANK", "0")
    with suppress(click.exceptions.Exit):  # --version
        parse(one.program, [os.path.expanduser(word) for word in one.words])


@pytest.mark.parametrize("line", APPLYING_LAST)
def test_it_runs(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that train before those that apply an adapter; with short answers, conversions that are
    not measured, and one short row of a small network without its peers.
    """
    monkeypatch.setattr(checkpoint, "SIZES", dict.fromkeys(checkpoint.SIZES, SMALL))
    words = [word.replace("*", "a") for word in SHOWN[line].words]
    stdin = b"What?" if "--prompt" in words and words[words.index("--prompt") + 1] == "-" else b""
    if "--image" in words and words[words.index("--image") + 1] == "-":
        stdin = Path("photo.jpg").read_bytes()
    words += {
        "generate": ["--max-tokens", "8"],
        "convert": ["--no-verify"],
        "bench": ["--runs", "1", "--max-tokens", "2", "--rows", "batch", "--versus", ""],
    }.get(words[0], [])
    done = CliRunner().invoke(cli, words, input=stdin)
    assert done.exit_code == 0, done.output
    for option in {"--output", "--json", "--plot"} & {*words}:
        written = words[words.index(option) + 1 :]
        assert (option == "--json" and words[0] != "bench") or Path(written[0]).exists()


def on_stand_ins(words: list[str], place: Path) -> list[str]:
    """For a process of its own: models are the folders, an adapter is left out."""
    if "--adapter" in words:
        at = words.index("--adapter")
        words = words[:at] + words[at + 2 :]
    words = [os.path.expanduser(word) for word in words]
    words = [
        f"./{word}" if (place / word).is_dir() and os.sep not in word else word for word in words
    ]
    return words if "--model" in words else [*words, "--model", "demo"]


@pytest.mark.parametrize("line", ASKED)
def test_it_serves_and_ends(line: str, place: Path, tmp_path: Path) -> None:
    name, *words = on_stand_ins(SHOWN[line].words, place)
    if name == "serve":
        with command(*words, "--port", "0") as (server, client):
            assert client.chat("What?", max_tokens=2).status == 200
            server.terminate()
            assert server.wait(10) == 0
        return
    program = [sys.executable, "-m", "mlx_onevision", name, *words]
    with Piped(program, tmp_path / "log") as server:
        server.begin()
        folder = words[words.index("--allow-dir") + 1]
        Image.new("RGB", (40, 30), "red").save(f"{folder}/a.png")
        call = server.call("ask_image", path=f"{folder}/a.png", question="What?", max_tokens=2)
        assert not server.waited(call)["result"].get("isError")
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.process.wait(10) == 0
