"""The command as tests run it: in this process, in one of its own, on a terminal; and conversions
that are killed at a moment or at a step.
"""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from click.testing import CliRunner, Result

from mlx_onevision.cli.main import cli

COMMAND = (sys.executable, "-m", "mlx_onevision")


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    """The command in this process."""
    return CliRunner().invoke(cli, [*map(str, arguments)], input=stdin)


def run_alone(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> Result:
    """The command in a process of its own, as a person's shell runs it."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    runner = CliRunner(charset="utf-8")
    return Result(runner, done.stdout, done.stderr, b"", None, done.returncode, None)


def default_sigint() -> None:
    """A process that is started in the background ignores Ctrl-C, and hands that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Bad input, as a person meets it.


def one_sentence(done: Result, *parts: str) -> None:
    """Exit code 1, nothing on stdout, one line that names what is wrong."""
    assert done.exit_code == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in lines[0] and "defect" not in lines[0]
    for part in parts:
        assert part in lines[0], lines[0]


@contextmanager
def on_terminal(*arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``mlx-onevision`` and the descriptor of its terminal, which is its stderr.

    However a test ends, the process ends with it.
    """
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_onevision", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        # Where tests run in the background SIGINT is ignored, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    try:
        yield process, terminal
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


# Conversions that are killed.


SERVER = """
import json, os, resource, signal, sys, time
from pathlib import Path
import mlx.core, mlx.nn
from mlx_onevision.checkpoint import recipes
from mlx_onevision.convert import conversion, staging
from mlx_onevision.errors import OneVisionError
import mlx_onevision.prompt.tokenizer, tokenizers, yaml

STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock",
         "ctypes.dlsym"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def child(job):
    count = 0
    active = False
    def step():
        nonlocal count
        if not active:
            return
        count += 1
        if count == job.get("step"):
            os.kill(os.getpid(), signal.SIGKILL)
    def hook(event, arguments):
        if event in STEPS or event == "open" and (arguments[2] or 0) & WRITING:
            step()
    sys.addaudithook(hook)
    fsync = os.fsync
    def counted(descriptor):
        step()
        fsync(descriptor)
        step()
    os.fsync = counted
    if job.get("no_exchange"):
        staging.exchange = lambda one, other: False
    if job.get("limit") is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    active = True
    try:
        conversion.convert(Path(job["source"]), Path(job["target"]), overwrite=job["overwrite"],
                           recipe=recipes.uniform(job["bits"]), shard_bytes=job["shard_bytes"])
    except OneVisionError as error:
        return {"error": str(error), "steps": count}
    active = False
    return {"steps": count}

for line in sys.stdin:
    job = json.loads(line)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = child(job)
        except BaseException as error:
            said = {"defect": repr(error)}
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    if "after" in job:
        time.sleep(job["after"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        said = json.loads(pipe.read() or b"{}")
    print(json.dumps(said | {"killed": os.WIFSIGNALED(status)}), flush=True)
"""


class Killer:
    """The server. Every method runs one conversion and returns what is known of its end:
    ``killed``, ``steps``, ``error`` (one of the package's own) and ``defect`` (anything else).
    """

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate(timeout=30)

    def run(self, source: Path, target: Path, **job: Any) -> dict[str, Any]:
        given = {"source": str(source), "target": str(target), "overwrite": False, "bits": 4}
        given |= {"shard_bytes": 250_000, **job}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(given) + "\n")
        self._server.stdin.flush()
        said = json.loads(self._server.stdout.readline())
        assert "defect" not in said, said
        return said
