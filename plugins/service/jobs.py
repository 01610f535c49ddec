"""Descriptions of long videos as jobs: started, polled and collected, for hosts whose calls time
out before a video is described. Over any backend; standard library only.

    jobs = Jobs(backend)
    job = jobs.start(DescribeRequest(video))
    while job.status in UNDER_WAY:
        time.sleep(1)
        job = jobs.status(job.id)

Who knows a job's id may ask for it and cancel it, so ids cannot be guessed, and there is no list.
"""

import json
import secrets
import threading
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Literal, Self

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError, bad_request, to_plugin_error
from mlx_onevision.plugins.contract.requests import DescribeRequest
from mlx_onevision.plugins.contract.results import DescribeResult, ErrorEvent, Segment
from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.contract.wire import Part, Record
from mlx_onevision.plugins.interface import Backend

Status = Literal["queued", "running", "done", "failed", "cancelled"]

UNDER_WAY: tuple[Status, ...] = ("queued", "running")

ENDED_WITHOUT_RESULT = ErrorEvent("internal", "the backend ended without a description")

# Seconds that a backend has to end what was cancelled; then it is shown as is.
CANCEL_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Job(Record):
    """How far a description has come.

    status : "queued", "running"; then once and for all "done", "failed" or "cancelled".
    seconds : since it was started, until it ended.
    forgotten_after : seconds for which it can still be asked for, once it has ended.
    progress : what is done just now.
    segments : those described so far, of a failed or cancelled job, too.
    result : all of it, when it is done. error : why it is not.
    """

    id: str
    status: Status
    seconds: float = 0.0
    forgotten_after: float | None = None
    progress: results.ProgressEvent | None = None
    segments: tuple[Segment, ...] = ()
    result: DescribeResult | None = None
    error: ErrorEvent | None = None


class NoSuchJob(PluginError):
    """An id that no job has, or none any more."""

    def __init__(self, retention_seconds: float) -> None:
        super().__init__(
            "bad_request",
            "there is no such job",
            f"it is forgotten {retention_seconds:g} seconds after its end, or earlier where many "
            "are started",
        )


@dataclass(eq=False)
class _JobState:
    """A job as it is now; changed under the lock of :class:`Jobs` alone.

    job : the public record, without segments and times, which ``shown`` fills in.
    """

    stream: EventStream[DescribeResult] | None  # which holds all its events, so not kept beyond it
    media: int
    job: Job = field(default_factory=lambda: Job(secrets.token_hex(16), "queued"))
    began: float = field(default_factory=monotonic)
    ended: float | None = None
    asked_to_end: bool = False
    segments: list[Segment] = field(default_factory=list[Segment])
    result_size: int = 0

    @property
    def size(self) -> int:
        """Bytes: of the video while it is worked on, and of the result so far, as JSON."""
        return self.result_size + (self.media if self.ended is None else 0)

    def end(self, outcome: results.DoneEvent | ErrorEvent) -> None:
        self.ended, self.stream = monotonic(), None
        if isinstance(outcome, results.DoneEvent) and isinstance(outcome.result, DescribeResult):
            self.job = replace(self.job, status="done", result=outcome.result)
            self.segments = list(outcome.result.segments)
            self.result_size = _size_of(outcome.result)
            return
        error = outcome if isinstance(outcome, ErrorEvent) else ENDED_WITHOUT_RESULT
        cancelled = self.asked_to_end and error.code == "cancelled"
        self.job = replace(self.job, status="cancelled" if cancelled else "failed", error=error)

    def shown(self, retention_seconds: float) -> Job:
        """As it is now; it is kept for so many seconds after its end."""
        now = monotonic()
        return replace(
            self.job,
            seconds=round((self.ended or now) - self.began, 3),
            forgotten_after=None
            if self.ended is None
            else round(self.ended + retention_seconds - now, 3),
            segments=tuple(self.segments),
        )


def _size_of(part: Part) -> int:
    """Bytes, as JSON."""
    return len(json.dumps(part.to_dict()))


