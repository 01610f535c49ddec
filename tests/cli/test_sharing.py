"""A folder under ``mlx.launch``: ranks share it out, one may be killed, no file is done twice."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write
from click.testing import CliRunner
from PIL import Image
from videos import counting, encode_video, written

from mlx_onevision.cli.embed import portions
from mlx_onevision.cli.main import cli
from mlx_onevision.cli.ranks import share_files, work_of
from mlx_onevision.distributed import World, world
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.files import claim, seconds_of_mp4

PROGRAM = [sys.executable, "-m", "mlx_onevision"]
LAUNCHER = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--", *PROGRAM]
RANK_0 = {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1"}
SMALL = ("--frames", "2", "--max-tokens", "4", "--segments", "0.3", "--format", "json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one that is none, twenty-three images and one that is none."""
    folder = tmp_path_factory.mktemp("library")
    for number, frames in enumerate((40, 60, 30)):
        written(folder / f"{number}.mp4", counting(frames))
    written(folder / "no.mp4", b"dear diary\n" * 99)
    rng = np.random.default_rng(1)
    for number in range(23):
        size = (20 + 9 * number, 200 - 8 * number, 3)
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder / f"{number}.png")
    written(folder / "no.jpg", b"not an image")
    return folder


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records are: in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx-onevision"


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(command: list[str], *arguments: str | Path, rank: str = "") -> subprocess.Popen[str]:
    """The launcher, or one rank of two, by hand."""
    environment = os.environ | (RANK_0 | {"MLX_RANK": rank} if rank else {})
    pipe = subprocess.PIPE
    command = [*command, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.005)


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    rows = (line.split() for line in listed.splitlines()[1:])
    return [int(pid) for pid, parent in rows if int(parent) == process.pid]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def done_twice(folder: Path) -> list[str]:
    """Segments and descriptions that are in a record more than once, or in none."""
    wrong = []
    for path in folder.iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        marks = [(row["type"], row.get("index"), row.get("question")) for row in rows]
        if len(set(marks)) < len(marks) or ("description", None, None) not in marks:
            wrong.append(f"{path.name}: {marks}")
    return wrong


def described(kept: Path) -> tuple[int, int]:
    """Videos that are described, and those of which two segments are."""
    records = [path.read_bytes() for path in (kept / "descriptions").glob("*.jsonl")]
    done = [b'"type": "description"' in record for record in records]
    return sum(done), sum(r.count(b'"segment"') > 1 for r in records) - sum(done)


def test_a_killed_rank_of_a_described_folder_and_the_same_command_again(
    checkpoint: Path,
    library: Path,
    kept: Path,
    tmp_path: Path,
    running: list[subprocess.Popen[str]],
) -> None:
    model = ("--model", checkpoint, *SMALL)
    one = ["describe", library, *model, "--output", tmp_path / "one", "--sidecar", tmp_path / "s"]
    assert CliRunner().invoke(cli, list(map(str, one))).exit_code == 1  # of no.mp4
    command = ["describe", library, *model, "--output", tmp_path / "all"]
    launched = start(LAUNCHER, *command)
    running.append(launched)
    wait(lambda: described(kept)[1] > 0, launched)  # one is under way
    _, victim = children(launched)
    os.kill(victim, signal.SIGKILL)
    _, err = launched.communicate(timeout=60)
    assert "Node with rank" in err
    assert described(kept)[0] < 3

    again = subprocess.run(
        [*LAUNCHER, *map(str, command)], capture_output=True, text=True, timeout=60, input=""
    )
    assert contents(tmp_path / "all") == contents(tmp_path / "one"), again.stderr
    assert len(contents(tmp_path / "all")) == len(contents(kept / "descriptions")) == 3
    assert done_twice(kept / "descriptions") == []
    lines = again.stderr.splitlines()
    assert sum(line.startswith("error: ") and "no.mp4" in line for line in lines) == 1
    assert "3 of 4 are described." in lines and "1 of 4 could not be described." in lines


def test_rank_0_takes_over_what_a_killed_one_had(
    checkpoint: Path,
    library: Path,
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: list[subprocess.Popen[str]],
) -> None:
    command = ["describe", library, "--model", checkpoint, *SMALL, "--output", tmp_path / "all"]
    other = start(PROGRAM, *command, rank="1")
    running.append(other)
    wait(lambda: described(kept)[1] == 1, other)
    other.send_signal(signal.SIGSTOP)  # it has a video, and is not done with it
    before = described(kept)[0]

    def kill() -> None:
        wait(lambda: described(kept)[0] > 1, other)
        other.kill()

    for name, value in RANK_0.items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        done = CliRunner().invoke(cli, list(map(str, command)))
        killed.result()
    assert before < 2 and done.exit_code == 1 and "3 of 4 are described." in done.stderr
    assert len(contents(tmp_path / "all")) == 3 and done_twice(kept / "descriptions") == []


