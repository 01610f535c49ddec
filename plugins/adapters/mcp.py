"""A backend in a process of its own, spoken to over MCP on its stdin and stdout.

    open_backend("mcp", command=["mlx-onevision", "mcp", "--contract", "--model", "7b"])

What has happened to the process, its memory, a crash, a library's faults, stays there. The process
is this backend's own: it is started with it, and ends with it. Needs the extra ``mcp``.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from mlx_onevision.plugins.adapters.mcp_process import GONE, called, connected, unstarted
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
    Result,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream
from mlx_onevision.plugins.service.model_keeper import CLOSED

if TYPE_CHECKING:
    from mcp import Client

Request = GenerateRequest | EmbedRequest | DescribeRequest
Got = TypeVar("Got")

PATIENCE_SECONDS = 5.0  # for the process to end


class McpBackend:
    """A :class:`~mlx_onevision.plugins.interface.Backend`.

    command : the program and its arguments; a server that offers the contract.
    env : beside this process's own environment.
    folder : where it is started. Paths in requests are absolute, so it hardly matters.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(command, str) or not command:
            raise bad_request("command has to be a list", "give the program and its arguments")
        self._command, self._env, self._folder = tuple(command), dict(env or {}), folder
        self._loop = asyncio.new_event_loop()
        self._client: asyncio.Future[Client] = self._loop.create_future()
        self._end = asyncio.Event()
        self._channels: set[Channel] = set()
        self._lock = threading.Lock()
        self._closed = self._gone = False
        self._known: ModelInfo | None = None
        self._thread = threading.Thread(target=self._run, name="mlx-onevision-mcp", daemon=True)
        self._thread.start()

    def info(self) -> ModelInfo:
        """Raises PluginError."""
        try:
            self._known = ModelInfo.from_dict(self._waited(self._answer("info", {})))
        except PluginError:
            if not self._gone or self._known is None:
                raise
            return replace(self._known, healthy=False, loaded=False, active=0, waiting=0)
        return self._known

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        return self._start("generate", request, GenerateRequest, GenerateResult)

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Raises PluginError."""
        with self.stream_embed(request) as stream:
            return stream.result()

    def stream_embed(self, request: EmbedRequest) -> EventStream[EmbedResult]:
        return self._start("embed", request, EmbedRequest, EmbedResult)

    def describe_video(self, request: DescribeRequest) -> EventStream[DescribeResult]:
        return self._start("describe_video", request, DescribeRequest, DescribeResult)

    def unload(self) -> None:
        """Raises PluginError."""
        self._waited(self._answer("unload", {}))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            channels = tuple(self._channels)
        for channel in channels:
            channel.fail(cancelled("the backend was closed"))
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE_SECONDS)

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
        self, name: str, request: Any, kind: type[Request], result: type[Result]
    ) -> EventStream[Any]:
        channel = Channel()
        stream = channel.stream()
        if not isinstance(request, kind):
            what = type(request).__name__
            channel.fail(bad_request(f"a {what} came where a {kind.__name__} belongs"))
            return stream
        try:
            task = self._scheduled(self._served(name, request, result, channel), channel)
        except PluginError as error:
            channel.fail(error)
            return stream
        channel.at_end(lambda: self._let_go(channel, task))
        return stream

    def _let_go(self, channel: Channel, task: "Future[None]") -> None:
        with self._lock:
            self._channels.discard(channel)
        with suppress(RuntimeError):  # the loop has ended
            task.cancel()  # nothing, where it has ended by itself

    def _waited(self, asking: Coroutine[Any, Any, Got]) -> Got:
        try:
            return self._scheduled(asking).result()
        except CancelledError:
            raise CLOSED from None

    def _scheduled(
        self, asking: Coroutine[Any, Any, Got], channel: Channel | None = None
    ) -> "Future[Got]":
        with self._lock:  # so that close() either refuses it or ends it
            if not self._closed:
                if channel is not None:
                    self._channels.add(channel)
                return asyncio.run_coroutine_threadsafe(asking, self._loop)
        asking.close()
        raise CLOSED

    # On the loop's thread.

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._life())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()

    async def _life(self) -> None:
        connection = asyncio.create_task(self._connection())
        await self._end.wait()
        if not self._client.done():
            connection.cancel()
        await asyncio.gather(connection, return_exceptions=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self) -> None:
        try:
            async with connected(self._command, self._env, self._folder) as client:
                self._client.set_result(client)
                await self._end.wait()
        except Exception as error:
            if not self._client.done():
                self._client.set_exception(unstarted(self._command, error))
                self._client.exception()  # looked at, if nobody asks
        finally:
            self._gone = True

    async def _served(
        self, name: str, request: Request, result: type[Result], channel: Channel
    ) -> None:
        try:
            arguments = await asyncio.to_thread(request.to_dict)  # of a film, many bytes
            found = await self._answer(name, arguments, channel)
            channel.put(DoneEvent(result.from_dict(found)))
        except Exception as error:
            channel.fail(to_plugin_error(error))

    async def _answer(
        self, name: str, arguments: dict[str, Any], channel: Channel | None = None
    ) -> dict[str, Any]:
        """What a tool of the contract answers, its events put into the channel."""
        client = await asyncio.shield(self._client)
        try:
            return await called(client, name, arguments, channel)
        except PluginError as error:
            self._gone = self._gone or error is GONE
            raise