class Jobs:
    """Descriptions that are under way or have ended not long ago.

    backend : stays its owner's to close, after this.
    max_jobs : that are known at once. max_under_way : of these, not ended; more are refused as
        busy, so that a part of the backend's slots is left for requests that are waited for.
    max_bytes : of all together, videos that came with their requests included.
    retention_seconds : after which an ended job is forgotten; the oldest are forgotten earlier
        where there is no room for new ones.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        max_jobs: int = 64,
        max_under_way: int = 4,
        max_bytes: int = 256 << 20,
        retention_seconds: float = 900.0,
    ) -> None:
        self._backend = backend
        self._max_jobs, self._max_under_way = max_jobs, max_under_way
        self._max_bytes, self._retention_seconds = max_bytes, retention_seconds
        self._jobs: dict[str, _JobState] = {}  # in the order in which they were started
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def start(self, request: DescribeRequest) -> Job:
        """Begins a description, and returns at once. Raises PluginError: ``busy`` when there are
        too many; what the backend refuses at once; ``internal`` when the system has no thread left.
        """
        media = sum(len(medium.data or medium.url or b"") for medium in request.media)
        with self._changed:
            self._admit(media)
            # Under the lock: the place that it was given must not be another's meanwhile.
            stream = self._backend.describe_video(request)
            if stream.ended:
                stream.result()  # refused; nothing can be done already
            job = _JobState(stream, media)
            thread = threading.Thread(
                target=self._follow, args=(job, stream), name="mlx-onevision-job", daemon=True
            )
            try:
                thread.start()  # it waits for the lock before it looks at the job
            except RuntimeError as error:
                stream.close()
                raise to_plugin_error(error) from error
            self._threads.add(thread)
            self._jobs[job.job.id] = job
            return job.shown(self._retention_seconds)

    def status(self, id: str) -> Job:
        """Raises NoSuchJob."""
        with self._changed:
            return self._found(id).shown(self._retention_seconds)

    def cancel(self, id: str) -> Job:
        """Ends a job. Nothing happens to one that has ended. Raises NoSuchJob."""
        with self._changed:
            job = self._found(id)
            job.asked_to_end = True
            stream = job.stream
        if stream is not None:
            stream.cancel()
        with self._changed:
            self._changed.wait_for(lambda: job.ended is not None, CANCEL_TIMEOUT_SECONDS)
            return job.shown(self._retention_seconds)

    def close(self) -> None:
        """Cancels and forgets all of them."""
        with self._changed:
            self._closed = True
            streams = [job.stream for job in self._jobs.values() if job.stream is not None]
            threads = list(self._threads)
            self._jobs.clear()
        for stream in streams:
            stream.cancel()
        for thread in threads:
            thread.join(CANCEL_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Under the lock.

    def _admit(self, size: int) -> None:
        if self._closed:
            raise bad_request("no more descriptions are started", "open it again")
        self._forget()
        working = sum(job.ended is None for job in self._jobs.values())
        if working >= self._max_under_way:
            message = f"{working} descriptions are under way"
            raise PluginError("busy", message, "try again when one has ended")
        if size > self._max_bytes:
            message = f"the video has {size / 2**20:,.1f} MB"
            raise PluginError("too_large", message, "send something smaller")
        if not self._make_room(size, 1):
            message = "the videos of all descriptions are too large"
            raise PluginError("busy", message, "try again in a moment")

    def _make_room(self, size: int, number: int = 0) -> bool:
        """Forgets ended jobs, the oldest first, until there is room; False if there is none."""
        while (
            len(self._jobs) + number > self._max_jobs
            or sum(job.size for job in self._jobs.values()) + size > self._max_bytes
        ):
            ended = [job for job in self._jobs.values() if job.ended is not None]
            if not ended:
                return False
            del self._jobs[min(ended, key=lambda job: job.ended or 0).job.id]
        return True

    def _forget(self) -> None:
        since = monotonic() - self._retention_seconds
        jobs = self._jobs.items()
        self._jobs = {id: job for id, job in jobs if job.ended is None or job.ended > since}

    def _found(self, id: str) -> _JobState:
        self._forget()
        job = self._jobs.get(id)
        if job is None:
            raise NoSuchJob(self._retention_seconds)
        return job

    def _take(self, job: _JobState, event: results.Event) -> None:
        if isinstance(event, results.ProgressEvent):
            status = job.job.status if event.stage == "queued" else "running"
            job.job = replace(job.job, progress=event, status=status)
        elif isinstance(event, results.SegmentEvent):
            job.segments.append(event.segment)
            job.result_size += _size_of(event.segment)
        elif isinstance(event, results.DoneEvent | ErrorEvent):
            job.end(event)
        if not self._make_room(0) and job.ended is None:
            message = "there is no room for the description of this video"
            job.end(ErrorEvent("too_large", message, "take longer segments"))

    # On the job's own thread.

    def _follow(self, job: _JobState, stream: EventStream[DescribeResult]) -> None:
        try:
            for event in stream:
                with self._changed:
                    self._take(job, event)
                    self._changed.notify_all()
                if job.ended is not None:
                    break
        finally:
            stream.close()
            with self._changed:
                if job.ended is None:
                    job.end(ENDED_WITHOUT_RESULT)
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()
