"""Work on several cores: numpy, Pillow and hashlib release the interpreter's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def cores() -> int:
    """Those that this process may use; at most 8, for the memory that each takes."""
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
    in the order of the items, ends the work and is raised once what had begun is over. May be
    called within itself: a thread runs a task that has not begun, and never waits for one.
    """
    if cores() == 1 or (isinstance(items, Sized) and len(items) < 2):
        return [function(item) for item in items]
    pool, results = _pool(), list[Result]()
    running: deque[tuple[Future[Result], Item]] = deque()

    def finish() -> None:
        future, item = running.popleft()
        results.append(function(item) if future.cancel() else future.result())

    try:
        for item in items:
            running.append((pool.submit(function, item), item))
            if len(running) >= most:
                finish()
        while running:
            finish()
    finally:
        wait([future for future, _ in running if not future.cancel()])
    return results
