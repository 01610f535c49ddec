"""Connections: how many there are, and how slow each may be.

A client that sends its request or takes its answer too slowly is cut off after a while, and at once
where its connection is needed: there are fewer of them than files that the process may have open,
so that neither a connection nor a file of the model's is ever refused for want of a descriptor.
"""

import asyncio
import errno
import logging
import math
import resource
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any, ClassVar

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from mlx_onevision.plugins.contract.errors import bad_request
from mlx_onevision.plugins.hosts.http.errors import HTTPError

ACCEPTED_AT_A_TIME = 16  # connections that asyncio accepts at a time
# Descriptors for all else, and for what is accepted and not counted yet.
RESERVED_DESCRIPTORS = 64 + 4 * ACCEPTED_AT_A_TIME
HEALTH_CONNECTIONS = 16  # connections beyond the others, for those who ask for the server's health
MIN_CONNECTIONS, MAX_CONNECTIONS = 16, 2048  # connections
WANTED_DESCRIPTORS = 4096  # descriptors, where the system gives them
MIN_BYTES_PER_SECOND = 4096  # bytes a second in which a client takes its answer, or sends its body
# The lag (negative: ahead) below which a client counts as new, and is not dropped for being slow.
FRESH_CLIENT_LAG_SECONDS = -0.5
LOG_INTERVAL_SECONDS = 60.0  # between two lines about the same
# Seconds that a request waits for others to show whether they are slow.
ADMISSION_WAIT_SECONDS = 1.0

HEALTH_PATH = "/health"
# In a request's scope: a future, done when the connection is lost. asyncio does not see that while
# uvicorn reads no further, that is once 64 KB of the body wait to be taken.
GONE_KEY = "mlx_onevision.gone"

logger = logging.getLogger("mlx_onevision")


def raise_limit() -> None:
    """Lets this process have as many files open as it wants, where the system allows it: a shell on
    a Mac allows 256 unless it is asked for more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections() -> int:
    """As many as the files that the process may have open leave room for. Raises PluginError:
    ``bad_request`` where these are too few.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    most = soft - RESERVED_DESCRIPTORS - HEALTH_CONNECTIONS
    if most < MIN_CONNECTIONS:
        needed = MIN_CONNECTIONS + RESERVED_DESCRIPTORS + HEALTH_CONNECTIONS
        message = f"{soft} files may be open at once, which is too few to serve"
        raise bad_request(message, f"allow more with ulimit -n {max(needed, 256)}")
    return min(most, MAX_CONNECTIONS)


class LimitedWarning:
    """Logs a warning, and after that no other one for a while."""

    def __init__(self) -> None:
        self._next = 0.0

    def warn(self, message: str, *arguments: object) -> None:
        now = monotonic()
        if now >= self._next:
            self._next = now + LOG_INTERVAL_SECONDS
            logger.warning(message, *arguments)


