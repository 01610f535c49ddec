"""Events on their way from a backend to a host, from any thread to any other; standard library
only.

A backend makes a :class:`Channel`, puts events in from whichever thread it works on, and hands out
``channel.stream()``.
"""

import asyncio
import heapq
import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, Self, TypeVar

from mlx_onevision.plugins.contract.errors import PluginError, cancelled
from mlx_onevision.plugins.contract.results import DoneEvent, ErrorEvent, Event, Result

MAX_WAIT_SECONDS = 3600.0  # seconds; Python cannot wait for just any number of them

logger = logging.getLogger("mlx_onevision")

Wanted = TypeVar("Wanted", bound=Result)
Awaited = TypeVar("Awaited")


class Channel:
    """The backend's end. It ends once, with a done or an error event; later events are dropped."""

    def __init__(self) -> None:
        background.start()
        self._changed = threading.Condition()
        self._events: list[Event] = []
        self._ended = False
        self._at_end: list[Callable[[], object]] = []
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def stream(self) -> "EventStream[Any]":
        """The host's end. One channel has one."""
        return EventStream(self)

    def put(self, event: Event) -> bool:
        """Hands an event over; False, and nothing is done, when the channel has ended."""
        end = isinstance(event, DoneEvent | ErrorEvent)
        with self._changed:
            if self._ended:
                return False
            self._events.append(event)
            self._ended = end
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
            at_end, self._at_end = (self._at_end, []) if end else ([], self._at_end)
        for loop, future in waiters:
            _wake(loop, future)
        for function in at_end:
            function()
        return True

    def fail(self, error: PluginError) -> bool:
        """Ends it with an error; False when it has ended already."""
        return self.put(ErrorEvent.of(error))

    def limit(self, *seconds: float | None) -> None:
        """Ends it with an error after the shortest of these times; None is no limit."""
        limits = [limit for limit in seconds if limit is not None]
        if limits:
            least = min(limits)
            late = cancelled(f"the request was not done after {least:g} seconds")
            self.at_end(background.call_later(least, lambda: self.fail(late)).cancel)

    @property
    def ended(self) -> bool:
        """Whether there is anybody left to work for."""
        return self._ended

    def check(self, *_: object) -> None:
        """Raises PluginError ``cancelled`` when it has ended; to be called while working."""
        if self._ended:
            raise cancelled()

    def at_end(self, function: Callable[[], object]) -> None:
        """Has ``function`` called when it ends, on the thread that ends it; or now, if it has."""
        with self._changed:
            if not self._ended:
                self._at_end.append(function)
                return
        function()

    # The stream's side.

    def get(self, place: int) -> Event | None:
        """The event at a place, waited for; None behind the last."""
        with self._changed:
            self._changed.wait_for(lambda: place < len(self._events) or self._ended)
            return self._events[place] if place < len(self._events) else None

    async def get_async(self, place: int) -> Event | None:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if place < len(self._events):
                    return self._events[place]
                if self._ended:
                    return None
                waiter = (loop, loop.create_future())
                self._waiters.append(waiter)
            await waiter[1]

    def last(self) -> Event:
        """The done or error event, waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended)
            return self._events[-1]

    async def last_async(self) -> Event:
        place = 0
        while await self.get_async(place) is not None:
            place += 1
        return self._events[-1]


class EventStream(Iterator[Event], AsyncIterator[Event], Generic[Wanted]):
    """The events of one request: iterable from a thread and from asyncio, and once, as a file is.

    ``cancel()`` ends the request before its next token: the stream then ends with an error event of
    the code ``cancelled``. So it does when nobody holds the stream any more, when it is closed, at
    the end of ``with`` and ``async with``, and when an asyncio task is cancelled that waits for its
    next event. Every method may be called from any thread.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._place = 0
        self._closed = False
        weakref.finalize(self, _given_up, channel).atexit = False

    def cancel(self) -> None:
        """Ends the request, wherever it is. Nothing happens if it has ended."""
        self._channel.fail(cancelled())

    def close(self) -> None:
        """Cancels, and ends the iteration. A result that was there is still there."""
        self._closed = True
        self.cancel()

    async def aclose(self) -> None:
        """As :meth:`close`."""
        self.close()

    @property
    def ended(self) -> bool:
        """Whether the last event is there, whether it was read or not."""
        return self._channel.ended

    def at_end(self, function: Callable[[], object]) -> None:
        """Has ``function`` called when the last event is there, on the thread that puts it in; or
        now, if it is.
        """
        self._channel.at_end(function)

    def result(self) -> Wanted:
        """What the done event holds, waited for; the iteration goes on where it was. Raises
        PluginError: what ended the request instead.
        """
        return _result(self._channel.last())

    async def aresult(self) -> Wanted:
        """As :meth:`result`, in asyncio. A task cancelled in it cancels the request."""
        return _result(await self._watched(self._channel.last_async()))

    def __next__(self) -> Event:
        event = None if self._closed else self._channel.get(self._place)
        if event is None or self._closed:
            raise StopIteration
        self._place += 1
        return event

    async def __anext__(self) -> Event:
        event = None if self._closed else await self._watched(self._channel.get_async(self._place))
        if event is None or self._closed:
            raise StopAsyncIteration
        self._place += 1
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _watched(self, waiting: Coroutine[Any, Any, Awaited]) -> Awaited:
        try:
            return await waiting
        except asyncio.CancelledError:
            self.cancel()
            raise


def _result(last: Event) -> Any:
    if isinstance(last, DoneEvent):
        return last.result
    assert isinstance(last, ErrorEvent)
    raise last.error


def _given_up(channel: Channel) -> None:
    # Elsewhere: a stream may be collected while the thread that does it is inside the very locks
    # that cancelling needs.
    background.call_soon(lambda: channel.fail(cancelled("the request was given up")))


def _wake(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[None]") -> None:
    def settle() -> None:
        if not future.done():
            future.set_result(None)

    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed, and with it whoever waited
        pass


class Timer:
    """Something that is due at a time, unless it is cancelled before."""

    def __init__(self, due: float, function: Callable[[], object]) -> None:
        self.due = due
        self._function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """What it holds is let go of at once. Nothing happens if it has run."""
        self._function = None

    def run(self) -> None:
        function, self._function = self._function, None
        try:
            if function is not None:
                function()
        except Exception:
            logger.exception("a function in the background failed")


class Background:
    """One thread that runs short functions, one after another: those that must not hold up whoever
    wants them run, and those that are due later.
    """

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Timer] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """To be called before the first use, and again at will."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():  # as after a fork
                self._thread = threading.Thread(
                    target=self._run, name="mlx-onevision-background", daemon=True
                )
                self._thread.start()

    def call_soon(self, function: Callable[[], object]) -> None:
        """May be called at any point of any thread, by a finalizer within any lock, too."""
        self._wanted.put(Timer(0.0, function))

    def call_later(self, seconds: float, function: Callable[[], object]) -> Timer:
        timer = Timer(time.monotonic() + seconds, function)
        self._wanted.put(timer)
        return timer

    def _run(self) -> None:
        due: list[tuple[float, int, Timer]] = []
        numbers = itertools.count()
        while True:
            wait = due[0][0] - time.monotonic() if due else MAX_WAIT_SECONDS
            try:
                timer = self._wanted.get(timeout=min(max(wait, 0.0), MAX_WAIT_SECONDS))
                heapq.heappush(due, (timer.due, next(numbers), timer))
                del timer
            except queue.Empty:
                pass
            while due and due[0][0] <= time.monotonic():
                heapq.heappop(due)[2].run()


background = Background()
