"""One call of a tool, while it runs: how far it has come, and how long it may take."""

import time
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import anyio

from mlx_onevision.plugins.contract.events import ProgressEvent, TextEvent
from mlx_onevision.plugins.interface import Event

Result = TypeVar("Result")

SELDOM = 0.25  # seconds between two reports of the same stage; a host shows no more

WORDS = {
    "queued": "waiting in line",
    "loading": "loading the model",
    "preparing": "reading the file",
    "answering": "answering",
}


class Report(Protocol):
    """Sends a progress notification, where the host wants any."""

    def __call__(
        self, progress: float, total: float | None = None, message: str | None = None
    ) -> Awaitable[None]: ...


class Call:
    """report : sends progress. seconds : the call's time, from now on."""

    def __init__(self, report: Report, seconds: float) -> None:
        self.report = report
        self._until = time.monotonic() + seconds
        self._last = 0.0
        self._told = ""
        self._when = 0.0
        self._pieces = 0

    @property
    def left(self) -> float:
        """Seconds of its time that are left; 0 at least."""
        return max(0.0, self._until - time.monotonic())

    async def tell(self, stage: str, done: float = 0, total: float | None = None) -> None:
        """Where it stands. Progress has to rise, whatever is counted."""
        now = time.monotonic()
        if stage == self._told and now - self._when < SELDOM:
            return
        self._told, self._when = stage, now
        self._last = done if done > self._last else self._last + 0.001
        await self.report(self._last, total, WORDS.get(stage, stage))

    async def follow(self, event: Event, most: int | None = None) -> None:
        """Tells of a backend's event. ``most`` : tokens that an answer may have."""
        if isinstance(event, TextEvent):
            self._pieces += 1
            await self.tell("answering", self._pieces, most)
        elif isinstance(event, ProgressEvent):
            await self.tell(event.stage, event.done, event.total)


async def blocking(function: Callable[[], Result]) -> Result:
    """Calls a function that waits for a disk, elsewhere; it is not waited for once it is late."""
    return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)
