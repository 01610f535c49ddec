"""Python processes with limits on memory and time, for work on untrusted data, which may crash
them: decoding a video, compiling a JSON schema, rendering a chat template.

The interpreter is usually the one that runs this program. In a host application that embeds Python
``sys.executable`` is none: one is then looked for where this Python is installed, and
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
"""The end of an error's sentence where :func:`find_interpreter` returns None."""


def find_interpreter() -> str | None:
    """The path of a Python interpreter of this version; None where there is none."""
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
    """``sys.path`` for another interpreter: this one's in absolute paths, behind the folder that
    holds this package.
    """
    here = str(Path(__file__).parents[1])
    return [here, *map(os.path.abspath, filter(None, sys.path))]


def environment() -> dict[str, str]:
    """The environment of a process that reads untrusted data: nothing that could be a secret."""
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
    """Bytes that a child process holds, as macOS counts them (``proc_pid_rusage`` of
    ``<libproc.h>``); 0 where that is not known, and on other systems, whose kernel enforces the
    limit.

    It is asked from outside: in the child, a decoder that holds the interpreter's lock would keep
    a watching thread from running. On macOS ``RLIMIT_AS`` is no substitute: where the kernel
    enforces it, it counts the region of shared libraries, which is larger than the limit.

    library : the C library, for tests on other systems.
    """
    if library is None:
        if sys.platform != "darwin":
            return 0
        library = ctypes.CDLL(None)
    usage = _Usage()
    failed = library.proc_pid_rusage(process, 0, ctypes.byref(usage))  # RUSAGE_INFO_V0
    return 0 if failed else int(usage.ri_phys_footprint)


class BoundedProcess:
    """A process that answers requests with a module of this package, one after another: the
    module's function ``answer`` takes a request and returns the answer, both plain values for JSON.

    It ends with :meth:`close`, when this object is collected, and with this process. To be used by
    one thread at a time.

    interpreter : as :func:`find_interpreter` returns it. module : its full name.
    memory : bytes that the process may hold. seconds : that each answer may take.
    """

    def __init__(self, interpreter: str, module: str, *, memory: int, seconds: float) -> None:
        self._memory = memory
        settings = {"path": import_path(), "module": module, "memory": memory, "seconds": seconds}
        self._process = process = subprocess.Popen(  # noqa: S603 (an interpreter, and this file)
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
        """Kills the process, if it is still there."""

    def ask(self, request: Any, check: Callable[[], None] = lambda: None) -> Any:
        """The answer to a request. Where this raises, the process has ended.

        check : called every ``POLL_SECONDS`` while this waits; gives up by raising.

        Raises:
            TimeoutError: after ``seconds``.
            EOFError: when the process has died, as it does beyond ``memory``.
        """
        assert self._process.stdin is not None
        try:
            if not self._ready:
                self._read_line(START_SECONDS, check)
                self._ready = True
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                raise EOFError from None
            line = self._read_line(self._seconds, check)
            try:
                return json.loads(line)
            except ValueError:
                raise EOFError from None
        except BaseException:
            self.close()
            raise

    def _read_line(self, seconds: float, check: Callable[[], None]) -> bytes:
        assert self._process.stdout is not None
        source, line = self._process.stdout.fileno(), bytearray()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                check()
                if footprint(self._process.pid) > self._memory:
                    raise EOFError
                left = deadline - time.monotonic()
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
            pass  # a buffered request that the process has not read


def confine(memory: int, *, files: int | None = None) -> None:
    """Limits this process for good: by what the system enforces, and by a thread that watches the
    memory where it does not (macOS). It writes no file, dumps no core, and ends with its parent.

    memory : bytes. files : the most that are open at once; None for the system's own limit.
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
            pass  # a stricter limit is in force, or the system has none
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


def allow_seconds(seconds: float, *, for_good: bool = False) -> None:
    """Limits the processor time that this process takes from now on. Its parent ends it by the
    clock; this ends it where the parent does not run.

    for_good : whether it can never be allowed more.
    """
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(used.ru_utime + used.ru_stime + seconds) + 1
        if for_good:
            hard = soft
        elif hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    except (OSError, ValueError):
        pass  # a stricter one is in force, or the system has none


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
