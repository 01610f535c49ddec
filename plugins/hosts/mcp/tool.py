"""A tool: what a host lists, and what happens when it is called.

Whatever goes wrong is a result that says so in one sentence, for the language model to read.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import anyio
import mcp_types as types
from pydantic import BaseModel, ValidationError

from mlx_onevision.plugins.contract.errors import PluginError, bad_request, clipped, to_plugin_error
from mlx_onevision.plugins.contract.results import ProgressEvent, TextEvent
from mlx_onevision.plugins.hosts.mcp import schemas
from mlx_onevision.plugins.interface import Event

# One call of a tool, while it runs: how far it has come, and how long it may take.

Result = TypeVar("Result")

SELDOM = 0.25  # seconds between two reports of the same stage; a host shows no more

WORDS = {
    "queued": "waiting in line",
    "loading": "loading the model",
    "preparing": "reading the file",
    "answering": "answering",
}


class Report(Protocol):
    """Sends a progress notification, where the host wants any."""

    def __call__(
        self, progress: float, total: float | None = None, message: str | None = None
    ) -> Awaitable[None]: ...


class Call:
    """report : sends progress. seconds : the call's time, from now on."""

    def __init__(self, report: Report, seconds: float) -> None:
        self.report = report
        self._until = time.monotonic() + seconds
        self._last = 0.0
        self._told = ""
        self._when = 0.0
        self._pieces = 0

    @property
    def left(self) -> float:
        """Seconds of its time that are left; 0 at least."""
        return max(0.0, self._until - time.monotonic())

    async def tell(self, stage: str, done: float = 0, total: float | None = None) -> None:
        """Where it stands. Progress has to rise, whatever is counted."""
        now = time.monotonic()
        if stage == self._told and now - self._when < SELDOM:
            return
        self._told, self._when = stage, now
        self._last = done if done > self._last else self._last + 0.001
        await self.report(self._last, total, WORDS.get(stage, stage))

    async def follow(self, event: Event, most: int | None = None) -> None:
        """Tells of a backend's event. ``most`` : tokens that an answer may have."""
        if isinstance(event, TextEvent):
            self._pieces += 1
            await self.tell("answering", self._pieces, most)
        elif isinstance(event, ProgressEvent):
            await self.tell(event.stage, event.done, event.total)


async def blocking(function: Callable[[], Result]) -> Result:
    """Calls a function that waits for a disk, elsewhere; it is not waited for once it is late."""
    return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)


Taken = TypeVar("Taken", bound=schemas.Asked)
Given = TypeVar("Given", bound=BaseModel)

LATE = "the model may still be loading: try again, or ask for less"

GRACE = 1.0  # seconds for tools that answer with what they have when their time is up

READS = types.ToolAnnotations(read_only_hint=True, open_world_hint=False)


@dataclass(frozen=True)
class Tool:
    """listed : as a host sees it. run : answers a call.

    seconds : that a call may take, if any. late : what to do where that was not enough.
    keeps_time : whether it looks at the clock itself, and then answers with what it has.
    """

    listed: types.Tool
    run: Callable[[Mapping[str, Any], Call], Awaitable[types.CallToolResult]]
    seconds: float | None = None
    late: str = LATE
    keeps_time: bool = False


def offered(
    name: str,
    title: str,
    description: str,
    taken: type[Taken],
    given: type[Given],
    work: Callable[[Taken, Call], Awaitable[Given]],
    *,
    seconds: float,
    late: str = LATE,
    keeps_time: bool = False,
    said: Callable[[Given], str] | None = None,
    annotations: types.ToolAnnotations = READS,
) -> Tool:
    """A tool with typed arguments and a typed answer.

    said : the answer as text, for hosts that read no structure; JSON without it.
    """

    async def run(arguments: Mapping[str, Any], call: Call) -> types.CallToolResult:
        answer = await work(_read(taken, arguments), call)
        text = answer.model_dump_json(exclude_none=True) if said is None else said(answer)
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text)],
            structured_content=answer.model_dump(exclude_none=True),
        )

    listed = types.Tool(
        name=name,
        title=title,
        description=description,
        input_schema=schemas.taken(taken),
        output_schema=schemas.given(given),
        annotations=annotations,
    )
    return Tool(listed, run, seconds, late, keeps_time)


async def answered(tool: Tool, arguments: Mapping[str, Any], call: Call) -> types.CallToolResult:
    """A call's result, in time, whatever happens."""
    try:
        if tool.seconds is None:
            return await tool.run(arguments, call)
        with anyio.move_on_after(tool.seconds + (GRACE if tool.keeps_time else 0)):
            return await tool.run(arguments, call)
        return refusal(too_late(tool.seconds, tool.late))
    except Exception as error:
        return refusal(to_plugin_error(error))


def too_late(seconds: float, way_out: str) -> PluginError:
    """What a call that takes too long is answered with."""
    return PluginError("cancelled", f"there is no answer after {seconds:g} s", way_out)


def refusal(error: PluginError) -> types.CallToolResult:
    """An error, as the language model reads it."""
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=str(error))], is_error=True
    )


def _read(taken: type[Taken], arguments: Mapping[str, Any]) -> Taken:
    try:
        return taken.model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # Which of several types was tried is nothing that is in the arguments.
        parts = [part for part in first["loc"] if isinstance(part, int) or part in _names(taken)]
        where = "".join(f"[{part}]" if isinstance(part, int) else part for part in parts)
        if first["type"] == "extra_forbidden":
            name = clipped(str(first["loc"][0]))[:60]
            known = ", ".join(taken.model_fields)
            raise bad_request(f"there is no argument {name!r}", f"known are {known}") from None
        said = first["msg"][:1].lower() + first["msg"][1:].removesuffix(".")
        raise bad_request(
            f"{where or 'the arguments'}: {said}", "the tool's input schema says more"
        ) from None


def _names(taken: type[BaseModel]) -> set[str]:
    return set(taken.model_fields)
