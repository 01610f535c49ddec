"""Whose turn it is: so many requests at once, so many waiting in line, and no more; standard
library only.
"""

import threading
from collections import deque

from mlx_onevision.plugins.contract.errors import PluginError


class Turn:
    """A request's place, in line or under way."""


class Turns:
    """active : requests at once. waiting : in line behind them, first come first served."""

    def __init__(self, active: int, waiting: int) -> None:
        self._most_active, self._most_waiting = active, waiting
        self._active: set[Turn] = set()
        self._line: deque[Turn] = deque()
        self._changed = threading.Condition()

    def enter(self) -> Turn:
        """A place, at once.

        Raises:
            PluginError: ``busy``, when the line is full.
        """
        turn = Turn()
        with self._changed:
            if len(self._active) < self._most_active and not self._line:
                self._active.add(turn)
            elif len(self._line) < self._most_waiting:
                self._line.append(turn)
            else:
                raise PluginError(
                    "busy",
                    f"{len(self._active)} requests are under way and {len(self._line)} wait",
                    "try again in a moment",
                )
        return turn

    def wait(self, turn: Turn) -> bool:
        """Until it is its turn; False when it has left the line instead."""
        with self._changed:
            while turn in self._line:
                self._changed.wait()
            return turn in self._active

    def leave_line(self, turn: Turn) -> None:
        """Gives up a place in line; one that is under way keeps its own until it ends."""
        with self._changed:
            if turn in self._line:
                self._line.remove(turn)
                self._changed.notify_all()

    def end(self, turn: Turn) -> None:
        """Makes room for the next; nothing if it has no place any more."""
        with self._changed:
            self._active.discard(turn)
            while self._line and len(self._active) < self._most_active:
                self._active.add(self._line.popleft())
            self._changed.notify_all()

    @property
    def counts(self) -> tuple[int, int]:
        """How many are under way, and how many wait."""
        with self._changed:
            return len(self._active), len(self._line)
