"""A process that bounds itself: it ends for what it does, and not for what started it."""

import ctypes
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_onevision import subprocesses
from mlx_onevision.errors import TooLargeError
from mlx_onevision.media import decoder
from mlx_onevision.media.decoder import Limits, VideoReader
from mlx_onevision.subprocesses import BoundedProcess, footprint

LIMIT = 256 << 20
ROOT = Path(__file__).parents[1]

CHILD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mlx_onevision.subprocesses import confine
confine({LIMIT})
time.sleep(0.5)
print("it lives")
try:
    held = bytearray({2 * LIMIT})
    for page in range(0, len(held), 4096):
        held[page] = 1
    time.sleep(0.5)
    print("it was let")
except MemoryError:
    print("it was refused")
"""

PARENT = f"""
import subprocess, sys
held = bytearray({2 * LIMIT})
for page in range(0, len(held), 4096):
    held[page] = 1
done = subprocess.run([sys.executable, "-I", "-c", {CHILD!r}], stdout=subprocess.PIPE)
sys.stdout.buffer.write(done.stdout)
"""


def test_a_large_parent_is_no_reason_to_end() -> None:
    """On Linux a process begins with its parent's peak as its own, which for a host with a model in
    it is more than any decoder may take.
    """
    done = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, check=True)
    lines = done.stdout.decode().splitlines()
    assert lines[:1] == ["it lives"] and "it was let" not in lines


def test_it_ends_with_its_parent() -> None:
    script = f"""
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-I", "-c", '''
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mlx_onevision.subprocesses import confine
confine({LIMIT})
print("begun", flush=True)
time.sleep(60)
'''], stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), child.pid, flush=True)
"""
    begun = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    pid = begun.stdout.split()[-1].decode()
    done = subprocess.run(
        ["sh", "-c", f"for i in $(seq 100); do kill -0 {pid} || exit 0; sleep 0.1; done; exit 1"]
    )
    assert done.returncode == 0


# macOS, whose kernel does not enforce the limit: its parent does. A stand-in plays its C library.


class Library:
    """``proc_pid_rusage`` as Apple's headers have it: 96 bytes, the footprint at the 72nd."""

    def __init__(self, held: int, outcome: int = 0) -> None:
        self.held, self.outcome = held, outcome

    def proc_pid_rusage(self, process: int, flavor: int, usage: Any) -> int:
        assert (process, flavor) == (77, 0)
        assert ctypes.sizeof(usage._obj) == 96
        ctypes.memset(ctypes.addressof(usage._obj), 0xFF, 96)
        ctypes.c_uint64.from_address(ctypes.addressof(usage._obj) + 72).value = self.held
        return self.outcome


def test_the_footprint_of_a_child_is_where_apple_s_header_has_it() -> None:
    assert footprint(77, Library(5 << 30)) == 5 << 30
    assert footprint(77, Library(5 << 30, outcome=-1)) == 0


def resident(process: int) -> int:
    """What ``ps`` knows on every system."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], stdout=subprocess.PIPE)
    return int(done.stdout or 0) << 10


@pytest.fixture
def greedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A child that takes memory under no limit of the kernel's, and never lets a thread run."""
    program = tmp_path / "python"
    eat = "held = []\nwhile True: held.append(b'a' * (1 << 22))"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{eat}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("MLX_ONEVISION_PYTHON", str(program))
    for module in (decoder, subprocesses):
        monkeypatch.setattr(module, "footprint", resident)
    return program


def test_a_decoder_that_takes_too_much_is_ended_from_outside(greedy: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"a video")
    began = time.monotonic()
    with (tmp_path / "a.mp4").open("rb") as file:
        with pytest.raises(TooLargeError, match=r"cannot read a\.mp4: it takes too much memory"):
            VideoReader(file, "a.mp4", Limits(memory=LIMIT, seconds=60))
    assert time.monotonic() - began < 20


def test_a_bounded_process_that_takes_too_much_is_ended_from_outside(greedy: Path) -> None:
    process = BoundedProcess(str(greedy), "json", memory=LIMIT, seconds=60)
    with pytest.raises(EOFError):
        process.ask({})
    assert not process.close.alive
