"""A tool: what a host lists, and what happens when it is called.

Whatever goes wrong is a result that says so in one sentence, for the language model to read.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

import anyio
import mcp_types as types
from pydantic import BaseModel, ValidationError

from mlx_onevision.plugins.contract.errors import PluginError, bad_request, clipped, to_plugin_error
from mlx_onevision.plugins.contract.results import ProgressEvent, TextEvent
from mlx_onevision.plugins.hosts.mcp import schemas
from mlx_onevision.plugins.interface import Event

TIMEOUT_HINT = "the model may still be loading: try again, or ask for less"

TIMEOUT_GRACE_SECONDS = 1.0  # for tools that answer with what they have when their time is up
REPORT_INTERVAL_SECONDS = 0.25  # between two reports of the same stage; a host shows no more

STAGE_WORDS = {
    "queued": "waiting in line",
    "loading": "loading the model",
    "preparing": "reading the file",
}

READ_ONLY = types.ToolAnnotations(read_only_hint=True, open_world_hint=False)

Result = TypeVar("Result")
Arguments = TypeVar("Arguments", bound=schemas.Arguments)
Answer = TypeVar("Answer", bound=BaseModel)


class SendProgress(Protocol):
    """Sends a progress notification, where the host wants any."""

    def __call__(
        self, progress: float, total: float | None = None, message: str | None = None
    ) -> Awaitable[None]: ...


class Call:
    """One call of a tool while it runs: its progress, and the time that it may take.

    send : sends progress. seconds : the call's time, from now on.
    """

    def __init__(self, send: SendProgress, seconds: float) -> None:
        self._send = send
        self._until = time.monotonic() + seconds
        self._progress = 0.0
        self._stage = ""
        self._reported_at = 0.0
        self._pieces = 0

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    async def report(self, stage: str, done: float = 0, total: float | None = None) -> None:
        """Sends progress. The protocol wants it to rise, whatever is counted."""
        now = time.monotonic()
        if stage == self._stage and now - self._reported_at < REPORT_INTERVAL_SECONDS:
            return
        self._stage, self._reported_at = stage, now
        self._progress = done if done > self._progress else self._progress + 0.001
        await self._send(self._progress, total, STAGE_WORDS.get(stage, stage))

    async def report_event(self, event: Event, max_tokens: int | None = None) -> None:
        """Reports a backend's event; of a text, as one more of the tokens of an answer."""
        if isinstance(event, TextEvent):
            self._pieces += 1
            await self.report("answering", self._pieces, max_tokens)
        elif isinstance(event, ProgressEvent):
            await self.report(event.stage, event.done, event.total)


@dataclass(frozen=True)
class Tool:
    """listed : as a host sees it. run : answers a call.

    late : what to do where the time of a call was not enough.
    keeps_time : whether it looks at the clock itself, and then answers with what it has, or raises
        TimeoutError where that is nothing.
    """

    listed: types.Tool
    run: Callable[[Mapping[str, Any], Call], Awaitable[types.CallToolResult]]
    late: str
    keeps_time: bool


def make_tool(
    work: Callable[[Arguments, Call], Awaitable[Answer]],
    title: str,
    description: str,
    *,
    late: str = TIMEOUT_HINT,
    keeps_time: bool = False,
    as_text: Callable[[Answer], str] = lambda answer: answer.model_dump_json(exclude_none=True),
    annotations: types.ToolAnnotations = READ_ONLY,
) -> Tool:
    """A tool of a function's name, and with the types of its arguments and its answer.

    as_text : the answer for hosts that read no structure.
    """
    hints = get_type_hints(work)
    arguments, answer = hints["asked"], hints["return"]

    async def run(given: Mapping[str, Any], call: Call) -> types.CallToolResult:
        result = await work(_validated(arguments, given), call)
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=as_text(result))],
            structured_content=result.model_dump(exclude_none=True),
        )

    listed = types.Tool(
        name=work.__name__,
        title=title,
        description=description,
        input_schema=schemas.input_schema(arguments),
        output_schema=schemas.output_schema(answer),
        annotations=annotations,
    )
    return Tool(listed, run, late, keeps_time)


async def run_tool(
    tool: Tool, arguments: Mapping[str, Any], send: SendProgress, seconds: float
) -> types.CallToolResult:
    """A call's result within ``seconds``, whatever happens."""
    try:
        with anyio.fail_after(seconds + (TIMEOUT_GRACE_SECONDS if tool.keeps_time else 0)):
            return await tool.run(arguments, Call(send, seconds))
    except TimeoutError:
        error = PluginError("cancelled", f"there is no answer after {seconds:g} s", tool.late)
    except Exception as raised:
        error = to_plugin_error(raised)
    text = types.TextContent(type="text", text=str(error))
    return types.CallToolResult(content=[text], is_error=True)


async def in_thread(function: Callable[[], Result]) -> Result:
    """Calls a function that waits for a disk, elsewhere; it is not waited for once it is late."""
    return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)


def _validated(arguments: type[Arguments], given: Mapping[str, Any]) -> Arguments:
    try:
        return arguments.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        known = arguments.model_fields
        if first["type"] == "extra_forbidden":
            name = clipped(str(first["loc"][0]))[:60]
            hint = f"known are {', '.join(known)}"
            raise bad_request(f"there is no argument {name!r}", hint) from None
        # Which type of a union was tried is no part of the path in the arguments.
        parts = [part for part in first["loc"] if isinstance(part, int) or part in known]
        where = "".join(f"[{part}]" if isinstance(part, int) else part for part in parts)
        message = first["msg"][:1].lower() + first["msg"][1:].removesuffix(".")
        message = f"{where or 'the arguments'}: {message}"
        raise bad_request(message, "the tool's input schema says more") from None
