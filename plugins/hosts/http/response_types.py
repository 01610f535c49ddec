"""What the routes answer, key by key: for the OpenAPI file and the type checker."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from mlx_onevision.plugins.contract.results import FinishReason, TokenLogprob, TopLogprob, Usage


class PromptDetails(TypedDict):
    """Of the prompt: tokens whose KV cache was there, and tokens of images and videos."""

    cached_tokens: int
    media_tokens: int


class Took(TypedDict):
    """Seconds of wall time."""

    prepare: float
    encode: float
    prefill: float
    decode: float


class ChatUsage(TypedDict):
    """What a completion took: tokens, seconds, bytes of the device at the peak."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    seconds: Took
    peak_memory_bytes: int


class Likely(TypedDict):
    """A token, its bytes, and the natural logarithm of its probability."""

    token: str
    bytes: list[int]
    logprob: float


class Chosen(Likely):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[Likely]


class ChoiceLogprobs(TypedDict):
    """The tokens that the text is made of."""

    content: list[Chosen]
    refusal: None


class Called(TypedDict):
    """The function that is called, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """The call that an answer is where one was forced."""

    id: str
    type: Literal["function"]
    function: Called


class Said(TypedDict):
    """The answer: a text, or a call."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


Finish = FinishReason | Literal["tool_calls"]


class Choice(TypedDict):
    """One of ``n`` answers."""

    index: int
    message: Said
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish


class ChatCompletion(TypedDict):
    """A whole completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    notes: NotRequired[list[str]]


class CalledDelta(TypedDict):
    """A call's next characters; the function's name comes with the first."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What is added to a call."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledDelta


class Delta(TypedDict):
    """What is added to an answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    """What is added to one of ``n`` answers; ``finish_reason`` comes with its last."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(TypedDict):
    """An event of a streamed completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[ChatUsage | None]
    notes: NotRequired[list[str]]


class Embedding(TypedDict):
    """As numbers, or as little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Always 0: backends do not count them."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """Vectors mean the same only where space, revision, quantization and method agree."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    space: str
    dim: int
    revision: str
    quantization: str | None
    method: str
    normalized: bool


def sum_usage(found: Sequence[Usage]) -> Usage:
    """Of answers to one request that were made together: tokens of all of them, the prompt's and
    the media's counted once, as OpenAI does; of times and memory the largest.
    """
    names = [field.name for field in fields(Usage)]
    whole = {name: max(getattr(usage, name) for usage in found) for name in names}
    whole["completion_tokens"] = sum(usage.completion_tokens for usage in found)
    return Usage(**whole)


def usage_body(usage: Usage) -> ChatUsage:
    """Tokens, as OpenAI counts them; seconds and bytes beside them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "media_tokens": usage.media_tokens,
        },
        "seconds": Took(**usage.seconds),
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


def chosen(token: TokenLogprob) -> Chosen:
    """A token's logprobs as both routes write them."""
    return {**_likely(token), "top_logprobs": [_likely(one) for one in token.top]}


def _likely(one: TopLogprob) -> Likely:
    return {"token": one.token, "bytes": list(one.data), "logprob": one.logprob}


# The object and the events of ``/v1/responses``.

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
    seconds: Took
    peak_memory_bytes: int


class OutputText(TypedDict):
    """The text of a message, with the logprobs of its tokens where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Chosen]


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


class ResponseFault(TypedDict):
    """Why a response failed after its first event."""

    code: str
    message: str


class Incomplete(TypedDict):
    """Why a response was cut off."""

    reason: Literal["max_output_tokens"]


class TextSaid(TypedDict):
    """The form of the answer, as it was asked for."""

    format: dict[str, Any]


class ResponseObject(TypedDict):
    """A response, at any point of its making."""

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
    output: list[OutputItem]
    background: Literal[False]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float | None
    text: TextSaid
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    notes: NotRequired[list[str]]


class Deleted(TypedDict):
    """That a response is not kept any more."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class UploadObject(TypedDict):
    """A file that was sent by itself; ``url`` stands in requests in the place of its data."""

    object: Literal["file"]
    id: str
    url: str
    kind: Literal["image", "video"]
    bytes: int


class DeletedUpload(TypedDict):
    """That a file is not kept any more."""

    object: Literal["file"]
    id: str
    deleted: Literal[True]


class Numbered(TypedDict):
    """An event; they are numbered from 0."""

    sequence_number: int


class Whole(Numbered):
    """An event with the response as it is then."""

    type: WholeType
    response: ResponseObject


class ItemEvent(Numbered):
    """The item of a response begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class OfItem(Numbered):
    """An event within an item."""

    item_id: str
    output_index: int


class InItem(OfItem):
    """An event within the text of a message."""

    content_index: int


class PartEvent(InItem):
    """The text of a message begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDelta(InItem):
    """The next characters of a text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[Chosen]


class TextDone(InItem):
    """A whole text."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[Chosen]


class ArgumentsDelta(OfItem):
    """The next characters of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(OfItem):
    """A call's name, and its whole arguments."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


ResponseEvent = (
    ArgumentsDelta | ArgumentsDone | Whole | ItemEvent | PartEvent | TextDelta | TextDone
)
