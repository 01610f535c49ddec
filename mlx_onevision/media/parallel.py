"""Work on several cores (numpy, Pillow and hashlib release the interpreter's lock), and limits on
what all threads hold together.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from threading import Condition
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.1  # between two calls of a check for cancellation
_M_ARENA_MAX = -8  # of glibc's mallopt(3)


def no_check() -> None:
    """The check for cancellation of work that cannot be cancelled."""


def share_heaps() -> None:
    """Has all threads of this process allocate from two heaps, for processes that are ours alone.

    glibc would give each thread a heap (an arena) of its own and keep what is freed in it: a server
    grew by 10 MB over 10,000 requests, as each came to be read by each thread. macOS has no such
    setting, and needs none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)


class Budget:
    """A limit on what all threads hold together, such as bytes or processes: a fair semaphore.
    More than ``total`` is granted while nothing else is held.
    """

    def __init__(self, total: int) -> None:
        self._total, self._held = total, 0
        self._waiting: deque[object] = deque()
        self._changed = Condition()

    def acquire(self, size: int = 1, check: Callable[[], None] = no_check) -> None:
        """Waits until ``size`` more can be held. check : called meanwhile; gives up by raising."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or (
                    self._held and self._held + size > self._total
                ):
                    self._changed.wait(POLL_SECONDS)
                    check()
                self._held += size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def release(self, size: int = 1) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    @contextmanager
    def holding(self, size: int = 1, check: Callable[[], None] = no_check) -> Generator[None]:
        self.acquire(size, check)
        try:
            yield
        finally:
            self.release(size)


@cache
def cores() -> int:
    """The number of cores that this process may use; at most 8, for the memory that each takes."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), thread_name_prefix="mlx-onevision-media")


def parallel_map(
    function: Callable[[Item], Result], items: Iterable[Item], most: int = 16
) -> list[Result]:
    """``[function(item) for item in items]``, on several cores.

    Items are taken on the caller's thread, up to ``most`` ahead of their results. The first error,
    in the order of the items, ends the work and is raised once the tasks that had begun are over.
    ``function`` may call this again: a thread runs a task that has not begun itself, and waits for
    running ones only.
    """
    if cores() == 1 or (isinstance(items, Sized) and len(items) < 2):
        return [function(item) for item in items]
    pool, results = _pool(), list[Result]()
    running: deque[tuple[Future[Result], list[Callable[[], Result]]]] = deque()

    def finish() -> None:
        future, task = running.popleft()
        results.append(_run(task) if future.cancel() else future.result())

    try:
        for item in items:
            # A cancelled task stays in the pool's queue for a while. As a list it can be emptied,
            # which frees the item; that may be large.
            task = [partial(function, item)]
            running.append((pool.submit(_run, task), task))
            if len(running) >= most:
                finish()
        while running:
            finish()
    finally:
        for future, task in running:
            if future.cancel():
                task.clear()
        wait([future for future, _ in running if not future.cancelled()])
    return results


def _run(task: list[Callable[[], Result]]) -> Result:
    return task.pop()()
