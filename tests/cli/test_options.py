"""The options that commands share: declared once, the same everywhere, and completed by shells."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import pytest
from checkpoints import write
from click.testing import CliRunner, Result
from PIL import Image
from videos import counting, written

from mlx_onevision import api
from mlx_onevision.__main__ import cli
from mlx_onevision.cli.options import LOADING, SAMPLING, TABLE
from mlx_onevision.cli.values import Number, Output
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.plugins.adapters import engine
from mlx_onevision.plugins.hosts.llm.commands import onevision

COMMANDS = {name: cli.load(name) for name in cli.commands}
COMMANDS["llm onevision add"] = onevision.commands["add"]
# Of the same name, and something else: how to train or to calibrate; layers of random weights or of
# an adapter; the Mac's memory; a file, a folder or both; numbers into a file.
HOMONYMS = {"--method", "--layers", "--memory", "--output", "--json", "--adapter"}
CONVERTS_OWN = {"--model", "--quantize"}


def given(command: click.Command) -> dict[str, click.Option]:
    found = [param for param in command.params if isinstance(param, click.Option)]
    return {flag: param for param in found for flag in param.opts}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)])


class Asked(Exception):
    """Ends a command where it would load its model."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What ``load`` is given by a command, which ends there."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def load(model: str, **options: Any) -> None:
        calls.append((model, options))
        raise Asked

    monkeypatch.setattr(api, "load", load)
    return calls


def test_an_option_of_two_commands_is_declared_once() -> None:
    takers: dict[str, list[click.Option]] = defaultdict(list)
    for name, command in COMMANDS.items():
        for flag, param in given(command).items():
            if flag not in HOMONYMS and not (name == "convert" and flag in CONVERTS_OWN):
                takers[flag].append(param)
    shared = {flag for flag, params in takers.items() if len(params) > 1}
    assert len(shared) >= 40
    for flag in shared - {"--debug"}:
        first = takers[flag][0]
        assert first.name is not None and flag in TABLE[first.name].names, flag
        for param in takers[flag]:
            assert (param.name, param.opts) == (first.name, list(TABLE[first.name].names)), flag
            if not isinstance(param.type, Number | Output):  # which may be narrower
                assert type(param.type) is type(first.type), flag
    assert {flag for option in TABLE.values() for flag in option.names} <= {
        *takers,
        *HOMONYMS,
    }


def test_every_command_with_a_model_loads_it_alike() -> None:
    for name in ("generate", "chat", "describe", "embed", "bench", "serve", "mcp"):
        assert {TABLE[one].names[0] for one in ("model", *LOADING)} <= given(COMMANDS[name]).keys()
    for name in ("generate", "chat", "describe", "serve", "mcp"):
        assert {TABLE[one].names[0] for one in SAMPLING} <= given(COMMANDS[name]).keys()
    assert {TABLE[one].names[0] for one in LOADING} <= given(COMMANDS["llm onevision add"]).keys()


@pytest.mark.parametrize("command", ["generate", "chat", "describe", "embed"])
def test_how_it_is_loaded_arrives(
    command: str, tmp_path: Path, loaded: list[tuple[Any, dict[str, Any]]]
) -> None:
    more = {
        "generate": ["-p", "x"],
        "describe": [tmp_path / "a.mp4"],
        "embed": [tmp_path / "a.png", "--jsonl"],
    }
    run(
        *(command, *more.get(command, []), "--model", "7b", "--quantize", "4", "--kv-bits", "8"),
        *("--dtype", "float16", "--revision", "main", "--memory-limit", "6", "--adapter", "mine"),
        *("--visual-tokens", "0.5"),
    )
    [(model, options)] = loaded
    options.pop("draft_model", None)
    assert callable(options.pop("progress"))  # of a bar
    assert model == "7b"
    assert options == {
        "quantize": 4,
        "kv_bits": 8,
        "dtype": "float16",
        "revision": "main",
        "memory_limit": 6.0,
        "adapter": "mine",
        "visual_tokens": 0.5,
    }


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--max-tokens", "0", "it must be a whole number, 1 or more, not '0'"),
        ("-m", "7b", "-m is --max-tokens, and a model is named by --model"),
        ("--temp", "-1", "it must be a number, 0 or more, not '-1'"),
        ("--temperature", "nan", "it must be a number, 0 or more, not 'nan'"),
        ("--top-p", "2", "it must be a number, above 0 and at most 1, not '2'"),
        ("--top-k", "-3", "it must be a whole number, 0 or more, not '-3'"),
        ("--presence-penalty", "3", "it must be a number, -2 or more and at most 2, not '3'"),
        ("--frames", "0", "it must be a whole number, 1 or more, not '0'"),
        ("--quantize", "5", "'5' is not one of '4', '8'"),
    ],
)
def test_a_value_out_of_range_is_said(option: str, value: str, said: str) -> None:
    done = run("generate", "--prompt", "x", option, value)
    assert done.exit_code == 2 and done.stdout == ""
    assert said in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--top-p 0.5", "--top-p: no effect on a greedy answer; add --temperature 0.7\n"),
        ("--top-k 3 --min-p 0.1 --temp 0", "--top-k and --min-p: no effect on a greedy "),
        ("--top-p 0.5 --temp 0.7", ""),
        ("--top-p 1 --top-k 0 --min-p 0", ""),  # all tokens, as without them
        ("", ""),
    ],
)
def test_filters_without_a_temperature_are_said_to_have_no_effect(
    words: str, said: str, tmp_path: Path
) -> None:
    sampling = ["--model", "demo", "-m", "2", *words.split()]
    video = written(tmp_path / "a.mp4", counting(9))
    for command in (
        ["generate", "-p", "x"],
        ["chat"],
        ["describe", str(video), "--force", "--sidecar", str(tmp_path), "--segments", "10"],
    ):
        done = CliRunner().invoke(cli, [*command, *sampling], input="x\n" * 2)
        assert done.exit_code == 0, done.output
        assert ("no effect" in done.stderr) == bool(said) and done.stderr.count(
            said[:40] or "~"
        ) < 2
        assert said in done.stderr


