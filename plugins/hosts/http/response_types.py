"""What the routes answer, key by key: for the OpenAPI file and the type checker."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.results import FinishReason, Usage


class PromptDetails(TypedDict):
    """Of the prompt: tokens whose KV cache was there, and tokens of images and videos."""

    cached_tokens: int
    media_tokens: int


class StageSeconds(TypedDict):
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
    seconds: StageSeconds
    peak_memory_bytes: int


class TopLogprob(TypedDict):
    """A token, its bytes, and the natural logarithm of its probability."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    """The tokens that the text is made of."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """The function that is called, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """The call that an answer is where one was forced."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """The answer: a text, or a call."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


Finish = FinishReason | Literal["tool_calls"]


class Choice(TypedDict):
    """One of ``n`` answers."""

    index: int
    message: AssistantMessage
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


class CalledFunctionDelta(TypedDict):
    """A call's next characters; the function's name comes with the first."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What is added to a call."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


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
        "seconds": StageSeconds(**usage.seconds),
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


def token_logprob(token: results.TokenLogprob) -> TokenLogprob:
    """A token's logprobs as both routes write them."""
    return {**_top_logprob(token), "top_logprobs": [_top_logprob(one) for one in token.top]}


def _top_logprob(one: results.TopLogprob) -> TopLogprob:
    return {"token": one.token, "bytes": list(one.data), "logprob": one.logprob}


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
