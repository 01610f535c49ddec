"""Ctrl-C in a program that goes on afterwards.

Python raises KeyboardInterrupt wherever it happens to be, and so a key pressed twice ends a program
that had just caught the first. Here Ctrl-C does what is said for the moment, once, and where
nothing is said, nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class Interrupts:
    """What Ctrl-C does now. Without :meth:`handled` it is as Python has it."""

    def __init__(self) -> None:
        self._action: Callable[[], object] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Ctrl-C is left to this object meanwhile; only the main thread may say so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Ctrl-C calls ``action`` meanwhile, at most once."""
        self._action = action
        try:
            yield
        finally:
            self._action = None

    def raising(self) -> AbstractContextManager[None]:
        """Ctrl-C raises KeyboardInterrupt meanwhile, at most once."""
        return self.calling(_raise)

    def _pressed(self, *_: object) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


def _raise() -> None:
    raise KeyboardInterrupt