def test_filters_of_a_checkpoint_that_samples_by_itself_have_an_effect(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    done = run("generate", "-p", "x", "--model", folder, "-m", "2", "--top-p", "0.5")
    assert (done.exit_code, done.stderr) == (0, "")


def test_filters_of_a_server_are_said_to_need_a_temperature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its model is not loaded yet, and may sample by itself."""

    def asked(*_: Any, **__: Any) -> None:
        raise Asked

    monkeypatch.setattr(engine, "open_engine", asked)
    said = "--top-p: of effect on sampled answers only; add --temperature 0.7\n"
    arguments = ("serve", "--model", "demo", "--port", "0", "--top-p", "0.5")
    assert run(*arguments).stderr.startswith(said)
    assert said not in run(*arguments, "--temp", "1").stderr
    done = subprocess.run(
        [sys.executable, "-m", "mlx_onevision", "mcp", "--model", "demo", "--top-p", "0.5"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


# Several files.


class Model:
    """Keeps what it was asked, and ends there."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def stream(self, prompt: str, **options: Any) -> None:
        self.asked = {"prompt": prompt, **options}
        raise Asked

    def close(self) -> None:
        pass


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model()
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "images", "videos"),
    [
        ("--image a.png b.png -p Why?", ["a.png", "b.png"], []),
        ("-p Why? --image a.png b.png c", ["a.png", "b.png", "c"], []),
        ("--image=a.png b.png --image c -p Why?", ["a.png", "b.png", "c"], []),
        ("--image a.png typo.png -p Why?", ["a.png", "typo.png"], []),
        (
            "--image a.png https://x.example/b --temp 0 -p Why?",
            ["a.png", "https://x.example/b"],
            [],
        ),
        ("--video x.mp4 y.mov --image a.png -p Why?", ["a.png"], ["x.mp4", "y.mov"]),
    ],
)
def test_several_files_behind_one_option(
    model: Model, folder: Path, words: str, images: list[str], videos: list[str]
) -> None:
    run("generate", "--model", "demo", *words.split())
    assert (*model.asked["images"], "|", *model.asked["videos"]) == (*images, "|", *videos)
    assert model.asked["prompt"] == "Why?"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "a.png", "What is it?"], "No option takes 'What is it?'; files come behind"),
        (["--image", "a.png", "-p", "x", "b.png"], "No option takes 'b.png'"),
        (
            ["b.png", "-p", "x"],
            "No option takes 'b.png'; files come behind --image or --video, the",
        ),
        (["--image", "a.png", "-p", "x", "--", "b.png"], "No option takes 'b.png'"),
        (["--image", "--prompt", "x"], "--image needs a FILE behind it"),
        (["--image"], "--image needs a FILE behind it"),
    ],
)
def test_a_word_that_is_no_file_is_not_taken_for_one(
    model: Model, folder: Path, words: list[str], said: str
) -> None:
    done = run("generate", "--model", "demo", *words)
    assert done.exit_code == 2 and said in done.stderr, done.stderr
    assert not model.asked