class Connections:
    """All of a server's. Used from the event loop alone.

    max_requests : at once, but for those about the server's health. There may be
        ``HEALTH_CONNECTIONS`` more connections. Beyond either, the slowest clients' are closed.
    stall_timeout : seconds that a request's head may take, and that a client may not take its
        answer.
    """

    def __init__(self, max_requests: int, stall_timeout: float) -> None:
        self._max_requests, self._stall_timeout = max_requests, stall_timeout
        self._all: set[Connection] = set()
        self._full, self._failed = LimitedWarning(), LimitedWarning()

    def protocol(self) -> type["Connection"]:
        """What uvicorn makes for each of them."""
        return type("BoundConnection", (Connection,), {"among": self})

    def opened(self, one: "Connection") -> None:
        self._all.add(one)
        if len(self._all) > self._max_requests + HEALTH_CONNECTIONS and not self._drop_slowest(
            self._all - {one}
        ):
            self._drop(one)

    async def has_room(self, one: "Connection") -> bool:
        """Waits up to ``ADMISSION_WAIT_SECONDS`` until one more request can be answered: of many
        that came at once none counts as slow yet; a moment later they have been answered, or are
        slow and can be dropped. False where the wait ends without room, or where a connection that
        is opened meanwhile has taken this one's place.
        """
        one.queued = started = monotonic()
        try:
            while not self._has_room():
                if one not in self._all or monotonic() - started > ADMISSION_WAIT_SECONDS:
                    return False
                await asyncio.sleep(ADMISSION_WAIT_SECONDS / 50)
            return True
        finally:
            one.queued = None
            if not one.outgoing.is_closing():
                self._all.add(one)  # until it has taken its answer

    def _has_room(self) -> bool:
        """For one more request than those that are answered now."""
        if len(self._all) <= self._max_requests:
            return True
        busy = {other for other in self._all if other.is_busy}
        return len(busy) < self._max_requests or self._drop_slowest(busy)

    def _drop_slowest(self, some: set["Connection"]) -> bool:
        """Whether there was any that keeps others waiting."""
        self._full.warn(
            "%d connections are open, as many as the limit of open files leaves room for; "
            "those on which nothing comes are closed",
            len(self._all),
        )
        now = monotonic()
        lags = sorted(((one.lag(now), id(one), one) for one in some), reverse=True)
        slow = [(lag, one) for lag, _, one in lags if lag > FRESH_CLIENT_LAG_SECONDS]
        for place, (lag, one) in enumerate(slow[: 1 + self._max_requests // 16]):
            if place == 0 or lag > 1:  # several, as looking for them takes time
                self._drop(one)
        return bool(slow)

    def closed(self, one: "Connection") -> None:
        self._all.discard(one)

    def sweep(self) -> None:
        """Closes those that have been slow for too long; to be called every now and then."""
        now = monotonic()
        for one in [one for one in self._all if one.overdue(now) > self._stall_timeout]:
            self._drop(one)

    def _drop(self, one: "Connection") -> None:
        self._all.discard(one)
        if one.queued is None:
            one.outgoing.abort()  # else it is answered that there is no room

    def failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's exception handler: one line where there are no descriptors."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self._failed.warn("too many files are open, so that connections have to wait")
        else:
            loop.default_exception_handler(context)


class Connection(H11Protocol):
    """uvicorn's protocol, which knows how slow its client is."""

    among: ClassVar[Connections]

    outgoing: "Outgoing"
    queued: float | None = None
    """Since when its request waits until there is room for it."""
    _since = 0.0  # since when something is waited for from the client
    _received = 0  # bytes, since then

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.outgoing = Outgoing(transport, self._is_sending)
        self._application, self.app = self.app, self._answer
        self._gone: asyncio.Future[None] = self.loop.create_future()
        self._wait()
        super().connection_made(self.outgoing)
        # Else a token waits 40 ms for the acknowledgement of the one before (asyncio sets it
        # only where the listening socket was made with the protocol's number).
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.among.opened(self)

    def data_received(self, data: bytes) -> None:
        if self.outgoing.lingers:
            return  # its request was refused before it was read
        if not self._received and not self.in_request:
            self._wait()
        self._received += len(data)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.among.closed(self)
        self._leave()
        super().connection_lost(exc)

    def _leave(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def shutdown(self) -> None:
        if self.outgoing.lingers:
            self.outgoing.abort()
        else:
            super().shutdown()

    def _wait(self) -> None:
        self._since, self._received = monotonic(), 0

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[GONE_KEY] = self._gone
        if scope["path"] == HEALTH_PATH or await self.among.has_room(self):
            await self._application(scope, receive, send)
            return
        message = "too many requests are under way; try again in a moment"
        error = HTTPError(429, message, "rate_limit_exceeded")
        await error.response({"Connection": "close"})(scope, receive, send)

    @property
    def in_request(self) -> bool:
        # None until the first request, whatever uvicorn says of its type.
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)
        return cycle is not None and not cycle.response_complete

    @property
    def is_busy(self) -> bool:
        """Whether a request of its is answered, unless it is about the server's health."""
        return self.in_request and self.queued is None and self.scope["path"] != HEALTH_PATH

    def overdue(self, now: float) -> float:
        """Seconds for which the head of a request, or the end of an answer, is waited for."""
        if behind := self.outgoing.lag(now):
            self._since = now  # it takes the answer before it sends the next request
            return behind
        return 0.0 if self.in_request else now - self._since

    def lag(self, now: float) -> float:
        """How far the client is behind the minimum transfer rate, in seconds; -inf while the
        server, not the client, has to act; for a queued request, its time in the queue.
        """
        if self.queued is not None:
            return now - self.queued
        behind = self.overdue(now)
        if self.in_request and self.cycle.more_body:
            behind = max(behind, now - self._since) - self._received / MIN_BYTES_PER_SECOND
        return behind or -math.inf

    def send_400_response(self, msg: str) -> None:
        """In the form that every error has, where an answer can still be sent."""
        del msg
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = HTTPError(400, "this is not HTTP as it has to be")
            answer = error.response({"Connection": "close"})
            headers = [*self.server_state.default_headers, *answer.raw_headers]
            data = h11.Data(data=bytes(answer.body))
            head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (head, data, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.in_request:  # whoever waits for the rest of the body need not
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._leave()
        self.transport.close()

    def _is_sending(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)


class Outgoing(asyncio.Transport):
    """A connection's transport, which knows how slowly its client takes what is written.

    is_sending : whether the client may be in the midst of its request. To close the connection then
        would reset it, and take from the client what it was answered: it stays half open, and what
        comes is not read, until the client closes it.
    """

    def __init__(self, inner: asyncio.Transport, is_sending: Callable[[], bool]) -> None:
        super().__init__()
        self._inner, self._is_sending = inner, is_sending
        self.lingers = False
        self._since = 0.0  # since when something is buffered, or it was closed
        self._buffered = 0  # bytes, since then; not those that the system has taken at once

    def write(self, data: bytes | bytearray | memoryview) -> None:
        before = self._inner.get_write_buffer_size()
        self._inner.write(data)
        if not before:
            self._since, self._buffered = monotonic(), 0
        self._buffered += self._inner.get_write_buffer_size() - before

    def lag(self, now: float) -> float:
        """Seconds that the client is behind one that takes what is written as slowly as it may."""
        if self.lingers:
            return now - self._since
        left = self._inner.get_write_buffer_size()
        return now - self._since - (self._buffered - left) / MIN_BYTES_PER_SECOND if left else 0.0

    def close(self) -> None:
        if self.is_closing():
            return
        if self._is_sending():
            self.lingers, self._since = True, monotonic()
            self._inner.write_eof()
            self._inner.resume_reading()
        else:
            self._inner.close()

    def abort(self) -> None:
        self._inner.abort()

    def is_closing(self) -> bool:
        return self.lingers or self._inner.is_closing()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)
