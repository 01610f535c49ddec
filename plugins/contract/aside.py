"""One thread for the whole process: it does what must not hold up whoever wants it done, and what
is due later. Standard library only.
"""

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable

LONGEST_WAIT = 3600.0  # seconds; Python cannot wait for just any number of them

logger = logging.getLogger("mlx_onevision")


class Alarm:
    """Something that is due at a time, unless it is cancelled before."""

    def __init__(self, due: float, function: Callable[[], object]) -> None:
        self.due = due
        self._function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """What it holds is let go of at once. Nothing happens if it has gone off."""
        self._function = None

    def go_off(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


class Aside:
    """What it is given has to be short: it is done one after another."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Alarm] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """To be called before the first use, and again at will."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():  # as after a fork
                self._thread = threading.Thread(
                    target=self._run, name="mlx-onevision-aside", daemon=True
                )
                self._thread.start()

    def soon(self, function: Callable[[], object]) -> None:
        """May be called at any point of any thread, by a finalizer within any lock, too."""
        self._wanted.put(Alarm(0.0, function))

    def later(self, seconds: float, function: Callable[[], object]) -> Alarm:
        alarm = Alarm(time.monotonic() + seconds, function)
        self._wanted.put(alarm)
        return alarm

    def _run(self) -> None:
        due: list[tuple[float, int, Alarm]] = []
        numbers = itertools.count()
        while True:
            wait = due[0][0] - time.monotonic() if due else LONGEST_WAIT
            try:
                alarm = self._wanted.get(timeout=min(max(wait, 0.0), LONGEST_WAIT))
                heapq.heappush(due, (alarm.due, next(numbers), alarm))
                del alarm
            except queue.Empty:
                pass
            while due and due[0][0] <= time.monotonic():
                _done(heapq.heappop(due)[2])


def _done(alarm: Alarm) -> None:
    try:
        alarm.go_off()
    except Exception:
        logger.exception("what was to be done aside failed")


aside = Aside()
