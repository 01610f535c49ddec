"""Messages of the protocol between the pipes and the SDK.

In the place of the SDK's own: that one reads lines of any length and leaves those that it cannot
read without an answer, so that whoever waits for one waits for good.
"""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import mcp_types as types
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.shared.message import SessionMessage
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from mlx_onevision.plugins.contract.errors import PluginError, to_plugin_error
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings
from mlx_onevision.plugins.hosts.mcp.pipes import Pipes, TooLong, lines

# What ends without a newline was cut off.


logger = logging.getLogger("mlx_onevision")

Message = SessionMessage | Exception
ENDED = (RuntimeError, CancelledError, anyio.BrokenResourceError, anyio.ClosedResourceError)

Incoming = MemoryObjectReceiveStream[Message]
Outgoing = MemoryObjectSendStream[SessionMessage]


@asynccontextmanager
async def transport(
    pipes: Pipes, settings: McpSettings
) -> AsyncIterator[tuple[Incoming, Outgoing]]:
    """What the SDK reads from and writes to. Reading ends with stdin; writing, when nobody reads
    any more, ends reading, too.
    """
    put, incoming = anyio.create_memory_object_stream[Message](0)
    outgoing, take = anyio.create_memory_object_stream[SessionMessage](0)
    replies = outgoing.clone()
    loop = asyncio.get_running_loop()

    async def deliver(message: types.JSONRPCMessage | None) -> None:
        if message is None:
            put.close()
        elif isinstance(message, types.JSONRPCError):
            await replies.send(SessionMessage(message))
        else:
            await put.send(SessionMessage(message))

    def read() -> None:
        """On a thread that nobody waits for: reading may never come back."""
        # What is raised here: the loop, or its streams, have ended before.
        with suppress(*ENDED):
            try:
                for line in lines(pipes.source, settings.message_bytes):
                    message = parsed(line, settings)
                    asyncio.run_coroutine_threadsafe(deliver(message), loop).result()
            except OSError as error:
                logger.error("stdin cannot be read any more (%s)", error.strerror)
            asyncio.run_coroutine_threadsafe(deliver(None), loop).result()

    async def write() -> None:
        async with take:
            async for sent in take:
                line = written(sent.message)
                try:
                    await anyio.to_thread.run_sync(pipes.write, line, abandon_on_cancel=True)
                except OSError:
                    put.close()
                    return

    threading.Thread(target=read, name="mlx-onevision-mcp-stdin", daemon=True).start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        try:
            yield incoming, outgoing
        finally:
            tasks.cancel_scope.cancel()


def parsed(line: bytes | TooLong, settings: McpSettings) -> types.JSONRPCMessage:
    """A message, or the error that is its answer, whatever it is."""
    try:
        return _parsed(line, settings)
    except Exception as error:
        return _refused(None, types.INTERNAL_ERROR, to_plugin_error(error))


def _parsed(line: bytes | TooLong, settings: McpSettings) -> types.JSONRPCMessage:
    if isinstance(line, TooLong):
        most = settings.message_bytes >> 20
        error = PluginError("too_large", "the message is too long", f"{most} MB are read at most")
        return _refused(line.id and json.loads(line.id), types.INVALID_REQUEST, error)
    # Before it is parsed: every value costs far more memory than its characters.
    if sum(line.count(mark) for mark in (b",", b"[", b"{")) > settings.values:
        error = PluginError("too_large", "the message holds too many values", "send fewer")
        return _refused(None, types.INVALID_REQUEST, error)
    try:
        message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValidationError as error:
        if any(found["type"] == "json_invalid" for found in error.errors(include_input=False)):
            said = PluginError("bad_request", "this is not valid JSON", "send one message a line")
            return _refused(None, types.PARSE_ERROR, said)
        values = _object(line)
        known = values.get("id") if "method" in values else None
        said = PluginError("bad_request", "this is no message of JSON-RPC 2.0")
        return _refused(known, types.INVALID_REQUEST, said)
    if isinstance(message, types.JSONRPCNotification) and "id" in _object(line):
        said = PluginError("bad_request", "a request's id has to be a text or a whole number")
        return _refused(None, types.INVALID_REQUEST, said)
    return message


def written(message: types.JSONRPCMessage) -> bytes:
    """A message's line."""
    try:
        text = message.model_dump_json(by_alias=True, exclude_unset=True)
    except PydanticSerializationError:  # half of a surrogate pair, from wherever it came
        known = getattr(message, "id", None)
        logger.error("a message could not be written", exc_info=True)
        said = PluginError("internal", "the answer cannot be written as JSON")
        text = _refused(known, types.INTERNAL_ERROR, said).model_dump_json()
    return text.encode() + b"\n"


def _refused(id: Any, code: int, error: PluginError) -> types.JSONRPCError:
    known = id if type(id) in (int, str) else None
    data = types.ErrorData(code=code, message=str(error), data=error.to_dict())
    return types.JSONRPCError(jsonrpc="2.0", id=known, error=data)


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
