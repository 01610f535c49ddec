"""The server of the official SDK, over any backend.

The SDK's low-level server, because its higher one answers wrong arguments with pydantic's own
paragraphs, and has no place for a time that every call keeps to.
"""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from mlx_onevision.plugins.contract.errors import clipped
from mlx_onevision.plugins.hosts.mcp import contract
from mlx_onevision.plugins.hosts.mcp.allowed_files import Places
from mlx_onevision.plugins.hosts.mcp.ask import UNTRUSTED, Looking
from mlx_onevision.plugins.hosts.mcp.call import Call
from mlx_onevision.plugins.hosts.mcp.settings import McpSettings
from mlx_onevision.plugins.hosts.mcp.similar import Finding
from mlx_onevision.plugins.hosts.mcp.telling import Telling
from mlx_onevision.plugins.hosts.mcp.tool import Tool, answered
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
        *(contract.tools(backend) if settings.contract else ()),
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
        call = Call(context.session.report_progress, tool.seconds or 0)
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