# Names of what is written.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("describe a.mp4 --output a.docx", "does not end in .txt, .json, .jsonl, .srt, .vtt, .md"),
        ("describe a.mp4 --output texts", "or end a folder's name with a slash"),
        (
            "describe a.mp4 b.mp4 --output all.srt",
            "all.srt is a file; several videos need a folder",
        ),
        ("describe a.mp4 --output no/a.srt", "There is no folder no for --output"),
        ("embed a.png --output a.csv", "a.csv does not end in .npz"),
        ("embed a.png --output a", "a does not end in .npz"),
        ("embed a.png --output no/a.npz", "there is no folder no; make it first"),
        ("bench --size 0.5b --plot a.jpeg", "a.jpeg does not end in .png"),
        ("bench --size 0.5b --json a.csv", "a.csv does not end in .json"),
        ("convert demo --compare 4 --plot a.bmp", "a.bmp does not end in .png, .svg or .pdf"),
        (
            "train --model demo --data a --adapter b --report a.doc",
            "a.doc does not end in .png, .sv",
        ),
    ],
)
def test_an_ending_that_means_nothing_is_refused(folder: Path, words: str, said: str) -> None:
    before = sorted(folder.iterdir())
    done = run(*words.split())
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_folder_is_embedded(folder: Path) -> None:
    """Images and videos right in it, by name; ``c`` has an image's bytes and no image's name."""
    written(folder / "._a.png", b"what macOS leaves beside it")
    written(folder / "d.mp4", counting(9))
    done = run("embed", folder, "--model", "demo", "--output", "v.npz", "--frames", "2")
    assert (done.exit_code, done.output) == (0, "")
    names = [str(folder / name) for name in ("a.png", "b.png", "d.mp4")]
    assert list(Embeddings.load("v.npz").names) == names


# What a newcomer types.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("version", "There is no command 'version'; type mlx-onevision --version"),
        ("help", "There is no command 'help'; type mlx-onevision --help"),
        ("ask", "There is no command 'ask'; the commands are bench, chat, convert, describe"),
        ("a.png", "to ask about a file, type mlx-onevision generate --image a.png --prompt TEXT"),
        ("generate -p x --image .", "error: . is a folder; give files of it, as ./*.jpg"),
        ("generate -p x --frames 4", "--frames is about videos; add --video FILE, or drop it"),
        ("generate -p x --video d.mp4 --frames 4 --fps 2", "error: give either --frames or --fps"),
        ("generate -p x --prompt-cache no/x", "there is no folder no; make it first"),
        ("chat --image -", "The lines on stdin are messages; give an image or a video by name"),
        ("describe a.png", "it is an image, not a video; give it as an image (generate --image)"),
        ("serve --port http", "it must be a whole number, 0 or more and at most 65535, not 'http'"),
        ("convert demo --quantize 4", "--quantize takes no number here; give --q-bits 4"),
    ],
)
def test_what_cannot_be_done_is_said_in_options(folder: Path, words: str, said: str) -> None:
    written(folder / "d.mp4", counting(9))
    done = run(*words.split())
    assert done.exit_code in (1, 2) and done.stdout == ""
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_image_of_a_conversation_by_its_address(folder: Path) -> None:
    shown = CliRunner().invoke(
        cli,
        ["chat", "--image", (folder / "a.png").as_uri(), "b.png", "-m", "2"],
        input="What?\n",
    )
    assert shown.exit_code == 0 and shown.stdout.strip(), shown.stderr


# Shells.


def complete(instruction: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_onevision"],
        env={**os.environ, "_MLX_ONEVISION_COMPLETE": instruction, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def completed(line: str) -> list[str]:
    """What the shell offers for the last word of a line."""
    place = str(len(line.split(" ")) - 1)
    found = complete("bash_complete", COMP_WORDS=line, COMP_CWORD=place)
    return [offered.partition(",")[2] for offered in found.split()]


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_what_shells_read_to_complete(shell: str) -> None:
    script = complete(f"{shell}_source")
    assert "_MLX_ONEVISION_COMPLETE" in script and "mlx-onevision" in script
    if shell == "bash":
        done = subprocess.run(
            ["bash", "-c", 'eval "$1"; complete -p mlx-onevision', "bash", script],
            capture_output=True,
            encoding="utf-8",
        )
        assert done.stdout.endswith(" mlx-onevision\n"), done.stderr


def test_shells_complete_commands_options_values_and_files() -> None:
    assert completed("mlx-onevision des") == ["describe"]
    assert completed("mlx-onevision serve") == ["serve"]
    assert "--kv-bits" in completed("mlx-onevision generate --kv")
    assert completed("mlx-onevision generate --quantize ") == ["4", "8"]
    assert completed("mlx-onevision generate --model 7b") == ["7b"]
    assert completed("mlx-onevision generate --model ./x") == ["./x"]
    assert completed("mlx-onevision generate --image a.png ph") == ["ph"]  # as a file's name
