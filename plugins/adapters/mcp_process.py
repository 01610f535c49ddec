"""A server of MCP as a process of ours, and its tools of the contract; by the official client."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TextIO

from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.results import Event, event_from_dict
from mlx_onevision.plugins.contract.streams import Channel

if TYPE_CHECKING:
    from mcp import Client
    from mcp_types import CallToolResult

EVENTS = "mlx-onevision/events"
"""In a result's ``_meta``: how many events came before it."""

LATE_SECONDS = 2.0  # that an event may come after the result; it comes before

GONE = PluginError("internal", "the MCP server's process has ended", "open the backend again")


@asynccontextmanager
async def connected(
    command: Sequence[str], env: Mapping[str, str], folder: str | os.PathLike[str] | None
) -> "AsyncIterator[Client]":
    try:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
    except ImportError:
        raise bad_request(
            "the backend 'mcp' needs the extra of its name", "pip install 'mlx-onevision[mcp]'"
        ) from None
    program, *arguments = command
    parameters = StdioServerParameters(
        command=program,
        args=arguments,
        env={**os.environ, **env},
        cwd=None if folder is None else os.fspath(folder),
    )
    with _log() as log:
        async with Client(stdio_client(parameters, log)) as client:
            tools = {tool.name for tool in (await client.list_tools()).tools}
            if "contract_generate" not in tools:
                raise bad_request(
                    "the MCP server does not offer the contract",
                    "start mlx-onevision mcp with --contract",
                )
            yield client


def unstarted(command: Sequence[str], error: BaseException) -> PluginError:
    """Why there is no connection."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, PluginError):
        return error
    why = getattr(error, "strerror", None) or type(error).__name__
    return PluginError(
        "internal",
        f"the MCP server {os.path.basename(command[0])!r} does not start ({why})",
        "run its command in a terminal to see why",
    )


async def called(
    client: "Client", name: str, arguments: dict[str, Any], channel: Channel | None
) -> dict[str, Any]:
    """What a tool of the contract answers, its events put into the channel.

    Raises:
        PluginError: the contract's own, and ``internal`` for a server that is none.
    """
    from mcp import MCPError

    events = _Events(channel)
    try:
        answer = await client.call_tool(
            f"contract_{name}", arguments, progress_callback=events.take
        )
    except MCPError as error:
        raise _refused(error.code, error.data) from None
    if answer.is_error:
        raise _error(answer)
    values = answer.structured_content
    if not isinstance(values, dict) or not await events.are((answer.meta or {}).get(EVENTS)):
        raise PluginError("internal", "the MCP server's answer is not whole", "ask again")
    return values


class _Events:
    """The events of a call, brought in order by their numbers."""

    def __init__(self, channel: Channel | None) -> None:
        self._channel = channel
        self._count = 0
        self._early: dict[int, Event] = {}

    async def take(self, progress: float, total: float | None, message: str | None) -> None:
        try:
            self._early[int(progress)] = event_from_dict(json.loads(message or ""))
        except (ValueError, PluginError):
            return  # it will be missed
        while (event := self._early.pop(self._count + 1, None)) is not None:
            self._count += 1
            if self._channel is not None:
                self._channel.put(event)

    async def are(self, count: object) -> bool:
        """Whether these were all. The client hands each over in a task of its own."""
        for _ in range(100):
            if self._count == count:
                break
            await asyncio.sleep(LATE_SECONDS / 100)
        return self._count == count


def _refused(code: int, data: Any) -> PluginError:
    from mcp_types import CONNECTION_CLOSED

    if code == CONNECTION_CLOSED:
        return GONE
    if isinstance(data, dict) and "code" in data:
        return PluginError.from_dict(data)
    return PluginError("internal", f"the MCP server refused the call ({code})")


def _error(answer: "CallToolResult") -> PluginError:
    values = answer.structured_content
    if isinstance(values, dict) and isinstance(values.get("error"), dict):
        return PluginError.from_dict(values["error"])
    return PluginError("internal", "the MCP server refused the call, and does not say why")


def _log() -> TextIO:
    """Where the server's messages go: to this process's stderr, where there is one."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w")
    except (AttributeError, OSError, ValueError):
        return open(os.devnull, "w")
