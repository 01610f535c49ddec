"""Requests under way: their events as server-sent ones, and nobody works for a client that left."""

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.hosts.http.errors import to_http_error
from mlx_onevision.plugins.hosts.http.operations import EVENTS, AppState

Wanted = TypeVar("Wanted", bound=results.Result)

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
KEEP_ALIVE = b": keep-alive\n\n"

# Until an event of another stage, an error can still set the status.
_EARLY = ("queued", "loading", "preparing")


def line(values: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    data = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


class Answer(Protocol):
    """How a route writes the result of a GenerateRequest, whole or event by event."""

    def whole(self, found: results.GenerateResult) -> Any: ...

    def events(self, event: results.Event) -> Iterable[bytes]: ...


async def generate(
    state: AppState, request: Request, wanted: GenerateRequest, answer: Answer, streamed: bool
) -> Response:
    """The answer to a request for text. Its tokens are counted in the metrics.

    Raises:
        PluginError: what ended the request instead, where it is not streamed.
    """
    stream = state.backend.generate(wanted)
    if not streamed:
        found = await result(stream, request.receive)
        state.metrics.add_usage(found.usage)
        return JSONResponse(answer.whole(found))

    def write(event: results.Event) -> Iterable[bytes]:
        done = event.result if isinstance(event, results.DoneEvent) else None
        if isinstance(done, results.GenerateResult):
            state.metrics.add_usage(done.usage)
        return answer.events(event)

    return SentEvents(stream, write, state.settings.keep_alive_interval)


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
    """The events of a request as they come, each as what ``write`` makes of it, and a comment
    after ``interval`` seconds without any. An error before all others still sets the status.
    """

    def __init__(
        self,
        stream: EventStream[Any],
        write: Callable[[results.Event], Iterable[bytes]],
        interval: float,
    ) -> None:
        super().__init__(media_type=EVENTS, headers=HEADERS)
        # The length is not known.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._stream, self._write, self._interval = stream, write, interval
        self._begun = False

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
        held, waiting = b"", None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(_next(self._stream))
                done, _ = await asyncio.wait({waiting}, timeout=self._interval)
                if not done:
                    await self._send(send, held + KEEP_ALIVE)
                    held = b""
                    continue
                event, waiting = waiting.result(), None
                if event is None:
                    break
                if isinstance(event, results.ErrorEvent) and not self._begun:
                    return to_http_error(event.error).response()
                held += b"".join(self._write(event))
                early = isinstance(event, results.ProgressEvent) and event.stage in _EARLY
                if held and (self._begun or not early):
                    await self._send(send, held)
                    held = b""
        finally:
            if waiting is not None:
                await _stop(waiting)
        await self._send(send, held, more=False)
        return None

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _next(stream: EventStream[Any]) -> results.Event | None:
    return await anext(stream, None)


async def _watch(receive: Receive, stream: EventStream[Any]) -> None:
    """Cancels the request when its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


async def _stop(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
