"""What the routes answer, key by key: for the OpenAPI file and the type checker."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from mlx_onevision.plugins.contract.results import FinishReason, TokenLogprob, TopLogprob, Usage


class PromptDetails(TypedDict):
    cached_tokens: int
    media_tokens: int


class Took(TypedDict):
    """Seconds of wall time."""

    prepare: float
    encode: float
    prefill: float
    decode: float


class ChatUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    seconds: Took
    peak_memory_bytes: int


class Likely(TypedDict):
    token: str
    bytes: list[int]
    logprob: float


class Chosen(Likely):
    top_logprobs: list[Likely]


class ChoiceLogprobs(TypedDict):
    content: list[Chosen]
    refusal: None


class Called(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: Called


class Said(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


Finish = FinishReason | Literal["tool_calls"]


class Choice(TypedDict):
    index: int
    message: Said
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    notes: NotRequired[list[str]]


class CalledDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledDelta


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: Finish | None


class ChatCompletionChunk(TypedDict):
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


class FunctionCall(TypedDict):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: MessageStatus


OutputItem = OutputMessage | FunctionCall


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
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class Numbered(TypedDict):
    sequence_number: int


class Whole(Numbered):
    type: WholeType
    response: ResponseObject


class ItemEvent(Numbered):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class OfItem(Numbered):
    item_id: str
    output_index: int


class InItem(OfItem):
    content_index: int


class PartEvent(InItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputText


class TextDelta(InItem):
    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[Chosen]


class TextDone(InItem):
    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[Chosen]


class ArgumentsDelta(OfItem):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(OfItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


ResponseEvent = (
    ArgumentsDelta | ArgumentsDone | Whole | ItemEvent | PartEvent | TextDelta | TextDone
)