def test_a_killed_rank_of_an_embedded_folder_and_the_same_command_again(
    checkpoint: Path,
    library: Path,
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    running: list[subprocess.Popen[str]],
) -> None:
    options = (library, "--model", checkpoint, "--space", "joint", "--text", "a circle")
    options = [*map(str, options), "--frames", "2"]
    alone = CliRunner().invoke(cli, ["embed", *options, "--jsonl"])
    assert alone.exit_code == 1 and alone.stdout.count("\n") == 27

    def parts() -> dict[str, int]:
        paths = (kept / "vectors").glob("*.npz")
        return {path.name: path.stat().st_mtime_ns for path in paths if path.stat().st_size}

    command = ["embed", *options, "--output", str(tmp_path / "all.npz")]
    running += [start(PROGRAM, *command, rank=rank) for rank in "01"]
    wait(lambda: len(parts()) > 0, running[1])
    for process, number in zip(running, (signal.SIGTERM, signal.SIGKILL), strict=True):
        process.send_signal(number)
        process.wait()
    before = parts()
    assert 0 < len(before) < 3 and not (tmp_path / "all.npz").exists()

    # Without the launcher, which keeps a core busy from the end of one rank to that of the other.
    again = [start(PROGRAM, "embed", *options, "--jsonl", rank=rank) for rank in "01"]
    running += again
    (out, err), (others_out, _) = (process.communicate(timeout=60) for process in again)
    assert (out, others_out) == (alone.stdout, ""), err
    assert before.items() <= parts().items() and len(parts()) == 3  # 29 items
    assert "2 of 29 could not be embedded." in err.splitlines()
    for name, value in RANK_0.items():
        monkeypatch.setenv(name, value)
    done = parts()
    CliRunner().invoke(cli, command)
    assert parts() == done
    written_by_one = [json.loads(line) for line in alone.stdout.splitlines()]
    joined = Embeddings.load(tmp_path / "all.npz")
    assert joined.names == tuple(row["name"] for row in written_by_one)
    assert joined.vectors.tolist() == [row["vector"] for row in written_by_one]


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
def test_the_work_on_a_video_goes_by_its_length(tmp_path: Path, kind: str) -> None:
    """Where its header says that, and else by its size."""
    noise = np.random.default_rng(0).integers(0, 255, (10, 96, 96, 3), np.uint8)
    short = written(tmp_path / f"short.{kind}", encode_video(list(noise), kind, rate=10))
    long = written(tmp_path / f"long.{kind}", counting(120, kind, rate=10))
    assert short.stat().st_size > long.stat().st_size
    if kind == "mkv":
        assert work_of(str(short)) > work_of(str(long)) > 0
    else:
        assert work_of(str(short)) == pytest.approx(1) and work_of(str(long)) == pytest.approx(12)
    data = short.read_bytes()
    for cut in (b"", data[:7], data[:50], data[: len(data) // 2], data.replace(b"mvhd", b"free")):
        path = written(tmp_path / "cut", cut)
        assert work_of(str(path)) == len(cut) / 1e6
    assert work_of(str(tmp_path / "none")) == work_of("http://host/a.mp4") == work_of({}) == 0


def test_headers_of_mp4_in_other_forms() -> None:
    def box(kind: bytes, data: bytes, wide: bool = False) -> bytes:
        size = (8 + 8 * wide + len(data)).to_bytes(8 if wide else 4, "big")
        return b"\0\0\0\1" + kind + size + data if wide else size + kind + data

    later = b"\1\0\0\0" + bytes(16) + (600).to_bytes(4, "big") + (1500).to_bytes(8, "big")
    whole = box(b"ftyp", b"isom") + box(b"mdat", bytes(99), wide=True)
    whole += box(b"moov", box(b"udta", b"?") + box(b"mvhd", later))
    assert seconds_of_mp4(io.BytesIO(whole)) == 2.5
    in_parts = whole.replace((1500).to_bytes(8, "big"), bytes(8))  # whose header knows no length
    endless = box(b"ftyp", b"isom") + b"\0\0\0\1free" + bytes(8)
    for data in (in_parts, endless, whole[16:], box(b"ftyp", b"") * 2000):
        assert seconds_of_mp4(io.BytesIO(data)) is None


def test_a_folder_is_shared_out_by_its_address_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_onevision.cli.ranks.world", lambda: World(1, 2))
    for given in (str(tmp_path), tmp_path.as_uri()):
        assert share_files(["a.mp4", given], None) == World(1, 2)
    assert share_files(["a.mp4"], None) == World()


def test_portions_begin_with_the_largest_and_hold_whole_groups(tmp_path: Path) -> None:
    files = [str(written(tmp_path / f"{n}.jpg", b"x" * (n // 10))) for n in range(404)]
    parts = portions([*files, {"type": "text", "text": "a circle"}])
    assert parts[0] == [*range(390, 400), *range(380, 390), *range(370, 380), *range(360, 370)]
    assert [len(part) for part in parts[:3]] == [40, 40, 40] and parts[-2:] == [
        list(range(10)),
        list(range(400, 405)),
    ]
    assert sorted(place for part in parts for place in part) == list(range(405))
    assert portions([]) == []


@pytest.mark.parametrize(
    ("environment", "hosts", "expected"),
    [
        ({}, None, World()),
        (
            {f"OMPI_COMM_WORLD_{name}": "2" for name in ("RANK", "LOCAL_SIZE")}
            | {"OMPI_COMM_WORLD_SIZE": "4"},
            None,
            World(2, 4, False),
        ),
        ({"MLX_RANK": "0"}, "", World()),  # mlx.launch -n 1
        ({"MLX_RANK": "1"}, [["127.0.0.1:1"], ["127.0.0.1:2"]], World(1, 2, True)),
        ({"MLX_RANK": "1"}, [["10.0.0.1:1", "10.0.1.1:2"], ["10.0.0.2:1"]], World(1, 2, False)),
        (
            {"MLX_RANK": "3", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "127.0.0.1"},
            None,
            World(3, 4, True),
        ),
        (
            {"MLX_RANK": "3", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.1.1.1"},
            None,
            World(3, 4, False),
        ),
    ],
)
def test_what_the_launcher_says(
    environment: dict[str, str],
    hosts: object,
    expected: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith(("MLX_", "NCCL_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if hosts is not None:
        text = json.dumps(hosts) if hosts else "\n"
        monkeypatch.setenv("MLX_HOSTFILE", str(written(tmp_path / "hosts", text.encode())))
    assert world() == expected


def test_what_ranks_cannot_do_is_said(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str | Path, ip: str = "127.0.0.1") -> str:
        monkeypatch.setenv("MLX_RANK", "1")
        monkeypatch.setenv("MLX_WORLD_SIZE", "2")
        monkeypatch.setenv("NCCL_HOST_IP", ip)
        done = CliRunner().invoke(cli, list(map(str, arguments)))
        assert done.exit_code == 2 and not done.stdout
        return done.stderr

    there = ("--output", tmp_path / "out.npz")
    assert "--force would start" in said("describe", library, "--force", *there[:1], tmp_path)
    assert "give --sidecar FOLDER" in said("describe", library, ip="10.0.0.1")
    assert "give --sidecar FOLDER" in said("embed", library, *there, ip="10.0.0.1")
    monkeypatch.delenv("MLX_WORLD_SIZE")
    done = CliRunner().invoke(cli, ["embed", str(library), "--jsonl", "--sidecar", str(tmp_path)])
    assert done.exit_code == 2 and "--sidecar is for a FOLDER under mlx.launch" in done.stderr


def test_a_file_is_one_holders_and_never_one_that_was_removed(tmp_path: Path) -> None:
    first = claim(tmp_path / "a")
    assert first is not None and claim(tmp_path / "a") is None
    # Somebody who has opened a file that its holder then removes would lock what nobody sees.
    program = (
        "import fcntl, os, sys\nfrom pathlib import Path\nfrom mlx_onevision import files\n"
        "lock = fcntl.flock\n"
        "def slow(file, how):\n"
        "    print('opened', flush=True); sys.stdin.readline(); lock(file, how)\n"
        "files.fcntl.flock = slow\n"
        "files.claim(Path(sys.argv[1])).write(b'mine')\n"
    )
    other = start([sys.executable, "-c", program], tmp_path / "a")
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == "opened\n"
    (tmp_path / "a").unlink()
    first.close()
    other.communicate("\n\n", timeout=30)
    assert (tmp_path / "a").read_bytes() == b"mine"
