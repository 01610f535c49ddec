"""The commands that the README and docs/ show: each is run here, on stand-ins for the models and
files that it names. Those that serve, measure for minutes or need the Hub or several machines are
read by the command's own parser only, and run by the tests beside their subject.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import llm.cli
import pytest
from click.testing import CliRunner
from PIL import Image
from videos import counting, written

from mlx_onevision.__main__ import cli
from mlx_onevision.checkpoint import hub

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]
COMMAND = re.compile(
    r"(^ {4,}|^\$ |`)"  # a block, or in a sentence
    r"(mlx\.launch .*-- |claude .*-- )?"
    r"(?:\"\$\(which )?(mlx-onevision|llm)(?:\)\")? ([^`\n]*)",
    re.MULTILINE,
)
PARSED = ("serve", "mcp", "bench", "doctor", "models", "--version")


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
        own = self.program == "mlx-onevision" and not self.launched
        return own and self.words[0] not in PARSED and not measured


def shown() -> Iterator[Shown]:
    for page in PAGES:
        for place, launcher, program, rest in COMMAND.findall(page.read_text(encoding="utf-8")):
            words = shlex.split(rest.partition("  ")[0])
            named = place == "`" and not any(word.startswith("-") for word in words)
            if not named and not re.search(r"[A-Z]{4}", " ".join(words[:2])):
                yield Shown(program, words, bool(launcher))


SHOWN = {" ".join([one.program, *one.words]): one for one in shown()}
RUN = [line for line, one in SHOWN.items() if one.runs]
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
    for name in ("film.mp4", "video.mp4", "holidays/a.mp4", "videos/a.mp4"):
        written(place / name, counting(9))
    (place / "my-adapter").symlink_to(place / "mine", target_is_directory=True)
    (place / "schema.json").write_text('{"enum": ["red", "blue"]}')
    said = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "A heart."}]
    row = json.dumps({"messages": said, "images": ["a.jpg"]})
    for name in ("rows.jsonl", "parts.jsonl"):
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
        parse(one.program, one.words)


@pytest.mark.parametrize("line", APPLYING_LAST)
def test_it_runs(line: str) -> None:
    """Those that train before those that apply an adapter; with short answers, and conversions that
    are not measured.
    """
    words = [word.replace("*", "a") for word in SHOWN[line].words]
    words += {"generate": ["--max-tokens", "8"], "convert": ["--no-verify"]}.get(words[0], [])
    done = CliRunner().invoke(cli, words, input="")
    assert done.exit_code == 0, done.output
    if "--output" in words:
        assert Path(words[words.index("--output") + 1]).exists()
