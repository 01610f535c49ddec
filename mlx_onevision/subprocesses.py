"""A Python interpreter for work that has to be able to die: decoding a stranger's video, working
through a stranger's schema.

Usually it is the one that runs this program. A host application that embeds Python has none under
``sys.executable``: one is then looked for where this Python is installed, and
``MLX_ONEVISION_PYTHON`` names it outright. It must be the same version of Python, since it imports
libraries from the same places.
"""

import os
import sys
import threading
import time
from pathlib import Path

# Bounds of a process that meets what strangers made, and sets them on itself; standard library
# only.

POLL_SECONDS = 0.1


def confine(memory: int, *, seconds: int | None = None, files: int | None = None) -> None:
    """Bounds this process for good: what the system enforces, and a watch where it does not
    (macOS). It writes no file, leaves no core, and ends with the process that started it.

    memory : bytes. seconds : of processor time. files : that are open at once.
    """
    import resource

    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
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
            time.sleep(POLL_SECONDS)
            if peak() > allowed or os.getppid() != parent:
                os._exit(9)

    threading.Thread(target=watch, daemon=True).start()


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
