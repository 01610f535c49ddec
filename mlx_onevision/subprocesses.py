"""Python processes with bounds, for work on untrusted data that has to be able to die: decoding a
video, compiling a JSON schema, rendering a chat template.

The interpreter is usually the one that runs this program. A host application that embeds Python has
none under ``sys.executable``: one is then looked for where this Python is installed, and
``MLX_ONEVISION_PYTHON`` names it outright. It must be the same version of Python, since it imports
libraries from the same places.

This file is also the script that such a process runs (see :class:`BoundedProcess`), before it can
import this package: standard library only.
"""

import ctypes
import importlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

POLL_SECONDS = 0.05  # between two looks at a cancellation
WATCH_SECONDS = 0.1  # between two looks at the memory, and at the parent
START_SECONDS = 60.0  # until a process has imported what it needs
MAX_ANSWER = 1 << 24  # bytes
FILES = 32  # open at once

# What a process gets of this one's environment: where libraries are found, and the time zone.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "TZDIR")
INTERPRETER = "MLX_ONEVISION_PYTHON"

_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"

MISSING = f"a separate {_VERSION}, and none was found; set {INTERPRETER} to its path"
"""How the error ends that says so."""


def find_interpreter() -> str | None:
    """A Python of this version that is no host application."""
    named = os.environ.get(INTERPRETER)
    if named:
        return named
    here = Path(sys.executable or "")
    if here.name.lower().startswith("python") and not getattr(sys, "frozen", False):
        return str(here)
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for name in (_VERSION, "python3", "python"):
            path = Path(prefix) / "bin" / name
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def import_path() -> list[str]:
    """Where such an interpreter finds what this one has, this package first."""
    here = str(Path(__file__).parents[1])
    return [here, *map(os.path.abspath, filter(None, sys.path))]


def environment() -> dict[str, str]:
    """Of a process that reads untrusted data: nothing that could be a secret."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


class _Usage(ctypes.Structure):
    """Apple's ``struct rusage_info_v0`` of ``<sys/resource.h>``; times in ticks, sizes in bytes."""

    _fields_: ClassVar = [
        ("ri_uuid", ctypes.c_uint8 * 16),
        *(
            (f"ri_{name}", ctypes.c_uint64)
            for name in (
                "user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size "
                "resident_size phys_footprint proc_start_abstime proc_exit_abstime"
            ).split()
        ),
    ]


def footprint(process: int, library: Any = None) -> int:
    """Bytes that a child holds, as macOS counts them (``proc_pid_rusage`` of ``<libproc.h>``); 0
    where that is not known, and on other systems, whose kernel enforces the limit.

    It is asked from outside: in the child, a decoder that holds the interpreter's lock would keep
    a watch from running. A kernel of macOS that enforces ``RLIMIT_AS`` counts the region of shared
    libraries, which is larger than the limit, and refuses to set it.

    library : the C library.
    """
    if library is None:
        if sys.platform != "darwin":
            return 0
        library = ctypes.CDLL(None)
    usage = _Usage()
    failed = library.proc_pid_rusage(process, 0, ctypes.byref(usage))  # RUSAGE_INFO_V0
    return 0 if failed else int(usage.ri_phys_footprint)


class BoundedProcess:
    """A module of this package in a process of its own: its function ``answer`` takes a request and
    returns the answer, both plain values for JSON, one after another.

    It ends with :meth:`close`, when it is forgotten, and with this process. One thread at a time.

    memory : bytes. seconds : for each answer.
    """

    def __init__(self, interpreter: str, module: str, *, memory: int, seconds: float) -> None:
        self._memory = memory
        settings = {"path": import_path(), "module": module, "memory": memory, "seconds": seconds}
        self._process = process = subprocess.Popen(
            [interpreter, "-I", __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,  # Ctrl-C is this process's business
        )
        self._seconds = seconds
        self._ready = False
        self.close = weakref.finalize(self, _end, process)
        """Ends it, whatever it does."""

    def ask(self, request: Any, check: Callable[[], None] = lambda: None) -> Any:
        """The answer to a request. Whatever this raises has ended the process.

        check : called meanwhile; gives up by raising.

        Raises:
            TimeoutError: after ``seconds``.
            EOFError: when the process died, as it does for want of memory.
        """
        assert self._process.stdin is not None
        try:
            if not self._ready:
                self._line(START_SECONDS, check)
                self._ready = True
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                raise EOFError from None
            line = self._line(self._seconds, check)
            try:
                return json.loads(line)
            except ValueError:
                raise EOFError from None
        except BaseException:
            self.close()
            raise

    def _line(self, seconds: float, check: Callable[[], None]) -> bytes:
        assert self._process.stdout is not None
        source, line = self._process.stdout.fileno(), bytearray()
        late = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                check()
                if footprint(self._process.pid) > self._memory:
                    raise EOFError
                left = late - time.monotonic()
                if left < 0:
                    raise TimeoutError
                if selector.select(min(POLL_SECONDS, left)):
                    data = os.read(source, 1 << 16)
                    line += data
                    if not data or len(line) > MAX_ANSWER:
                        raise EOFError
        return bytes(line)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:
            pass  # a request that it did not take


def confine(memory: int, *, files: int | None = None) -> None:
    """Bounds this process for good: what the system enforces, and a watch where it does not
    (macOS). It writes no file, leaves no core, and ends with the process that started it.

    memory : bytes. files : that are open at once.
    """
    import resource

    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in wanted.items():
        try:
            if value is not None:
                resource.setrlimit(limit, (value, value))
        except (OSError, ValueError):
            pass  # a stricter one is in force, or the system has none
    parent = os.getppid()
    unit = 1 if sys.platform == "darwin" else 1024

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    # On Linux a process begins with the peak of the one that started it, which may be a host with a
    # whole model in it; there the system enforces the limit by itself.
    allowed = max(memory, peak())

    def watch() -> None:
        while True:
            time.sleep(WATCH_SECONDS)
            if peak() > allowed or os.getppid() != parent:
                os._exit(9)

    threading.Thread(target=watch, daemon=True).start()


def allow_seconds(seconds: float) -> None:
    """Bounds the processor time of this process from now on, where its parent does not end it."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(used.ru_utime + used.ru_stime + seconds) + 1
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    except (OSError, ValueError):
        pass  # the system has none


def _serve() -> None:
    """The other side of :class:`BoundedProcess`: requests on standard input, a line each."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    out = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what a library prints is no answer
    os.close(null)
    answer = importlib.import_module(settings["module"]).answer
    confine(settings["memory"], files=FILES)
    out.write(b"\n")
    out.flush()
    for line in sys.stdin.buffer:
        allow_seconds(settings["seconds"])
        out.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        out.flush()
    os._exit(0)


if __name__ == "__main__":
    _serve()
