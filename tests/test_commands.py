"""The commands that the README, docs/ and every --help show: each is run here, on stand-ins for the
models, files, Hub and machines that it names; servers are asked once.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import llm.cli
import pytest
from click.testing import CliRunner
from crowding import CHAT, command
from fakehub import FakeHub
from huggingface_hub import constants
from mcp_clients import Piped
from PIL import Image
from videos import counting, written

from mlx_onevision.__main__ import cli
from mlx_onevision.bench import checkpoint, measure
from mlx_onevision.bench.checkpoint import Shape
from mlx_onevision.checkpoint import hub
from mlx_onevision.convert import verify
from mlx_onevision.convert.loss.probes import probes
from mlx_onevision.plugins.hosts.llm import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]
COMMAND = re.compile(
    r"(^ {4,}|^\$ |`)"  # a block, or in a sentence
    r"(mlx\.launch .*-- |claude .*-- )?"
    r"(?:\"\$\(which )?(mlx-onevision|llm)(?:\)\")? ([^`\n]*)",
    re.MULTILINE,
)
SHELL = re.compile(
    r"^ {4}((?:curl|cat|python -c|PYTHONPATH=\.) (?:.*<<END\n(?: {4}.*\n)+? {4}END|.*))$",
    re.MULTILINE,
)
SMALL = Shape(64, 2, 4, 2, 128, 152000, True, 64, 2, 4, 128, image_size=28)
TOKEN = "a-token-of-these-tests"
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
        alone = not self.launched or self.words == ["doctor"]
        own = self.program == "mlx-onevision" and alone
        elsewhere = self.words[0] in SERVERS or self.words[:2] in HUB
        return own and not elsewhere

    @property
    def shared(self) -> bool:
        """Whether several machines run it."""
        return self.launched and self.words[0] not in ("mcp", "doctor")

    @property
    def asked(self) -> bool:
        """Whether it serves, on this machine alone."""
        return self.words[0] in SERVERS and not self.shared


def shown() -> Iterator[Shown]:
    helps = [cli.load(name).help or "" for name in cli.commands]
    for page in [*(page.read_text(encoding="utf-8") for page in PAGES), *helps]:
        for place, launcher, program, rest in COMMAND.findall(page):
            words = shlex.split(rest.partition("  ")[0].partition(" < ")[0])
            named = place == "`" and not any(word.startswith("-") for word in words)
            if not named and not re.search(r"[A-Z]{4}", " ".join(words[:2])):
                yield Shown(program, words, bool(launcher))


SHOWN = {" ".join([one.program, *one.words]): one for one in shown()}
LLM = [line for line, one in SHOWN.items() if one.program == "llm"]
RUN = [line for line, one in SHOWN.items() if one.runs]
ASKED = [line for line, one in SHOWN.items() if one.asked]
APPLYING_LAST = sorted(RUN, key=lambda line: "--adapter" in SHOWN[line].words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is named."""
    place = tmp_path_factory.mktemp("place")
    for name in ("7b", "0.5b", "72b", "my-model", "7b-4bit"):
        (place / name).symlink_to(hub.EMBEDDED, target_is_directory=True)
    shutil.copytree(hub.EMBEDDED, place / "llava-onevision-7b-4bit")
    for folder in ("lmms-lab", "photos", "holidays", "videos", "Pictures", "Movies", "my-org"):
        (place / folder).mkdir()
    (place / "lmms-lab/LLaVA-Video-7B-Qwen2").symlink_to(hub.EMBEDDED, target_is_directory=True)
    (place / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    images = (
        "photo.jpg",
        "page.png",
        "a.png",
        "screenshot.png",
        "a.jpg",
        "photos/a.jpg",
        "one.jpg",
        "two.jpg",
        "picture.png",
    )
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
    measured by two prompts or by none, and one short row of a small network without its peers.
    """
    short = probes()[:2]
    monkeypatch.setattr(verify, "probes", lambda: short)
    monkeypatch.setattr(measure, "LONG_ENOUGH", 0.0)
    monkeypatch.setattr(checkpoint, "SIZES", dict.fromkeys(checkpoint.SIZES, SMALL))
    words = [word.replace("*", "a") for word in SHOWN[line].words]
    stdin = b"What?" if "--prompt" in words and words[words.index("--prompt") + 1] == "-" else b""
    if "--image" in words and words[words.index("--image") + 1] == "-":
        stdin = Path("photo.jpg").read_bytes()
    words += {
        "generate": ["--max-tokens", "8"],
        "convert": [] if "--compare" in words else ["--no-verify"],
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


def test_llm_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page: an alias is made before it is used, a question asked before the one
    that goes on. What is no more than options is asked a question through stdin.
    """
    monkeypatch.setattr(registry, "_backends", {})
    llm.set_default_model("onevision-demo")
    for line in LLM:
        words = [os.path.expanduser(word) for word in SHOWN[line].words]
        done = CliRunner().invoke(llm.cli.cli, words, input="What?")
        assert done.exit_code == 0, (line, done.output, done.exception)


@pytest.mark.parametrize("line", [line for line, one in SHOWN.items() if one.words[:2] in HUB])
def test_it_asks_the_hub(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, action, name = SHOWN[line].words
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    files = {
        path.name: path.read_bytes() for path in Path(hub.EMBEDDED).iterdir() if path.is_file()
    }
    with FakeHub() as fake:
        fake.add(hub.ALIASES[name], files)
        monkeypatch.setattr(hub, "resolve", partial(hub.resolve, endpoint=fake.url))
        for word in dict.fromkeys(["pull", action]):
            sure = ["--yes"] if word == "rm" else []  # as one says on a terminal
            done = CliRunner().invoke(cli, ["models", word, name, *sure])
            assert done.exit_code == 0, done.output
    listed = CliRunner().invoke(cli, ["models"]).output
    assert (hub.ALIASES[name] in listed) == (action == "pull")


@pytest.mark.parametrize("line", [line for line, one in SHOWN.items() if one.shared])
def test_it_runs_on_several_machines(
    line: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks of this one, as its launcher starts them."""
    monkeypatch.setenv("MLX_ONEVISION_API_KEY", TOKEN)
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1] % 20_000 + 10_000  # outside of those that systems give out
    launcher = str(Path(sys.executable).with_name("mlx.launch"))
    options = ["--hostfile", str(tmp_path / "hosts.json"), "--starting-port", str(port)]
    program = [launcher, *options, "--", str(Path(sys.executable).with_name("mlx-onevision"))]
    name, *words = on_stand_ins(SHOWN[line].words, place)
    if name == "serve":
        with command(*words, program=program) as (server, client):
            body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
            allowed = {"Authorization": f"Bearer {TOKEN}"}
            assert client.ask("POST", CHAT, body, allowed).status == 200
            server.terminate()
            server.wait(20)
        return
    done = subprocess.run(
        [sys.executable, *program, name, *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for option in {"--output"} & {*words}:
        assert Path(words[words.index(option) + 1]).exists()


@pytest.mark.parametrize(
    "block", [block for page in PAGES for block in SHELL.findall(page.read_text(encoding="utf-8"))]
)
def test_the_shell_runs_it(block: str, place: Path) -> None:
    """What stands in a shell: a server there is one of the demo model."""
    block = block.replace("\n    ", "\n").replace("--count 12 ", "--count 1 ")
    block = block.replace("-m onevision-7b", "-m onevision-demo")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with ExitStack() as open_:
        if "127.0.0.1:8000" in block:
            _, client = open_.enter_context(command("--model", "demo"))
            block = block.replace(":8000", f":{client.port}")
        done = subprocess.run(
            ["sh", "-c", block],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            cwd=place,
        )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert '"error"' not in done.stdout
