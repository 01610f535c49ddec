"""Requests under way: their events as server-sent ones, and nobody works for a client that left."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mlx_onevision.plugins.contract.results import ErrorEvent, Event, ProgressEvent, Result
from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.hosts.http.errors import refusal

Wanted = TypeVar("Wanted", bound=Result)

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
KEEP_ALIVE = b": keep-alive\n\n"

# Until one of other stages, an error can still be told by the status.
_EARLY = ("queued", "loading", "preparing")


def line(values: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    data = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


async def result(stream: EventStream[Wanted], receive: Receive) -> Wanted:
    """The result, waited for as long as the client does.

    Raises:
        PluginError: what ended the request instead.
    """
    async with stream:
        watcher = asyncio.create_task(_watch(receive, stream))
        try:
            return await stream.aresult()
        finally:
            await _stop(watcher)


class SentEvents(Response):
    """The events of a request as they come.

    write : an event, as what is sent for it.
    silence : seconds after which a comment is sent instead.

    The status is decided late: a request that is refused before anything has come of it gets the
    error's own status and body.
    """

    def __init__(
        self,
        stream: EventStream[Any],
        write: Callable[[Event], Iterable[bytes]],
        silence: float,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=HEADERS)
        # Its length is not known.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._stream, self._write, self._silence = stream, write, silence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_watch(receive, self._stream))
        try:
            refused = await self._send_all(send)
        finally:
            self._stream.close()
            await _stop(watcher)
        if refused is not None:
            await refused(scope, receive, send)

    async def _send_all(self, send: Send) -> Response | None:
        """Every event sent; or, with nothing sent, what is to be answered instead."""
        out = _Out(send, self.raw_headers)
        waiting: asyncio.Task[Event | None] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(_next(self._stream))
                done, _ = await asyncio.wait({waiting}, timeout=self._silence)
                if not done:
                    await out.flush(KEEP_ALIVE)
                    continue
                event, waiting = waiting.result(), None
                if event is None:
                    break
                if isinstance(event, ErrorEvent) and not out.begun:
                    return refusal(event.error)
                out.hold(b"".join(self._write(event)))
                if not (isinstance(event, ProgressEvent) and event.stage in _EARLY) or out.begun:
                    await out.flush()
        finally:
            if waiting is not None:
                await _stop(waiting)
        await out.finish()
        return None


class _Out:
    """A response that begins with the first bytes that cannot wait."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._headers, self._held = send, headers, b""
        self.begun = False

    def hold(self, data: bytes) -> None:
        self._held += data

    async def flush(self, data: bytes = b"", *, more: bool = True) -> None:
        data, self._held = self._held + data, b""
        if not data and more:
            return
        if not self.begun:
            self.begun = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": self._headers}
            )
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def finish(self) -> None:
        await self.flush(more=False)


async def _next(stream: EventStream[Any]) -> Event | None:
    return await anext(stream, None)


async def _watch(receive: Callable[[], Awaitable[Message]], stream: EventStream[Any]) -> None:
    """Cancels the request when its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


async def _stop(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
