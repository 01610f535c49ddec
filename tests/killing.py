"""Conversions in processes of their own, which are killed: at a moment, or at a step.

    with Killer() as killer:
        killer.at_moment(source, target, 0.05)

A server process has imported the converter and used none of MLX, so that forking it is safe and
each trial costs a few hundredths of a second. Steps are what the system is asked to do: files
opened for writing, flushed and removed, folders made, renamed, locked, swapped. Python's own audit
events and a wrapper around ``os.fsync`` count them; nothing in the converter knows of it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

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
