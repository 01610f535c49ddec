"""What a route is, the state that all routes share, and how they answer: whole, or with the events
of a request as server-sent ones. A request ends when its client leaves.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.hosts.http.errors import HTTPError, to_http_error
from mlx_onevision.plugins.hosts.http.middleware import Metrics
from mlx_onevision.plugins.hosts.http.request_body import BodyReader
from mlx_onevision.plugins.hosts.http.responses.memory import ResponseMemory
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs
from mlx_onevision.plugins.service.spool import Spool

Returned = TypeVar("Returned")

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

LAST_CHUNK = "[DONE]"  # the last line of a stream of chat completions


@dataclass(eq=False)
class AppState:
    """A backend, and how it is served.

    model : the name it has for clients. created : seconds since 1970.
    threads : for calls that block; more than the backend takes on at once.
    uploads : what was sent by itself, where that is taken.
    operations : the routes that there are.
    openapi : the answer of ``/openapi.json``, once it was asked for.
    """

    backend: Backend
    settings: ServerSettings
    model: str
    created: int
    threads: Executor
    reader: BodyReader
    jobs: Jobs
    metrics: Metrics
    operations: "tuple[Operation, ...]"
    uploads: Spool | None = None
    openapi: asyncio.Task[Response] | None = None
    memory: ResponseMemory = field(default_factory=ResponseMemory)

    async def blocking(self, function: Callable[[], Returned]) -> Returned:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)

    def check_model(self, name: str | None) -> None:
        """Raises HTTPError 404 for any model but the one served: none is loaded by its name."""
        if name is not None and name != self.model:
            message = (
                f"there is no model {name[:80]!r} here; the one that is served is {self.model!r}"
            )
            raise HTTPError(404, message, "model_not_found", "model")

    def max_tokens(self, asked: int | None, name: str, notes: list[str]) -> int | None:
        """A limit of an answer within the server's own; ``notes`` gets a line where it is less."""
        most = self.settings.max_tokens
        if asked is None or most is None or asked <= most:
            return asked
        notes.append(f"{name} is {asked}; this server answers with {most} tokens at most")
        return most


