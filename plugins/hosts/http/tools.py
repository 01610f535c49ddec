"""Functions as tools: the call that an answer has to be, and earlier calls as text.

The model was not trained to choose tools. A call that the request forces is the function's schema,
which the answer is held to; where the choice is left to the model, it answers in text.
"""

import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_onevision.plugins.contract.wire import is_list, is_object
from mlx_onevision.plugins.hosts.http.content import Strict
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.formats import as_schema

MAX_TOOLS = 128  # of one request, as OpenAI's
TOOLS_IGNORED_NOTE = (
    "this model does not choose tools, so it answered in text; name one in tool_choice to force it"
)

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class Function(Strict):
    """A function. ``parameters`` is the JSON Schema of its arguments; none takes none."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters or empty


class ChatTool(Strict):
    """A function as ``/v1/chat/completions`` has it."""

    type: Literal["function"]
    function: Function


class FlatTool(Function):
    """A function as ``/v1/responses`` has it."""

    type: Literal["function"]


class NamedFunction(Strict):
    """A function by its name."""

    name: Name


class ChatChoice(Strict):
    """The function to call, as ``/v1/chat/completions`` has it."""

    type: Literal["function"]
    function: NamedFunction


class FlatChoice(NamedFunction):
    """The function to call, as ``/v1/responses`` has it."""

    type: Literal["function"]


def _functions(tools: Any) -> Any:
    for tool in tools if is_list(tools) else ():
        kind = tool.get("type", "function") if is_object(tool) else "function"
        if kind != "function":
            raise ValueError(f"there is no tool {str(kind)[:40]!r} here; send functions")
    return tools


_Bounded = Field(max_length=MAX_TOOLS, fail_fast=True)
Tools = Annotated[list[ChatTool], _Bounded, BeforeValidator(_functions)]
FlatTools = Annotated[list[FlatTool], _Bounded, BeforeValidator(_functions)]
ToolChoice = Literal["none", "auto", "required"] | ChatChoice | FlatChoice


@dataclass(frozen=True)
class ForcedCall:
    """What an answer has to call: one of these functions."""

    functions: Sequence[Function]

    @property
    def schema(self) -> str:
        """What the answer's text follows, as JSON: the arguments, with the function's name around
        them where there are several.
        """
        lenient = any(function.strict is False for function in self.functions)
        if len(self.functions) == 1:
            return as_schema(self.functions[0].schema_, lenient)
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function.name},
                    "arguments": _moved(function.schema_, f"#/anyOf/{place}/properties/arguments"),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for place, function in enumerate(self.functions)
        ]
        return as_schema({"anyOf": calls}, lenient)


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at ``place`` of another, its references within itself with it."""
    if is_list(schema):
        return [_moved(part, place) for part in schema]
    if not is_object(schema):
        return schema
    moved = {name: _moved(part, place) for name, part in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def forced_call(
    functions: Sequence[Function], choice: ToolChoice | None, called: Collection[str] = ()
) -> ForcedCall | None:
    """The call that a request forces; None where the answer is text. Raises HTTPError: 400, for a
    choice that no function fits.

    called : names of functions that were called since the user's last message. Of several functions
        another one is called then: a model that does not choose would call the same one for ever.
    """
    if choice is None or choice in ("none", "auto"):
        return None
    if choice == "required":
        if not functions:
            raise HTTPError(400, "tool_choice is required, without tools", param="tool_choice")
        return ForcedCall([f for f in functions if f.name not in called] or functions)
    assert isinstance(choice, ChatChoice | FlatChoice)
    name = choice.function.name if isinstance(choice, ChatChoice) else choice.name
    named = [function for function in functions if function.name == name]
    if not named:
        message = f"tool_choice names {name!r}, which is not among the tools; add it to them"
        raise HTTPError(400, message, param="tool_choice")
    return ForcedCall(named[:1])


_HEAD = re.compile(r'\{"name": "([^"]*)", "arguments": ')


class CallText:
    """The text of a forced call as it comes: the function's name, and its arguments."""

    def __init__(self, call: ForcedCall) -> None:
        one = len(call.functions) == 1
        self.name = call.functions[0].name if one else None
        """Once it is known."""
        self._wrapped, self._text = not one, ""
        self.id = f"call_{uuid.uuid4().hex}"

    def add(self, delta: str) -> str:
        """The next characters of the arguments."""
        if not self._wrapped:
            return delta
        self._text += delta
        if self.name is None:
            found = _HEAD.match(self._text)
            if found is None:
                return ""
            self.name, self._text = found[1], self._text[found.end() :]
        # The last brace closes what stands around the arguments.
        ready, self._text = self._text[:-1], self._text[-1:]
        return ready
