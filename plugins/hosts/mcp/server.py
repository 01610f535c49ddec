"""The server of the official SDK, over any backend.

The SDK's low-level server, because its higher one answers wrong arguments with pydantic's own
paragraphs, and has no place for a time that every call keeps to.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from mlx_onevision.plugins.contract.errors import clipped
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings, Places
from mlx_onevision.plugins.hosts.mcp.ask import UNTRUSTED, Looking, Telling
from mlx_onevision.plugins.hosts.mcp.pipes import Pipes
from mlx_onevision.plugins.hosts.mcp.similar import Finding
from mlx_onevision.plugins.hosts.mcp.tool import Call, Tool, answered
from mlx_onevision.plugins.hosts.mcp.transport import transport
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

Context = ServerRequestContext[Any, Any]


def make_server(backend: Backend, jobs: Jobs, settings: McpSettings) -> Server[Any]:
    """The server; whoever calls this runs it, and closes jobs and backend."""
    places = Places(settings.policy)
    tools = [
        *Looking(backend, places, settings).tools(),
        *Telling(jobs, places, settings).tools(),
        *Finding(backend, places, settings).tools(),
    ]
    return _serving(tools, _instructions(places, settings))


def _serving(tools: Iterable[Tool], instructions: str) -> Server[Any]:
    named = {tool.listed.name: tool for tool in tools}

    async def list_tools(
        context: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool.listed for tool in named.values()])

    async def call_tool(
        context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        tool = named.get(params.name)
        if tool is None:
            known = ", ".join(named)
            name = clipped(params.name)[:60]
            raise MCPError(types.INVALID_PARAMS, f"there is no tool {name!r}; there are {known}")
        call = Call(context.session.report_progress, tool.seconds)
        return await answered(tool, params.arguments or {}, call)

    return Server(
        "mlx-onevision",
        version=version("mlx-onevision"),
        title="LLaVA-OneVision",
        instructions=instructions,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _instructions(places: Places, settings: McpSettings) -> str:
    return (
        "Looks at pictures and videos on this computer with a local vision model. "
        f"Folders that are open: {places.listed()}. Give absolute paths. {UNTRUSTED} "
        "Sound is not heard. "
        f"A call is answered within {settings.timeout:g} s; what takes longer, such as a long "
        "video, goes through describe_video_start and describe_video_status."
    )


# The server's life: from the first line to the end of stdin, SIGTERM or Ctrl-C.

GRACE_SECONDS = 1.5  # from the end of stdin to the end of the process
JOBS_SECONDS = 24 * 3600.0  # that a description can be asked for; its host may come back late

INTERRUPTED = 130

logger = logging.getLogger("mlx_onevision")


def serve(backend: Backend, pipes: Pipes, settings: McpSettings | None = None) -> NoReturn:
    """Answers what comes, and ends the process when nobody is there any more.

    The process, because a model that computes and a library's threads would hold a mere return up.
    """
    code = asyncio.run(_life(backend, pipes, settings or McpSettings()))
    os._exit(code)


async def _life(backend: Backend, pipes: Pipes, settings: McpSettings) -> int:
    code = 0
    jobs = Jobs(backend, kept=JOBS_SECONDS)
    server = make_server(backend, jobs, settings)
    with _told_to_end() as told:
        async with transport(pipes, settings) as (incoming, outgoing):
            options = server.create_initialization_options()
            running = asyncio.create_task(server.run(incoming, outgoing, options))
            waiting = asyncio.create_task(told.wait())
            await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
            code = told.code
            _end_soon(code)
            running.cancel()
            waiting.cancel()
            for outcome in await asyncio.gather(running, waiting, return_exceptions=True):
                if isinstance(outcome, Exception):
                    logger.error("the server has ended", exc_info=outcome)
            # Cancels what is under way, and ends the processes that decode videos.
            await asyncio.to_thread(_close, jobs, backend)
    return code


def _close(jobs: Jobs, backend: Backend) -> None:
    jobs.close()
    backend.close()


def _end_soon(code: int) -> None:
    """Ends the process after a while, whatever it does then."""
    timer = threading.Timer(GRACE_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


class _Told(asyncio.Event):
    """Set by a signal; ``code`` is what the process then ends with."""

    code = 0


@contextmanager
def _told_to_end() -> Iterator[_Told]:
    told = _Told()
    loop = asyncio.get_running_loop()

    def end(code: int) -> None:
        told.code = code
        told.set()

    loop.add_signal_handler(signal.SIGTERM, end, 0)
    loop.add_signal_handler(signal.SIGINT, end, INTERRUPTED)
    try:
        yield told
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
