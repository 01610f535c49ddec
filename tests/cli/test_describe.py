"""``mlx-onevision describe``: where results go, what is skipped, what fails and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pysubs2
import pytest
from checkpoints import write
from click.testing import CliRunner, Result
from videos import counting, written

from mlx_onevision.api import Model
from mlx_onevision.cli.main import cli
from mlx_onevision.describe.formats import FORMS
from mlx_onevision.describe.formats import write as to_text
from mlx_onevision.describe.pipeline import Captioner

SILENT = "Only the picture is described, not the sound.\n"
QUICK = ("--segments", "1", "--frames", "2", "--max-tokens", "4")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx-onevision" / "descriptions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return written(tmp_path / "clip.mp4", counting(75))


@pytest.fixture
def videos_folder(tmp_path: Path) -> Path:
    """A folder of videos, one of which is none."""
    videos_folder = tmp_path / "videos"
    videos_folder.mkdir()
    written(videos_folder / "a.mp4", counting(50))
    written(videos_folder / "b.mp4", b"dear diary\n" * 99)
    written(videos_folder / "c.mkv", counting(60, "mkv"))
    written(videos_folder / "notes.txt", b"not a video")
    written(videos_folder / ".hidden.mp4", b"")
    return videos_folder


def run(folder: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(
        cli, ["describe", "--model", str(folder), *QUICK, *map(str, arguments)]
    )


def test_one_video_goes_to_stdout_and_nothing_else_does(
    folder: Path, model: Model, clip: Path, home: Path
) -> None:
    expected = model.describe_video(clip, segments=1.0, num_frames=2, max_tokens=4)
    before = sorted(clip.parent.iterdir())
    for form in FORMS:
        done = run(folder, clip, "--format", form)
        assert (done.exit_code, done.stderr) == (0, SILENT)
        assert done.stdout_bytes.decode() == to_text(expected, form)
    assert run(folder, clip).stdout == to_text(expected, "text")
    assert len(list(home.iterdir())) == 1  # described once
    assert sorted({*clip.parent.iterdir()} - {clip.parent / "cache"}) == before


def test_one_video_to_a_file_in_the_form_that_its_name_says(
    folder: Path, clip: Path, tmp_path: Path
) -> None:
    target = written(tmp_path / "out.srt", b"old")
    done = run(folder, clip, "--output", target)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"{SILENT}{clip}: written to {target}\n"
    assert len(pysubs2.load(str(target))) == 3
    assert run(folder, clip, "--output", tmp_path / "out.md").exit_code == 0
    assert "## Segments" in (tmp_path / "out.md").read_text(encoding="utf-8")
    run(folder, clip, "--output", tmp_path / "out.x", "--format", "json")
    assert json.loads((tmp_path / "out.x").read_text(encoding="utf-8"))["duration"] == 3.0
    assert not list(tmp_path.glob(".*"))


def test_several_go_beside_themselves_and_one_that_fails_stops_no_other(
    folder: Path, videos_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(folder, videos_folder, "--format", "srt")
    assert (done.exit_code, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert lines[1] == f"{videos_folder / 'a.mp4'}: written to {videos_folder / 'a.srt'}"
    assert lines[2].startswith("error: ") and str(videos_folder / "b.mp4") in lines[2]
    assert lines[3] == f"{videos_folder / 'c.mkv'}: written to {videos_folder / 'c.srt'}"
    assert lines[4:] == ["1 of 3 could not be described."]
    assert [path.name for path in sorted(videos_folder.glob("*.srt"))] == ["a.srt", "c.srt"]

    def refuse(*_: object) -> None:
        raise AssertionError("what is done is done")

    edited = written(videos_folder / "a.srt", b"edited by hand")
    (videos_folder / "c.srt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "ask", refuse)
        again = run(folder, videos_folder, "--format", "srt").stderr.splitlines()
    a = f"{videos_folder / 'a.mp4'}: {edited} is there and differs from the description made before"
    assert again[1].startswith(f"{a}; it was left alone. Delete it")
    assert again[3] == f"{videos_folder / 'c.mkv'}: written to {videos_folder / 'c.srt'}"
    assert edited.read_bytes() == b"edited by hand"
    run(folder, videos_folder, "--format", "srt", "--force")
    assert len(pysubs2.load(str(edited))) == 2
    whole = run(folder, videos_folder, "--format", "srt").stderr.splitlines()
    assert whole[1] == f"{videos_folder / 'a.mp4'}: done before, in {videos_folder / 'a.srt'}"


def test_what_somebody_else_has_written_is_not_replaced(folder: Path, videos_folder: Path) -> None:
    subtitles = written(videos_folder / "a.srt", b"what they say")
    done = run(folder, videos_folder / "a.mp4", videos_folder / "c.mkv", "--format", "srt")
    assert done.exit_code == 1 and "--force" in done.stderr
    assert subtitles.read_bytes() == b"what they say" and (videos_folder / "c.srt").exists()


def test_several_into_a_folder(folder: Path, videos_folder: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "a.mov", counting(30, "mov"))
    target = tmp_path / "texts" / "new"
    done = run(folder, videos_folder / "a.mp4", other, videos_folder / "a.mp4", "--output", target)
    assert done.exit_code == 0
    assert [p.name for p in sorted(target.iterdir())] == ["a.mov.txt", "a.mp4.txt"]
    assert run(folder, other, "--output", target).exit_code == 0
    assert (target / "a.txt").exists()


def test_neither_two_videos_nor_a_video_and_a_text_have_one_file(
    folder: Path, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = written(tmp_path / "other" / "clip.mp4", counting(10))
    target = tmp_path / "out"
    same = run(folder, clip, other, "--output", target)
    assert same.exit_code == 2
    assert f"{clip} and {other} would both be written to {target / 'clip.mp4.txt'}" in same.stderr
    assert not target.exists()
    (tmp_path / "link.mp4").symlink_to(clip)
    (tmp_path / "named.txt").symlink_to(clip)
    before = clip.read_bytes()
    for arguments in (
        (clip, "--output", clip, "--format", "srt"),
        (clip, "--output", tmp_path / "link.mp4", "--format", "srt", "--force"),
        (tmp_path / "named.txt", other, "--force"),
    ):
        refused = run(folder, *arguments)
        assert refused.exit_code == 2 and "would replace the video" in refused.stderr
    assert clip.read_bytes() == before and (tmp_path / "named.txt").is_symlink()


def test_one_video_by_several_paths_is_described_once(
    folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(folder, "clip.mp4", "./clip.mp4", clip, tmp_path, "--output", "out/")
    assert done.exit_code == 0 and done.stderr.count("written to") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip.txt"]


def test_what_cannot_be_found_or_written_stops_no_other_video(
    folder: Path, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "other.txt").mkdir()
    data = "data:video/mp4;base64,AAAA/BBBB"
    done = run(folder, tmp_path / "typo/a.mp4", tmp_path / "other.mp4", data, clip)
    assert done.exit_code == 1 and "3 of 4 could not be described" in done.stderr
    assert f"{tmp_path / 'other.txt'} is a folder; rename it" in done.stderr
    assert clip.with_suffix(".txt").exists() and not (tmp_path / "typo").exists()


def test_two_names_of_a_folder_and_of_the_home_folder(
    folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = written(tmp_path / "clip.mov", counting(10, "mov"))
    (tmp_path / "link").symlink_to(tmp_path)
    same = run(folder, clip, tmp_path / "link" / other.name, "--force")
    assert same.exit_code == 2 and "would both be written to" in same.stderr
    monkeypatch.setenv("HOME", str(tmp_path))
    before = clip.read_bytes()
    refused = run(folder, "~/clip.mp4", "--output", clip, "--format", "srt")
    assert refused.exit_code == 2 and "would replace the video" in refused.stderr
    assert clip.read_bytes() == before


def test_a_video_by_its_address(folder: Path, clip: Path) -> None:
    done = run(folder, clip.as_uri())
    assert done.exit_code == 0 and done.stdout == run(folder, clip).stdout
    for text, said in (
        ("file://", "file:// names no file"),
        ("file://nas/a.mp4", "another machine"),
    ):
        refused = run(folder, text)
        assert refused.exit_code == 1 and said in refused.stderr


def test_where_it_is_kept(folder: Path, clip: Path, home: Path, tmp_path: Path) -> None:
    run(folder, clip, "--sidecar", tmp_path / "kept")
    assert not home.exists()
    (record,) = (tmp_path / "kept").iterdir()
    first = record.read_text(encoding="utf-8").splitlines()
    assert json.loads(first[0])["type"] == "describes"
    run(folder, clip, "--sidecar", tmp_path / "kept", "--frames", "3")
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["{clip}", "--segments", "shots"], 2, "neither scenes nor a number"),
        (["{clip}", "--output", "no/such/a.srt"], 2, "There is no folder no/such"),
        (["{clip}", "{clip}x", "--output", "{clip}"], 2, "several videos need a folder"),
        (["{home}"], 2, "There is no video in the folder"),
        (["http://host/a.mp4", "{clip}"], 2, "give --output FOLDER"),
        ([], 2, "VIDEO|FOLDER"),
        (["no/such.mp4"], 1, "error: 'no/such.mp4' does not exist"),
        (["{clip}", "--start", "9"], 1, "start is 9 s"),
        (["{clip}", "--frames", "0"], 2, "it must be a whole number, 1 or more, not '0'"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, clip: Path, tmp_path: Path, arguments: list[str], code: int, part: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"clip": clip, "home": tmp_path / "empty"}
    done = run(folder, *(argument.format(**places) for argument in arguments))
    assert (done.exit_code, done.stdout) == (code, "") and part in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_is_done(folder: Path, model: Model, clip: Path, home: Path) -> None:
    arguments = ("--segments", "0.1", "--frames", "2", "--max-tokens", "4", "--format", "json")
    command = [sys.executable, "-m", "mlx_onevision", "describe", "--model", str(folder)]
    process = subprocess.Popen(
        [*command, *arguments, str(clip)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A process that is started in the background ignores Ctrl-C, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if any(path.read_bytes().count(b"segment") > 3 for path in home.glob("*.jsonl")):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, ""), err
    assert "What is done is kept" in err and "Traceback" not in err
    (record,) = home.iterdir()
    described = record.read_bytes().count(b'"type": "segment"')
    assert 3 <= described < 30
    done = CliRunner().invoke(cli, [*command[3:], *arguments, str(clip)])
    assert len(json.loads(done.stdout)["segments"]) == 30
    assert record.read_bytes().count(b'"type": "segment"') == 30


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom mlx_onevision.cli.main import cli\n"
        "try: cli(['describe', '--help'])\n"
        "except SystemExit: pass\n"
        "print(*(m for m in ('mlx', 'av', 'numpy', 'mlx_lm', 'tqdm') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "not the sound" in done.stdout and done.stdout.splitlines()[-1] == "", done.stdout
