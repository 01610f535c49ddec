"""The Quick Action among the examples, in the shells that run it, on the demo model. The clipboard
and notifications of a Mac are programs, and so are those that stand in for them here.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "quick_action.sh"
COMMAND = Path(sys.executable).with_name("mlx-onevision")
SHAPES = "A red circle, a blue star and an orange triangle."


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "my files"
    folder.mkdir()
    shutil.copy(EXAMPLES / "shapes.png", folder / "it's $HOME.PNG")
    shutil.copy(EXAMPLES / "circle.mp4", folder / "film.MP4")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def mac(tmp_path: Path) -> Path:
    """A folder of programs that keep what they get."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, line in (("pbcopy", "cat"), ("osascript", "printf '%s|' \"$@\"")):
        program = folder / name
        program.write_text(f"#!/bin/sh\n{line} >'{tmp_path}/{name}.out'\n")
        program.chmod(0o755)
    return folder


def run(shell: str, *files: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    before = f"{path}:" if path else ""
    environment = {
        **os.environ,
        "PATH": f"{before}{os.environ['PATH']}",
        "ONEVISION_COMMAND": str(COMMAND),
        "ONEVISION_MODEL": "demo",
        "ONEVISION_QUESTION": "What is in the image?",
    }
    return subprocess.run(
        [shell, SCRIPT, *files], capture_output=True, encoding="utf-8", env=environment, timeout=120
    )


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_in_a_shell(files: Path, shell: str) -> None:
    assert subprocess.run([shell, "-n", SCRIPT]).returncode == 0
    chosen = [files / name for name in ("it's $HOME.PNG", "broken.png", "film.MP4")]
    done = run(shell, *chosen)
    assert done.returncode == 1
    assert files.joinpath("it's $HOME.PNG.txt").read_text() == f"{SHAPES}\n"
    video = files.joinpath("film.MP4.txt").read_text()
    assert "circle" in video and "0:00:00" in video
    assert not files.joinpath("broken.png.txt").exists()
    assert done.stdout == f"it's $HOME.PNG\n{SHAPES}\n\nfilm.MP4\n{video}\n"
    problem, summary = done.stderr.splitlines()
    assert "broken.png" in problem and summary == "2 described, 1 not"
    # What is there is left alone.
    files.joinpath("it's $HOME.PNG.txt").write_text("mine")
    again = run(shell, chosen[0])
    assert again.returncode == 1 and "is there already" in again.stderr
    assert files.joinpath("it's $HOME.PNG.txt").read_text() == "mine"


def test_with_the_programs_of_a_mac(files: Path, mac: Path, tmp_path: Path) -> None:
    done = run("sh", files / "it's $HOME.PNG", path=mac)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert tmp_path.joinpath("pbcopy.out").read_text() == f"it's $HOME.PNG\n{SHAPES}\n\n"
    told = tmp_path.joinpath("osascript.out").read_text().split("|")
    assert told[-2] == "1 described" and "display notification said" in told[3]
