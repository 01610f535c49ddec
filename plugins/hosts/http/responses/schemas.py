"""What ``POST /v1/responses`` takes, field by field."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mlx_onevision.plugins.contract.wire import Json, is_list, is_object
from mlx_onevision.plugins.hosts.http import content, formats
from mlx_onevision.plugins.hosts.http.content import Strict
from mlx_onevision.plugins.hosts.http.schemas import (
    COUNT_DESCRIPTION,
    GUIDED_FIELDS,
    GUIDED_HINTS,
    Defaults,
    MediaOptions,
    RejectUnsupported,
    Tokens,
    TopLogprobs,
    count_pairs,
)
from mlx_onevision.plugins.hosts.http.tools import FlatTools, ToolChoice

# As OpenAI's.
MAX_METADATA_PAIRS, MAX_KEY_CHARACTERS, MAX_VALUE_CHARACTERS = 16, 64, 512
LOGPROBS_INCLUDE = "message.output_text.logprobs"  # what ``include`` has to hold for them


class SystemItem(content.SystemTurn):
    """Instructions, as an item."""

    type: Literal["message"] = "message"


class UserItem(content.UserTurn):
    """A message of the user, as an item."""

    type: Literal["message"] = "message"


class AssistantItem(content.AssistantTurn):
    """An earlier answer, as an item; those of ``output`` can be sent back."""

    type: Literal["message"] = "message"


class CallItem(Strict):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    name: str
    arguments: str = ""
    call_id: str | None = None


class ResultItem(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    output: content.Content
    call_id: str | None = None


class ReferenceItem(Strict):
    """An item of an answer that is kept here."""

    type: Literal["item_reference"]
    id: str


def _type_of(item: Json) -> Any:
    """Of an item of ``input``: a message, where it does not say."""
    return item.get("type") or "message"


_Message = Annotated[SystemItem | UserItem | AssistantItem, Field(discriminator="role")]
Item = Annotated[
    Annotated[_Message, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReferenceItem, Tag("item_reference")],
    Discriminator(lambda item: _type_of(item) if is_object(item) else None),
]
Items = Annotated[
    list[Item],
    Field(
        min_length=1,
        max_length=content.MAX_MESSAGES_AND_PARTS,
        fail_fast=True,
        description=COUNT_DESCRIPTION,
    ),
]
ITEM_TYPES = ("message", "function_call", "function_call_output", "item_reference")


def _as_messages(asked: Any) -> Any:
    """A text as one message; items of other types are named before their fields are looked at."""
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    for place, item in enumerate(content.count_parts(asked)) if is_list(asked) else ():
        kind = _type_of(item) if is_object(item) else "message"
        if kind not in ITEM_TYPES:
            known = " and ".join((", ".join(ITEM_TYPES[:-1]), ITEM_TYPES[-1]))
            raise ValueError(f"item {place} is {str(kind)[:40]!r}; there are {known}")
    return asked


def _check_keys(pairs: Any) -> Any:
    """As pydantic would, but it would not say that the key is at fault."""
    longest = max(map(len, pairs), default=0) if is_object(pairs) else 0
    if longest > MAX_KEY_CHARACTERS:
        raise ValueError(f"a key has {longest:,} characters; {MAX_KEY_CHARACTERS} are taken")
    return pairs


Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=MAX_KEY_CHARACTERS)],
        Annotated[str, Field(max_length=MAX_VALUE_CHARACTERS)],
    ],
    Field(max_length=MAX_METADATA_PAIRS),
    BeforeValidator(_check_keys),
    count_pairs(MAX_METADATA_PAIRS),  # the last is the first to be asked
]


class TextConfig(Strict):
    """The form of the answer."""

    format: formats.FlatFormat | None = None


class ResponsesRequest(RejectUnsupported, formats.Formats, MediaOptions):
    """The body of ``POST /v1/responses``."""

    elsewhere: ClassVar[frozenset[str]] = content.MISPLACED_NAMES | {"messages", "system"}
    hint: ClassVar[str] = "input holds the messages, and instructions what stands before them"

    input: Annotated[
        Items,
        BeforeValidator(_as_messages, json_schema_input_type=str | Items),
        Field(examples=["What is in the image?"]),
    ]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: Tokens = None
    text: TextConfig | None = None
    tools: FlatTools | None = None
    tool_choice: ToolChoice | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    truncation: Literal["auto", "disabled"] | None = None

    accepted_defaults: ClassVar[Defaults] = {
        **GUIDED_FIELDS,
        "response_format": ({"type": "text"},),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "context_management": ([],),
        "moderation": (),
    }
    hints: ClassVar[dict[str, str]] = {
        **GUIDED_HINTS,
        "response_format": "response_format is not of this address; send it in text, as format",
        "conversation": "there are no conversations here; send previous_response_id",
        "background": "answers are given at once; leave background out, or stream",
    }
