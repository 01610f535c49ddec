"""The README and the pages with options: their Python runs, the first answer is the demo model's,
and the options exist.
"""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write

from mlx_onevision import Model
from mlx_onevision.__main__ import cli
from mlx_onevision.checkpoint import hub
from mlx_onevision.plugins.discovery import GROUP

ROOT = Path(__file__).parents[1]
README, COMMANDS, PYTHON, CONVERTING = (
    ROOT.joinpath(name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/command-line.md", "docs/python.md", "docs/converting.md")
)


def blocks(page: str, language: str) -> list[str]:
    """A page's code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_what_security_names_is_there() -> None:
    text = ROOT.joinpath("SECURITY.md").read_text(encoding="utf-8")
    options = {
        option for name in cli.commands for param in cli.load(name).params for option in param.opts
    }
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options
    files = re.findall(r"`(tests/[^`]*)`", text)
    assert files and all(ROOT.joinpath(file).exists() for file in files)


def test_its_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks as one program, with a random model in the demo model's place."""
    monkeypatch.setattr(hub, "EMBEDDED", write(tmp_path / "demo"))
    monkeypatch.chdir(ROOT)
    program = blocks(README, "python")
    assert len(program) == 2
    names: dict[str, object] = {}
    for block in program:
        exec(compile(block, "README.md", "exec"), names)
        assert capsys.readouterr().out.strip()


def test_its_first_answer_is_the_demo_models() -> None:
    command, answer = blocks(README, "console")[0].splitlines()
    words = shlex.split(command.removeprefix("$ "))
    assert words[0] == "mlx-onevision"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_onevision", *words[1:]],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, answer + "\n"), done.stderr
    makefile = ROOT.joinpath("Makefile").read_text(encoding="utf-8")
    assert command.removeprefix("$ ") in makefile


def test_it_names_every_option_and_no_other() -> None:
    command = cli.load("generate")
    options = {o for param in command.params for o in (*param.opts, *param.secondary_opts)}
    table = COMMANDS.partition("| option |")[2].partition("\n\n")[0]
    named = {word for cell in re.findall(r"`(--?[a-z].*?)`", table) for word in cell.split()[:1]}
    assert named == options - {"--help", "-h"}


@pytest.mark.parametrize("name", ["embed", "describe"])
def test_it_names_every_option_of_a_command_and_no_other(name: str) -> None:
    options = {option for param in cli.load(name).params for option in param.opts}
    table = COMMANDS.partition(f"| `{name}` |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(--?[a-z-]+)", table))
    assert named == {option for option in options if option.startswith("-")}


def test_it_names_every_option_of_convert_and_no_other() -> None:
    params = cli.load("convert").params
    options = {option for param in params for option in (*param.opts, *param.secondary_opts)}
    table = CONVERTING.partition("| `convert MODEL [FOLDER]` |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(--?[a-z-]+)", table))
    assert named == {option for option in options if option.startswith("-")}


def test_it_names_every_alias() -> None:
    for size, repository in hub.ALIASES.items():
        assert f"| `{size}` | [{repository}](" in README


def test_what_it_names_of_the_package_is_there() -> None:
    named = set(re.findall(r"`(mlx_onevision(?:\.\w+)+)`", PYTHON)) - {GROUP}
    assert len(named) > 5
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    table = PYTHON.partition("| transformers | here |")[2].partition("\n\n")[0]
    for name in re.findall(r"`(?:model|processor)\.(\w+)", table.replace("\n", "")):
        assert hasattr(Model, name) or name in ("config", "apply_chat_template", "batch_decode"), (
            name
        )


def test_the_files_of_the_architecture_are_there() -> None:
    """Those that the page names, among which are all of its drawing."""
    named, drawn = (
        set(
            re.findall(r"[a-z_/]+\.py\b", ROOT.joinpath(f"docs/{file}").read_text(encoding="utf-8"))
        )
        for file in ("architecture.md", "architecture.svg")
    )
    assert drawn < named and len(drawn) == 22
    assert not [name for name in named if not ROOT.joinpath("mlx_onevision", name).is_file()]


def test_every_page_is_in_the_index() -> None:
    docs = ROOT / "docs"
    index = docs.joinpath("index.md").read_text(encoding="utf-8").split()
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    assert pages - {"index"} == pages & {*index}


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("https://") or (ROOT / path).exists(), path
