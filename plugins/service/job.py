"""One description that is asked after, see :mod:`jobs`; standard library only."""

import json
import secrets
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.events import DoneEvent, ErrorEvent, ProgressEvent
from mlx_onevision.plugins.contract.results import DescribeResult, Segment
from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.contract.wire import Part, Record

Status = Literal["queued", "running", "done", "failed", "cancelled"]

UNDER_WAY: tuple[Status, ...] = ("queued", "running")

NO_END = ErrorEvent("internal", "the backend ended without a description")


@dataclass(frozen=True)
class Job(Record):
    """How far a description has come.

    status : "queued", "running"; then once and for all "done", "failed" or "cancelled".
    seconds : since it was started, until it ended.
    forgotten_after : seconds for which it can still be asked for, once it has ended.
    progress : what is done just now.
    segments : those told so far, of a failed or cancelled job, too.
    result : all of it, when it is done. error : why it is not.
    """

    id: str
    status: Status
    seconds: float = 0.0
    forgotten_after: float | None = None
    progress: ProgressEvent | None = None
    segments: tuple[Segment, ...] = ()
    result: DescribeResult | None = None
    error: ErrorEvent | None = None


class NoSuchJob(PluginError):
    """An id that no job has, or none any more."""

    def __init__(self, kept: float) -> None:
        super().__init__(
            "bad_request",
            "there is no such job",
            f"it is forgotten {kept:g} seconds after its end, or earlier where many are started",
        )


@dataclass(eq=False)
class Kept:
    """A job as it is now; changed under the lock of :class:`Jobs` alone."""

    stream: EventStream[DescribeResult] | None  # which holds all its events, so not kept beyond it
    media: int
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    began: float = field(default_factory=monotonic)
    status: Status = "queued"
    ended: float | None = None
    asked_to_end: bool = False
    progress: ProgressEvent | None = None
    segments: list[Segment] = field(default_factory=list)
    result: DescribeResult | None = None
    error: ErrorEvent | None = None
    told: int = 0

    @property
    def size(self) -> int:
        """Bytes: of the film while it is worked on, and of what was told, as JSON."""
        return self.told + (self.media if self.ended is None else 0)

    def end(self, outcome: DoneEvent | ErrorEvent) -> None:
        self.ended, self.stream = monotonic(), None
        if isinstance(outcome, ErrorEvent):
            self.error = outcome
            cancelled = self.asked_to_end and outcome.code == "cancelled"
            self.status = "cancelled" if cancelled else "failed"
        elif isinstance(outcome.result, DescribeResult):
            self.result, self.status = outcome.result, "done"
            self.segments = list(outcome.result.segments)
            self.told = size_of(outcome.result)
        else:
            self.error, self.status = NO_END, "failed"

    def shown(self, kept: float) -> Job:
        """As it is now; it is kept for so many seconds after its end."""
        now = monotonic()
        return Job(
            id=self.id,
            status=self.status,
            seconds=round((self.ended or now) - self.began, 3),
            forgotten_after=None if self.ended is None else round(self.ended + kept - now, 3),
            progress=self.progress,
            segments=tuple(self.segments),
            result=self.result,
            error=self.error,
        )


def size_of(part: Part) -> int:
    """Bytes, as JSON."""
    return len(json.dumps(part.to_dict()))
