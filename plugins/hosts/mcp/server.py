"""The server of the official SDK, over any backend, from the first line to the end of stdin.

The SDK's low-level server, because its higher one answers wrong arguments with pydantic's own
paragraphs, and cannot limit the time of every call.
"""

import asyncio
import logging
import os
import signal
import threading
from importlib.metadata import version
from typing import Any, NoReturn

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from mlx_onevision.plugins.contract.errors import clipped
from mlx_onevision.plugins.hosts.mcp.allowed_files import AllowedFiles, McpSettings
from mlx_onevision.plugins.hosts.mcp.ask import UNTRUSTED, AskTools, DescribeTools
from mlx_onevision.plugins.hosts.mcp.pipes import Pipes
from mlx_onevision.plugins.hosts.mcp.similar import VectorTools
from mlx_onevision.plugins.hosts.mcp.tool import run_tool
from mlx_onevision.plugins.hosts.mcp.transport import transport
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

EXIT_GRACE_SECONDS = 1.5  # from the end of stdin to the end of the process
# That a description can be asked for; its host may come back late.
JOB_RETENTION_SECONDS = 24 * 3600.0

INTERRUPTED_STATUS = 130

Context = ServerRequestContext[Any, Any]

logger = logging.getLogger("mlx_onevision")


def serve(backend: Backend, pipes: Pipes, settings: McpSettings | None = None) -> NoReturn:
    """Answers calls until stdin ends, SIGTERM or Ctrl-C, and then ends the process.

    The process, because a model that computes and a library's threads would hold a mere return up.
    """
    code = asyncio.run(_serve(backend, pipes, settings or McpSettings()))
    os._exit(code)


def make_server(backend: Backend, jobs: Jobs, settings: McpSettings) -> Server[Any]:
    """The server; whoever calls this runs it, and closes jobs and backend."""
    files = AllowedFiles(settings.policy)
    tools = [
        *AskTools(backend, files, settings).tools(),
        *DescribeTools(jobs, files, settings).tools(),
        *VectorTools(backend, files).tools(),
    ]
    named = {tool.listed.name: tool for tool in tools}

    async def list_tools(
        context: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[tool.listed for tool in tools])

    async def call_tool(
        context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        tool = named.get(params.name)
        if tool is None:
            name = clipped(params.name)[:60]
            known = ", ".join(named)
            raise MCPError(types.INVALID_PARAMS, f"there is no tool {name!r}; there are {known}")
        send = context.session.report_progress
        return await run_tool(tool, params.arguments or {}, send, settings.timeout)

    return Server(
        "mlx-onevision",
        version=version("mlx-onevision"),
        title="LLaVA-OneVision",
        instructions=(
            "Looks at images and videos on this computer with a local vision model. "
            f"Folders that are open: {files.folders()}. Give absolute paths. {UNTRUSTED} "
            "Sound is not heard. "
            f"A call is answered within {settings.timeout:g} s; what takes longer, such as a long "
            "video, goes through describe_video_start and describe_video_status."
        ),
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


async def _serve(backend: Backend, pipes: Pipes, settings: McpSettings) -> int:
    """The exit code of the process."""
    code = 0
    signalled = asyncio.Event()

    def end(exit_code: int) -> None:
        nonlocal code
        code = exit_code
        signalled.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end, 0)
    loop.add_signal_handler(signal.SIGINT, end, INTERRUPTED_STATUS)
    jobs = Jobs(backend, retention_seconds=JOB_RETENTION_SECONDS)
    server = make_server(backend, jobs, settings)
    async with transport(pipes, settings) as (incoming, outgoing):
        options = server.create_initialization_options()
        running = asyncio.create_task(server.run(incoming, outgoing, options))
        waiting = asyncio.create_task(signalled.wait())
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        # Whatever the process does then, it ends after a while.
        timer = threading.Timer(EXIT_GRACE_SECONDS, os._exit, [code])
        timer.daemon = True
        timer.start()
        running.cancel()
        waiting.cancel()
        for outcome in await asyncio.gather(running, waiting, return_exceptions=True):
            if isinstance(outcome, Exception):
                logger.error("the server has ended", exc_info=outcome)
        # Cancels what is under way, and ends the processes that decode videos.
        await asyncio.to_thread(jobs.close)
        await asyncio.to_thread(backend.close)
    return code
