"""Messages of the protocol between the pipes and the SDK.

Replaces the SDK's own transport, which reads lines of any length, and does not answer those that it
cannot read, so that a host waits for the answer for good.
"""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator
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
from mlx_onevision.plugins.contract.wire import Json, is_object
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings
from mlx_onevision.plugins.hosts.mcp.pipes import Pipes, TooLong, known_id, lines

logger = logging.getLogger("mlx_onevision")

Message = SessionMessage | Exception
STREAM_CLOSED_ERRORS = (
    RuntimeError,
    CancelledError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
)

Incoming = MemoryObjectReceiveStream[Message]
Outgoing = MemoryObjectSendStream[SessionMessage]


@asynccontextmanager
async def transport(
    pipes: Pipes, settings: McpSettings
) -> AsyncGenerator[tuple[Incoming, Outgoing]]:
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
        """On a thread that nobody joins: reading may never return."""
        # Raised where the loop, or its streams, have ended before.
        with suppress(*STREAM_CLOSED_ERRORS):
            try:
                for line in lines(pipes.source, settings.max_message_bytes):
                    message = parse(line, settings)
                    asyncio.run_coroutine_threadsafe(deliver(message), loop).result()
            except OSError as error:
                logger.error("stdin cannot be read any more (%s)", error.strerror)
            asyncio.run_coroutine_threadsafe(deliver(None), loop).result()

    async def write() -> None:
        async with take:
            async for sent in take:
                line = serialize(sent.message)
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


def parse(line: bytes | TooLong, settings: McpSettings) -> types.JSONRPCMessage:
    """The message of a line, or the error that answers it."""
    try:
        return _parse(line, settings)
    except Exception as error:
        return _error(None, types.INTERNAL_ERROR, to_plugin_error(error))


def _parse(line: bytes | TooLong, settings: McpSettings) -> types.JSONRPCMessage:
    if isinstance(line, TooLong):
        limit = f"{settings.max_message_bytes >> 20} MB are read at most"
        error = PluginError("too_large", "the message is too long", limit)
        return _error(line.id, types.INVALID_REQUEST, error)
    # Before it is parsed: every value costs far more memory than its characters.
    if sum(line.count(mark) for mark in (b",", b"[", b"{")) > settings.max_json_values:
        error = PluginError("too_large", "the message holds too many values", "send fewer")
        return _error(known_id(line), types.INVALID_REQUEST, error)
    try:
        message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValidationError as invalid:
        values = _object(line)
        id = values.get("id") if "method" in values else None
        if any(found["type"] == "json_invalid" for found in invalid.errors(include_input=False)):
            error = PluginError("bad_request", "this is not valid JSON", "send one message a line")
            if values:  # but it is, to many
                broken = "the message holds half of a surrogate pair, which is no text"
                error = PluginError("bad_request", broken, "send it whole")
            return _error(id, types.PARSE_ERROR, error)
        error = PluginError("bad_request", "this is no message of JSON-RPC 2.0")
        return _error(id, types.INVALID_REQUEST, error)
    if isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
        values = _object(line)
        if "method" in values:  # both a request and an answer
            error = PluginError("bad_request", "this is no message of JSON-RPC 2.0")
            return _error(values.get("id"), types.INVALID_REQUEST, error)
    if isinstance(message, types.JSONRPCNotification) and "id" in _object(line):
        error = PluginError("bad_request", "a request's id has to be a text or a whole number")
        return _error(None, types.INVALID_REQUEST, error)
    return message


def serialize(message: types.JSONRPCMessage) -> bytes:
    """A message as a line; an internal error in its place where it is no JSON."""
    try:
        text = message.model_dump_json(by_alias=True, exclude_unset=True)
    except PydanticSerializationError:  # half of a surrogate pair, from wherever it came
        logger.error("a message could not be written", exc_info=True)
        error = PluginError("internal", "the answer cannot be written as JSON")
        text = _error(getattr(message, "id", None), types.INTERNAL_ERROR, error).model_dump_json()
    return text.encode() + b"\n"


def _error(id: Any, code: int, error: PluginError) -> types.JSONRPCError:
    known = id if type(id) is int or (type(id) is str and is_text(id)) else None
    data = types.ErrorData(code=code, message=str(error), data=error.to_dict())
    return types.JSONRPCError(jsonrpc="2.0", id=known, error=data)


def is_text(value: str) -> bool:
    """Whether it can be written: half of a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _object(line: bytes) -> Json:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if is_object(values) else {}
