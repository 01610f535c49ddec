"""What every backend does with a request: queue, thread, time limit, end. Standard library only.

Each request has a thread of its own once it has a slot; its errors are its own.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import (
    PluginError,
    bad_request,
    cancelled,
    to_plugin_error,
)
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DescribeResult, EmbedResult, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel, EventStream, background
from mlx_onevision.plugins.service.media_policy import MediaPolicy

Request = GenerateRequest | EmbedRequest | DescribeRequest

LAST_REQUEST_WEIGHT = 0.2  # in the moving average of how long requests take
MAX_RETRY_AFTER_SECONDS = 60

CLOSE_TIMEOUT_SECONDS = 5.0  # seconds that close() waits for requests that it has cancelled


def closed_error() -> PluginError:
    """A new one each time: an exception keeps the frames it went through, and their requests."""
    return bad_request("the backend has been closed", "open it again")


class Slot:
    """A request's place in a :class:`RequestQueue`: waiting, active, or given up."""

    def __init__(self) -> None:
        self.begin: Callable[[], object] | None = None  # called once it waits no more
        self.since = 0.0  # when it became active


class RequestQueue:
    """active : requests at once. waiting : queued behind them, first come first served."""

    def __init__(self, active: int, waiting: int) -> None:
        self._max_active, self._max_requests = active, active + waiting
        self._active: set[Slot] = set()
        self._waiting: deque[Slot] = deque()
        self._reserved = 0
        self._seconds = 0.0  # that requests have taken of late, on average
        self._changed = threading.Condition()

    def enter(self) -> Slot:
        """A slot, at once. Raises PluginError ``busy`` when the queue is full."""
        slot = Slot()
        with self._changed:
            self._check_room()
            self._waiting.append(slot)
            self._promote()
        return slot

    def when_ready(self, slot: Slot, begin: Callable[[], object]) -> None:
        """Has ``begin`` called once the slot is active or was given up, on the thread that makes it
        so; or now, if it is.
        """
        with self._changed:
            if slot in self._waiting:
                slot.begin = begin
                return
        begin()

    @contextmanager
    def reserved(self) -> Generator[None]:
        """Keeps room for one request that has not entered yet. Raises PluginError ``busy``."""
        with self._changed:
            self._check_room()
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def wait(self, slot: Slot) -> bool:
        """Until the slot is active; False when it was given up instead."""
        with self._changed:
            self._changed.wait_for(lambda: slot not in self._waiting)
            return slot in self._active

    def give_up(self, slot: Slot) -> None:
        """Leaves the queue; an active slot is kept until it is released."""
        with self._changed:
            if slot not in self._waiting:
                return
            self._waiting.remove(slot)
            self._changed.notify_all()
        _begin(slot)

    def release(self, slot: Slot) -> None:
        """Makes room for the next; nothing if the slot is not active."""
        with self._changed:
            if slot in self._active:
                self._active.discard(slot)
                took = time.monotonic() - slot.since
                self._seconds += (took - self._seconds) * (
                    LAST_REQUEST_WEIGHT if self._seconds else 1
                )
            promoted = self._promote()
            self._changed.notify_all()
        for one in promoted:
            _begin(one)

    @contextmanager
    def slot(self, channel: Channel) -> Generator[None]:
        """Waits for a slot and holds it. Raises PluginError ``cancelled`` when the request ends."""
        slot = self.enter()
        channel.at_end(lambda: self.give_up(slot))
        try:
            if not self.wait(slot):
                raise cancelled()
            yield
        finally:
            self.release(slot)

    @property
    def counts(self) -> tuple[int, int]:
        """How many are active, and how many wait."""
        with self._changed:
            return len(self._active), len(self._waiting)

    # Under the lock.

    def _check_room(self) -> None:
        active, waiting = len(self._active), len(self._waiting)
        if active + waiting + self._reserved >= self._max_requests:
            message = f"{active} requests are under way and {waiting + self._reserved} wait"
            # One of those under way ends, and makes room for one, after this time.
            after = min(max(1, math.ceil(self._seconds / max(active, 1))), MAX_RETRY_AFTER_SECONDS)
            raise PluginError("busy", message, "try again in a moment", retry_after=after)

    def _promote(self) -> list[Slot]:
        promoted: list[Slot] = []
        while self._waiting and len(self._active) < self._max_active:
            slot = self._waiting.popleft()
            slot.since = time.monotonic()
            self._active.add(slot)
            promoted.append(slot)
        return promoted