Handler = Callable[[AppState, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """One method of one path; declared beside its handler, listed in ``app``.

    path : as the router reads it; ``{name:path}`` takes slashes, too.
    name : ``operationId``. takes : the model of the body. takes_file : whether the body is a file.
    gives : the type of each media type of a good answer; for an event stream, of an event's data.
    ends : the data of its last event, where that is no JSON.
    status : of a good answer. refuses : statuses of errors that only this route has.
    """

    method: str
    path: str
    handler: Handler
    name: str
    summary: str
    gives: Mapping[str, Any]
    takes: type[BaseModel] | None = None
    takes_file: bool = False
    ends: str | None = None
    status: int = 200
    refuses: tuple[int, ...] = ()


Wanted = TypeVar("Wanted", bound=results.Result)

STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
KEEP_ALIVE_COMMENT = b": keep-alive\n\n"

# Progress of these stages is held back: once anything is sent the status is 200, and an error could
# not set its own.
_STAGES_BEFORE_OUTPUT = ("queued", "loading", "preparing")


def line(values: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    data = values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {data}\n\n".encode()


class Answer(Protocol):
    """How a route writes the answers to one request, whole or event by event."""

    def whole(self, found: Sequence[results.GenerateResult]) -> Any: ...

    def events(self, event: results.Event, index: int) -> Iterable[bytes]: ...


@dataclass(frozen=True)
class Prepared:
    """A request for text as the backend takes it: the answers that are made together.

    logprobs, json_schema : the names that the route's fields for these have.
    start : called with each of them instead of the backend's ``generate``.
    """

    requests: Sequence[GenerateRequest]
    answer: Answer
    streamed: bool
    logprobs: str
    json_schema: str
    start: Callable[[GenerateRequest], EventStream[results.GenerateResult]] | None = None


async def generate(state: AppState, request: Request, prepared: Prepared) -> Response:
    """The answers to a request for text. Their tokens are counted in the metrics. Raises HTTPError:
    400 for what the backend cannot do; PluginError: what ended one of them instead, where they are
    not streamed.
    """
    await _check_capabilities(state, prepared)
    answer = prepared.answer
    streams = [(prepared.start or state.backend.generate)(one) for one in prepared.requests]
    state.reader.release_after(request.scope, streams)
    if not prepared.streamed:
        found = await all_results(streams, request.receive)
        for one in found:
            state.metrics.add_usage(one.usage)
        return JSONResponse(answer.whole(found))

    def write(event: results.Event, index: int) -> Iterable[bytes]:
        done = event.result if isinstance(event, results.DoneEvent) else None
        if isinstance(done, results.GenerateResult):
            state.metrics.add_usage(done.usage)
        return answer.events(event, index)

    return SentEvents(streams, write, state.settings.keep_alive_interval)


async def _check_capabilities(state: AppState, prepared: Prepared) -> None:
    """Raises HTTPError 400 for what the backend cannot do, naming the request's field."""
    wanted = prepared.requests[0]
    for capability in ("logprobs", "json_schema"):
        if getattr(wanted, capability) is not None:
            info = await state.blocking(state.backend.info)
            if capability not in info.capabilities:
                name = getattr(prepared, capability)
                message = f"{name} is not supported by this model; leave it out"
                raise HTTPError(400, message, param=name)


async def result(stream: EventStream[Wanted], receive: Receive) -> Wanted:
    """The result, waited for as long as the client does. Raises PluginError: what ended the request
    instead.
    """
    (found,) = await all_results([stream], receive)
    return found


async def all_results(streams: Sequence[EventStream[Wanted]], receive: Receive) -> list[Wanted]:
    """As :func:`result`, of several; the first error ends all of them."""
    watcher = asyncio.create_task(_watch(receive, streams))
    try:
        return await asyncio.gather(*(stream.aresult() for stream in streams))
    finally:
        for stream in streams:
            stream.close()
        await _stop(watcher)


class SentEvents(Response):
    """Sends the events of several streams as they come, and a comment after ``interval`` seconds
    without any. The first error ends all streams; it sets the status if nothing has been sent yet.

    write : makes the bytes of an event, given with the number of its stream.
    """

    def __init__(
        self,
        streams: Sequence[EventStream[Any]],
        write: Callable[[results.Event, int], Iterable[bytes]],
        interval: float,
    ) -> None:
        super().__init__(media_type=EVENTS, headers=STREAM_HEADERS)
        # The length is not known.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._streams, self._write, self._interval = streams, write, interval
        self._refused: Callable[[HTTPError], Response] = HTTPError.response
        self._keep_alive, self._begun = KEEP_ALIVE_COMMENT, False

    def as_lines(self, media_type: str, refused: Callable[[HTTPError], Response]) -> None:
        """For a stream that is no server-sent events, and knows no comments; with errors of its
        own form.
        """
        self.headers["Content-Type"] = media_type
        self._keep_alive, self._refused = b"", refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_watch(receive, self._streams))
        try:
            refused = await self._send_all(send)
        finally:
            for stream in self._streams:
                stream.close()
            await _stop(watcher)
        if refused is not None:
            await refused(scope, receive, send)

    async def _send_all(self, send: Send) -> Response | None:
        """Every event sent; or, with nothing sent, what is to be answered instead."""
        held = b""
        async for index, event in _merged(self._streams, self._interval):
            if event is None:
                await self._send(send, held + self._keep_alive)
                held = b""
                continue
            failed = isinstance(event, results.ErrorEvent)
            if failed and not self._begun:
                return self._refused(to_http_error(event.error))
            held += b"".join(self._write(event, index))
            early = (
                isinstance(event, results.ProgressEvent) and event.stage in _STAGES_BEFORE_OUTPUT
            )
            if held and (self._begun or not early):
                await self._send(send, held)
                held = b""
            if failed:
                break
        await self._send(send, held, more=False)
        return None

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _merged(
    streams: Sequence[EventStream[Any]], interval: float
) -> AsyncIterator[tuple[int, results.Event | None]]:
    """The events of all streams with the number of their own; None after ``interval`` seconds."""

    def ask(index: int) -> asyncio.Future[results.Event | None]:
        return asyncio.ensure_future(anext(streams[index], None))

    waiting = {ask(index): index for index in range(len(streams))}
    try:
        while waiting:
            done, _ = await asyncio.wait(
                waiting, timeout=interval, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield 0, None
            for future in done:
                index, event = waiting.pop(future), future.result()
                if event is not None:
                    yield index, event
                    waiting[ask(index)] = index
    finally:
        for future in waiting:
            await _stop(future)


async def _watch(receive: Receive, streams: Sequence[EventStream[Any]]) -> None:
    """Cancels the requests when their client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    for stream in streams:
        stream.cancel()


async def _stop(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
