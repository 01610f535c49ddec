"""What ``/v1/responses`` answers, key by key: the response, and the events of its making."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from mlx_onevision.plugins.hosts.http.response_types import StageSeconds, TokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed"]
MessageStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStateType = Literal[
    "response.created",
    "response.in_progress",
    "response.completed",
    "response.incomplete",
    "response.failed",
]


class InputDetails(TypedDict):
    """Of the input: tokens whose KV cache was there, and tokens of images and videos."""

    cached_tokens: int
    cache_write_tokens: int
    media_tokens: int


class OutputDetails(TypedDict):
    """Always 0: this model does not reason."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """What a response took: tokens, seconds, bytes of the device at the peak."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    seconds: StageSeconds
    peak_memory_bytes: int


class OutputText(TypedDict):
    """The text of a message, with the logprobs of its tokens where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    """An answer in text."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: MessageStatus
    content: list[OutputText]


class FunctionCall(TypedDict):
    """The call that an answer is where one was forced."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: MessageStatus


OutputItem = OutputMessage | FunctionCall


class ResponseError(TypedDict):
    """Why a response failed after its first event."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response was cut off."""

    reason: Literal["max_output_tokens"]


class RequestedTextFormat(TypedDict):
    """The form of the answer, as it was asked for."""

    format: dict[str, Any]


class ResponseObject(TypedDict):
    """A response, at any point of its making."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    background: Literal[False]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float | None
    text: RequestedTextFormat
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    notes: NotRequired[list[str]]


class DeletedResponse(TypedDict):
    """That a response is not kept any more."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class NumberedEvent(TypedDict):
    """An event; they are numbered from 0."""

    sequence_number: int


class ResponseStateEvent(NumberedEvent):
    """An event with the response as it is then."""

    type: ResponseStateType
    response: ResponseObject


class OutputItemEvent(NumberedEvent):
    """The item of a response begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class EventOfItem(NumberedEvent):
    """An event within an item."""

    item_id: str
    output_index: int


class EventOfContentPart(EventOfItem):
    """An event within the text of a message."""

    content_index: int


class ContentPartEvent(EventOfContentPart):
    """The text of a message begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDelta(EventOfContentPart):
    """The next characters of a text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(EventOfContentPart):
    """A whole text."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TokenLogprob]


class ArgumentsDelta(EventOfItem):
    """The next characters of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(EventOfItem):
    """A call's name, and its whole arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


ResponseEvent = (
    ArgumentsDelta
    | ArgumentsDone
    | ResponseStateEvent
    | OutputItemEvent
    | ContentPartEvent
    | TextDelta
    | TextDone
)