def _begin(slot: Slot) -> None:
    if slot.begin is not None:
        slot.begin()


class StreamingBackend(ABC):
    """The part of a :class:`~mlx_onevision.plugins.interface.Backend` that takes requests.

    policy : which media a request may name; None for bytes alone.
    queue : how many requests are served at once.
    """

    def __init__(self, policy: MediaPolicy | None, queue: RequestQueue) -> None:
        self.policy = policy or MediaPolicy()
        self._queue = queue
        self._channels: set[Channel] = set()
        self._changed = threading.Condition()
        self._closed = False

    @abstractmethod
    def _serve(self, request: Request, channel: Channel) -> results.Result:
        """The result, made on the request's thread; its events are put into the channel."""

    @abstractmethod
    def _time_limit(self, request: Request) -> float | None:
        """Seconds that the request may take, waiting included."""

    def _check(self, request: Request) -> None:  # noqa: B027
        """Raises PluginError for a request that is refused before it waits."""

    def reserved(self) -> AbstractContextManager[None]:
        """Keeps room for a request while it is read: one that would be refused need not be read.

        Leave it before the request is made. Raises PluginError ``busy`` where there is no room.
        """
        return self._queue.reserved()

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        return self._start(request, GenerateRequest)

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors, waited for. Raises PluginError: for the first item that cannot be embedded."""
        with self.stream_embed(request) as stream:  # Ctrl-C ends the work, too
            return stream.result()

    def stream_embed(self, request: EmbedRequest) -> EventStream[EmbedResult]:
        return self._start(request, EmbedRequest)

    def describe_video(self, request: DescribeRequest) -> EventStream[DescribeResult]:
        return self._start(request, DescribeRequest)

    def close(self) -> None:
        """Cancels what is under way, and waits a while for it to end."""
        with self._changed:
            self._closed = True
            channels = tuple(self._channels)
        for channel in channels:
            channel.fail(cancelled("the backend was closed"))
        with self._changed:
            self._changed.wait_for(lambda: not self._channels, CLOSE_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, request: Any, kind: type[Request]) -> EventStream[Any]:
        channel = Channel()
        stream = channel.stream()
        try:
            if self._closed:
                raise closed_error()
            if not isinstance(request, kind):
                named = f"a {type(request).__name__} came where a {kind.__name__} belongs"
                raise bad_request(named)
            self.policy.admit(request.media)
            self._check(request)
            channel.at_end(self.policy.hold(request.media))
            slot = self._queue.enter()
        except PluginError as error:
            channel.fail(error)
            return stream
        with self._changed:
            self._channels.add(channel)
            closed = self._closed
        if closed:  # since it was looked at above
            channel.fail(closed_error())
        channel.put(results.ProgressEvent("queued"))
        channel.at_end(lambda: self._queue.give_up(slot))
        channel.limit(request.timeout, self._time_limit(request))

        def run() -> None:
            self._end(slot, channel, self._outcome(slot, request, channel))

        def begin() -> None:
            thread = threading.Thread(target=run, name="mlx-onevision-request", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left
                self._end(slot, channel, to_plugin_error(error))

        # In the background: start() waits until the thread runs, which under load takes a while.
        # Who waits in the queue has no thread yet: there may be hundreds.
        self._queue.when_ready(slot, lambda: background.call_soon(begin))
        return stream

    def _outcome(
        self, slot: Slot, request: Request, channel: Channel
    ) -> results.Result | PluginError:
        try:
            return self._serve(request, channel) if self._queue.wait(slot) else cancelled()
        except BaseException as error:
            return to_plugin_error(error)

    def _end(self, slot: Slot, channel: Channel, outcome: results.Result | PluginError) -> None:
        # Before the host hears of the end: it may ask again at once.
        self._queue.release(slot)
        if isinstance(outcome, PluginError):
            channel.fail(outcome)
        else:
            usage = None if isinstance(outcome, EmbedResult) else outcome.usage
            if usage is not None:
                channel.put(results.UsageEvent(usage))
            channel.put(results.DoneEvent(outcome))
        with self._changed:
            self._channels.discard(channel)
            self._changed.notify_all()
