"""Bounds of a process that meets what strangers made, and sets them on itself; standard library
only.
"""

import os
import sys
import threading
import time

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
