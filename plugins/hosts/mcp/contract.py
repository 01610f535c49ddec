"""The contract itself as tools, for hosts that are programs.

Arguments are a request's own JSON, the structure of a result is the result's. Events travel as the
messages of progress notifications, each the JSON of one event, numbered by ``progress`` from 1 on;
the result's ``_meta`` says how many there were. Errors are the contract's.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import mcp_types as types

from mlx_onevision.plugins.contract.errors import PluginError, bad_request, to_plugin_error
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DoneEvent, ErrorEvent
from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.contract.wire import API_VERSION
from mlx_onevision.plugins.hosts.mcp.tool import READS, Call, Tool, blocking
from mlx_onevision.plugins.interface import Backend

EVENTS = "mlx-onevision/events"
"""In a result's ``_meta``: how many events came before it."""

FREES = types.ToolAnnotations(
    read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)

Answer = Callable[[dict[str, Any], Call], Awaitable[types.CallToolResult]]


def tools(backend: Backend) -> list[Tool]:
    """``contract_info``, ``contract_generate``, and so on."""

    async def info(arguments: dict[str, Any], call: Call) -> types.CallToolResult:
        _nothing(arguments)
        return _result((await blocking(backend.info)).to_dict())

    async def generate(arguments: dict[str, Any], call: Call) -> types.CallToolResult:
        return await _followed(backend.generate(GenerateRequest.from_dict(arguments)), call)

    async def embed(arguments: dict[str, Any], call: Call) -> types.CallToolResult:
        return await _followed(backend.stream_embed(EmbedRequest.from_dict(arguments)), call)

    async def describe(arguments: dict[str, Any], call: Call) -> types.CallToolResult:
        request = DescribeRequest.from_dict(arguments)
        return await _followed(backend.describe_video(request), call)

    async def unload(arguments: dict[str, Any], call: Call) -> types.CallToolResult:
        _nothing(arguments)
        await blocking(backend.unload)
        return _result({})

    return [
        _tool("info", "the ModelInfo", info),
        _tool("generate", "a GenerateRequest, answered by a GenerateResult", generate),
        _tool("embed", "an EmbedRequest, answered by an EmbedResult", embed),
        _tool("describe_video", "a DescribeRequest, answered by a DescribeResult", describe),
        _tool("unload", "frees the model's memory until it is asked again", unload, FREES),
    ]


def _tool(name: str, what: str, answer: Answer, annotations: types.ToolAnnotations = READS) -> Tool:
    async def run(arguments: Mapping[str, Any], call: Call) -> types.CallToolResult:
        try:
            return await answer(dict(arguments), call)
        except Exception as error:
            return _refusal(to_plugin_error(error))

    listed = types.Tool(
        name=f"contract_{name}",
        description=(
            f"For programs: {what}, as JSON of the plugin contract, version {API_VERSION}. "
            "Language models take the other tools."
        ),
        input_schema={"type": "object"},
        annotations=annotations,
    )
    return Tool(listed, run)


async def _followed(stream: EventStream[Any], call: Call) -> types.CallToolResult:
    count = 0
    async with stream:
        async for event in stream:
            if isinstance(event, DoneEvent):
                return _result(event.result.to_dict(), count)
            if isinstance(event, ErrorEvent):
                raise event.error
            count += 1
            await call.report(count, None, json.dumps(event.to_dict(), ensure_ascii=False))
    raise PluginError("internal", "the backend ended without an answer", "try again")


def _result(values: dict[str, Any], events: int = 0) -> types.CallToolResult:
    # No text beside it: of thousands of vectors that would be all of it twice.
    return types.CallToolResult(content=[], structured_content=values, _meta={EVENTS: events})


def _refusal(error: PluginError) -> types.CallToolResult:
    text = types.TextContent(type="text", text=str(error))
    return types.CallToolResult(
        content=[text], structured_content={"error": error.to_dict()}, is_error=True
    )


def _nothing(arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise bad_request("there is nothing to say here", "leave the arguments empty")
