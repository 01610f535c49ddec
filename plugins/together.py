"""Requests that are ready at the same time, answered together; standard library only.

What is ready while nothing runs is answered at once; what becomes ready meanwhile is answered,
together, when that has ended.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Question = TypeVar("Question")
Stream = TypeVar("Stream")


class Together(Generic[Question, Stream]):
    """start : begins the answers to some questions, and returns them in order."""

    def __init__(self, start: Callable[[Sequence[Question]], Sequence[Stream]]) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._waiting: list[tuple[Question, Future[Stream]]] = []
        self._running = 0

    def ask(self, question: Question) -> "Future[Stream]":
        """The answer once it begins. Whoever takes it calls :meth:`ended` after it; a future that
        is cancelled before it began is left out.
        """
        future: Future[Stream] = Future()
        with self._lock:
            self._waiting.append((question, future))
        self._begin()
        return future

    def ended(self) -> None:
        """One of the answers has ended."""
        with self._lock:
            self._running -= 1
        self._begin()

    def _begin(self) -> None:
        with self._lock:
            if self._running or not self._waiting:
                return
            taken, self._waiting = self._waiting, []
            ready = [entry for entry in taken if entry[1].set_running_or_notify_cancel()]
            self._running = len(ready)
            if not ready:
                return
        try:
            streams = self._start([question for question, _ in ready])
        except BaseException as error:
            for _, future in ready:
                future.set_exception(error)
            with self._lock:
                self._running = 0
            self._begin()
            return
        for (_, future), stream in zip(ready, streams, strict=True):
            future.set_result(stream)
