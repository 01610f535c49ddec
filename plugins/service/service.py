"""A backend around something that answers: queue, limits, cancellation, errors, memory. Standard
library only; what answers is loaded when it is first asked.

Every request has a thread of its own, which waits for its turn, and whose errors are its own. What
it calls decides how much of the work is done together.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from mlx_onevision.plugins.contract.errors import (
    PluginError,
    bad_request,
    cancelled,
    to_plugin_error,
)
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import (
    DescribeResult,
    DoneEvent,
    EmbedResult,
    GenerateResult,
    ModelInfo,
    ProgressEvent,
    Result,
    UsageEvent,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream, background
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.model_keeper import CLOSED, ModelKeeper

# Whose turn it is: so many requests at once, so many waiting in line, and no more; standard
# library only.


class Turn:
    """A request's place, in line or under way."""


class RequestQueue:
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


Request = GenerateRequest | EmbedRequest | DescribeRequest
Answer = TypeVar("Answer", bound=Result)

DEAD = PluginError("internal", "what runs the model has died", "open the backend again")


@dataclass(frozen=True)
class Limits:
    """How much is taken on. For whoever opens the backend; a request cannot widen it.

    active : requests at once. waiting : in line behind them; more are refused as ``busy``.
    timeout : seconds that a request may take, waiting in line included; its own may be shorter.
    film_timeout : the same for a video that is described, which may last for hours.
    max_tokens : of one answer.
    keep_alive : seconds after the last request when the model is freed; None for never.
    """

    active: int = 8
    waiting: int = 8
    timeout: float | None = 300.0
    film_timeout: float | None = 6 * 3600.0
    max_tokens: int = 4096
    keep_alive: float | None = 300.0

    def __post_init__(self) -> None:
        """Raises PluginError for a number out of range."""
        for name, least in (("active", 1), ("waiting", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise bad_request(f"the limit {name} is {getattr(self, name)}, below {least}")
        for name in ("timeout", "film_timeout", "keep_alive"):
            if (getattr(self, name) or 0) < 0:
                raise bad_request(f"the limit {name} is {getattr(self, name)}, below 0")


class Answering(Protocol):
    """What a service loads. Called from several threads at once.

    Each call may put events into the channel, looks at ``channel.check`` as it goes, and returns
    its result or raises. It reads media by way of ``policy`` alone.
    """

    @property
    def healthy(self) -> bool:
        """False once it has died: whatever it is asked, it fails at once, what is under way too."""
        ...

    def generate(
        self, request: GenerateRequest, policy: MediaPolicy, channel: Channel
    ) -> GenerateResult: ...

    def embed(
        self, request: EmbedRequest, policy: MediaPolicy, channel: Channel
    ) -> EmbedResult: ...

    def describe_video(
        self, request: DescribeRequest, policy: MediaPolicy, channel: Channel
    ) -> DescribeResult: ...

    def close(self) -> None: ...


class Service:
    """A :class:`~mlx_onevision.plugins.interface.Backend`.

    load : makes what answers, when it is first asked and again after it was freed.
    describe : what :meth:`info` says, known without loading.
    """

    def __init__(
        self,
        load: Callable[[], Answering],
        describe: Callable[[], ModelInfo],
        *,
        policy: MediaPolicy | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.policy = policy or MediaPolicy()
        self.limits = limits or Limits()
        self._describe = describe
        self._keeper: ModelKeeper[Answering] = ModelKeeper(load, self.limits.keep_alive)
        self._turns = RequestQueue(self.limits.active, self.limits.waiting)
        self._channels: set[Channel] = set()
        self._closed = self._dead = False
        self._lock = threading.Lock()

    def info(self) -> ModelInfo:
        """Raises PluginError when the model cannot be found."""
        try:
            known = self._describe()
        except Exception as error:
            raise to_plugin_error(error) from error
        active, waiting = self._turns.counts
        return replace(
            known,
            loaded=self._keeper.loaded,
            active=active,
            waiting=waiting,
            healthy=known.healthy and not self._has_died(self._keeper.kept),
        )

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        return self._start(
            request,
            GenerateRequest,
            lambda answering, channel: answering.generate(request, self.policy, channel),
        )

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Raises PluginError."""
        with self.stream_embed(request) as stream:  # Ctrl-C ends the work, too
            return stream.result()

    def stream_embed(self, request: EmbedRequest) -> EventStream[EmbedResult]:
        return self._start(
            request,
            EmbedRequest,
            lambda answering, channel: answering.embed(request, self.policy, channel),
        )

    def describe_video(self, request: DescribeRequest) -> EventStream[DescribeResult]:
        return self._start(
            request,
            DescribeRequest,
            lambda answering, channel: answering.describe_video(request, self.policy, channel),
        )

    def unload(self) -> None:
        self._keeper.unload()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            channels = tuple(self._channels)
        for channel in channels:
            channel.fail(cancelled("the backend was closed"))
        self._keeper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(
        self,
        request: Request,
        kind: type[Request],
        work: Callable[[Answering, Channel], Result],
    ) -> EventStream[Any]:
        channel = Channel()
        stream = channel.stream()
        try:
            self._admit(request, kind)
            turn = self._turns.enter()
        except PluginError as error:
            channel.fail(error)
            return stream
        with self._lock:
            self._channels.add(channel)
            closed = self._closed
        if closed:  # between the look and the entry
            channel.fail(CLOSED)
        channel.at_end(lambda: self._turns.leave_line(turn))
        channel.at_end(self._keeper.wake)
        film = isinstance(request, DescribeRequest)
        most = self.limits.film_timeout if film else self.limits.timeout
        channel.limit(request.timeout, most)

        def run() -> None:
            self._end(turn, channel, self._outcome(channel, lambda: self._turns.wait(turn), work))

        def begin() -> None:
            thread = threading.Thread(target=run, name="mlx-onevision-request", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left
                self._end(turn, channel, to_plugin_error(error))

        # It waits until the thread runs, which in a crowd takes a while.
        background.soon(begin)
        return stream

    def _end(self, turn: Turn, channel: Channel, outcome: Result | PluginError) -> None:
        # Before the host hears of the end: it may ask again at once.
        self._turns.end(turn)
        with self._lock:
            self._channels.discard(channel)
        if isinstance(outcome, PluginError):
            channel.fail(outcome)
            return
        usage = None if isinstance(outcome, EmbedResult) else outcome.usage
        if usage is not None:
            channel.put(UsageEvent(usage))
        channel.put(DoneEvent(outcome))

    def _outcome(
        self,
        channel: Channel,
        turn_came: Callable[[], bool],
        work: Callable[[Answering, Channel], Result],
    ) -> Result | PluginError:
        """On the request's thread: everything from its place in line to its result."""
        try:
            channel.put(ProgressEvent("queued"))
            if not turn_came():
                return cancelled()
            if self._has_died(self._keeper.kept):
                return DEAD
            if not self._keeper.loaded:
                channel.put(ProgressEvent("loading"))
            answering = self._keeper.borrow(channel.check)
            try:
                return work(answering, channel)
            finally:
                self._has_died(answering)
                del answering
                self._keeper.give_back()
        except BaseException as error:
            return to_plugin_error(error)

    def _has_died(self, answering: Answering | None) -> bool:
        """It stays so, also where what has died was freed since."""
        self._dead = self._dead or (answering is not None and not answering.healthy)
        return self._dead

    def _admit(self, request: Any, kind: type[Request]) -> None:
        """What can be said of a request before it waits."""
        if self._closed:
            raise CLOSED
        if self._has_died(self._keeper.kept):
            raise DEAD
        if not isinstance(request, kind):
            raise bad_request(f"a {type(request).__name__} came where a {kind.__name__} belongs")
        self.policy.admit(request.media)
        if not isinstance(request, EmbedRequest):
            self.policy.check_frames(request.num_frames)
            asked = request.max_tokens or 1
            if asked > self.limits.max_tokens:
                raise bad_request(
                    f"max_tokens is {asked}", f"{self.limits.max_tokens} are allowed here"
                )
