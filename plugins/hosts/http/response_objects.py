"""What ``/v1/responses`` answers, key by key: the object, and the events of its stream."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from mlx_onevision.plugins.hosts.http.response_types import Chosen, Took

Status = Literal["in_progress", "completed", "incomplete", "failed"]
MessageStatus = Literal["in_progress", "completed", "incomplete"]
WholeType = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int
    media_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    seconds: Took
    peak_memory_bytes: int


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Chosen]


class OutputMessage(TypedDict):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: MessageStatus
    content: list[OutputText]


class ResponseFault(TypedDict):
    code: str
    message: str


class Incomplete(TypedDict):
    reason: Literal["max_output_tokens"]


class TextSaid(TypedDict):
    format: dict[str, Any]


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseFault | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    background: Literal[False]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float | None
    text: TextSaid
    tool_choice: Literal["none"]
    tools: list[Any]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    notes: NotRequired[list[str]]


class Whole(TypedDict):
    """An event that holds the response as it is then."""

    type: WholeType
    sequence_number: int
    response: ResponseObject


class ItemEvent(TypedDict):
    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage


class InItem(TypedDict):
    """Where a part stands."""

    item_id: str
    output_index: int
    content_index: int


class PartEvent(InItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    part: OutputText


class TextDelta(InItem):
    type: Literal["response.output_text.delta"]
    sequence_number: int
    delta: str
    logprobs: list[Chosen]


class TextDone(InItem):
    type: Literal["response.output_text.done"]
    sequence_number: int
    text: str
    logprobs: list[Chosen]


ResponseEvent = Whole | ItemEvent | PartEvent | TextDelta | TextDone
