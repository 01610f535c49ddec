"""What the routes take, field by field; the OpenAPI file is made of the same. Unknown fields are
ignored, as OpenAI's clients expect; unsupported ones that would change the answer are refused.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_onevision.plugins.contract import requests
from mlx_onevision.plugins.contract.wire import is_list, is_object
from mlx_onevision.plugins.hosts.http import content, formats
from mlx_onevision.plugins.hosts.http.content import Strict
from mlx_onevision.plugins.hosts.http.tools import ToolChoice, Tools
from mlx_onevision.sampling.ranges import MOST_BIAS, RANGES

COUNT_DESCRIPTION = f"{content.MAX_MESSAGES_AND_PARTS:,} at most, their parts counted, too."

AtLeastOne = Annotated[int, Field(ge=1)]


def _minus_one_as_none(value: Any) -> Any:
    """Some clients send -1 for what is not said."""
    return None if type(value) is int and value == -1 else value


Seconds = Annotated[float, Field(gt=0)]
Second = Annotated[float, Field(ge=0)]
Timeout = Annotated[float, Field(gt=0, le=requests.MAX_TIMEOUT_SECONDS)]


def _within(name: str) -> Any:
    return Field(**RANGES[name].bounds)


def _or_minus_one(kind: Any) -> Any:
    return BeforeValidator(_minus_one_as_none, json_schema_input_type=Literal[-1] | kind | None)


Tokens = Annotated[AtLeastOne | None, _or_minus_one(AtLeastOne)]
TopK = Annotated[int, _within("top_k")]
Seed = Annotated[int, _within("seed")]


def count_pairs(most: int) -> BeforeValidator:
    """Refuses an object of more pairs before each of them is looked at."""

    def check(pairs: Any) -> Any:
        if is_object(pairs) and len(pairs) > most:
            raise ValueError(f"there are {len(pairs):,} pairs; {most:,} are taken")
        return pairs

    return BeforeValidator(check)


MAX_BIASED_TOKENS = 1024  # tokens
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
TopLogprobs = Annotated[int, _within("logprobs")]


class Sampling(Strict):
    """How tokens are chosen; what is left out is the checkpoint's own."""

    temperature: Annotated[float, _within("temperature")] | None = None
    top_p: Annotated[float, _within("top_p")] | None = None
    top_k: Annotated[TopK | None, _or_minus_one(TopK)] = None
    min_p: Annotated[float, _within("min_p")] | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    seed: Annotated[Seed | None, _or_minus_one(Seed)] = None


class Penalties(Sampling):
    """What changes logits before tokens are chosen."""

    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Bias],
            Field(max_length=MAX_BIASED_TOKENS, json_schema_extra={"additionalProperties": False}),
            count_pairs(MAX_BIASED_TOKENS),
        ]
        | None
    ) = None

    @property
    def biases(self) -> list[requests.TokenBias] | None:
        if self.logit_bias is None:
            return None
        return [requests.TokenBias(int(token), bias) for token, bias in self.logit_bias.items()]


class MediaOptions(Penalties):
    """Which frames of a video are sampled, and how images are tiled; this server's own."""

    num_frames: AtLeastOne | None = None
    fps: Seconds | None = None
    start: Second | None = None
    end: Seconds | None = None
    tiling: requests.Tiling = "auto"
    order: requests.Order = "template"
    timeout: Timeout | None = None


def options(asked: MediaOptions) -> dict[str, Any]:
    """The settings of a GenerateRequest that have the same names in the contract."""
    values = {name: getattr(asked, name) for name in MediaOptions.model_fields}
    return {**values, "logit_bias": asked.biases}


Defaults = dict[str, tuple[Any, ...]]


class RejectUnsupported(content.RejectMisplacedContent):
    """Refuses fields that would change what an answer is, but for values that change nothing.

    accepted_defaults : these fields and values. hints : sentences of refusals, by field.
    """

    accepted_defaults: ClassVar[Defaults] = {}
    hints: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, allowed in cls.accepted_defaults.items() if is_object(values) else ():
            value = values.get(name)
            if value is not None and not any(_same(value, one) for one in allowed):
                raise ValueError(cls.hints.get(name, f"{name} is not supported; leave it out"))
        return values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, allowed in cls.accepted_defaults.items():
            properties[name] = {"enum": [None, *allowed], "description": "Not supported."}
        return schema


def _same(value: Any, allowed: Any) -> bool:
    """As JSON compares them: false is not 0."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


# Forms of an answer that are no JSON Schema.
GUIDED_FIELDS: Defaults = dict.fromkeys(
    ("guided_choice", "guided_regex", "guided_grammar", "guided_decoding", "regex", "grammar"), ()
)
GUIDED_HINTS = {name: f"{name} is not supported; send a JSON Schema" for name in GUIDED_FIELDS}

MAX_STOP_STRINGS, MAX_STOP_CHARACTERS = 16, 1000  # strings, characters of one
MAX_EMBEDDING_ITEMS = 256  # of one request for embeddings
MAX_CHOICES = 8  # answers to one request


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)]


class StreamOptions(Strict):
    """Whether the last chunk has the usage."""

    include_usage: bool = False


_EXAMPLE_MESSAGES = [{"role": "user", "content": "What is in the image?"}]


class ChatRequest(RejectUnsupported, formats.Formats, MediaOptions):
    """The body of ``POST /v1/chat/completions``."""

    elsewhere: ClassVar[frozenset[str]] = content.MISPLACED_NAMES | {"prompt", "input", "system"}
    hint: ClassVar[str] = f"messages hold everything, and {content.CONTENT_HINT}"
    messages: Annotated[
        list[content.AnyTurn],
        Field(
            min_length=1,
            max_length=content.MAX_MESSAGES_AND_PARTS,
            fail_fast=True,
            description=COUNT_DESCRIPTION,
            examples=[_EXAMPLE_MESSAGES],
        ),
        BeforeValidator(content.count_parts),
    ]
    model: str | None = None
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    stop: Annotated[
        Stops | None, BeforeValidator(_as_list, json_schema_input_type=Stop | Stops | None)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: formats.ChatFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    accepted_defaults: ClassVar[Defaults] = {
        **GUIDED_FIELDS,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        "store": (False,),
    }
    hints: ClassVar[dict[str, str]] = {
        **GUIDED_HINTS,
        "functions": "functions is not supported; send tools",
        "function_call": "function_call is not supported; send tool_choice",
    }

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true")
        return self


def _as_items(value: Any) -> Any:
    items = content.count_parts([value] if isinstance(value, str | dict) else value)
    return [_as_item(item) for item in items] if is_list(items) else items


def _as_item(item: Any) -> Any:
    if isinstance(item, int | list):
        raise ValueError("tokens are not taken; send texts (check_embedding_ctx_length=False)")
    if not isinstance(item, str):
        return item
    for kind in ("image", "video"):
        if item[:11].lower() == f"data:{kind}/":
            return {"type": f"{kind}_url", f"{kind}_url": item}
    return {"type": "text", "text": item}


_Given = str | content.AnyItem
_Inputs = _Given | Annotated[list[_Given], Field(min_length=1, max_length=MAX_EMBEDDING_ITEMS)]


class EmbeddingsRequest(content.RejectMisplacedContent):
    """``POST /v1/embeddings``; groups, and space to timeout, are this server's own."""

    elsewhere: ClassVar[frozenset[str]] = content.MISPLACED_NAMES | {"messages", "prompt", "texts"}
    hint: ClassVar[str] = "everything that gets a vector is in input"

    input: Annotated[
        list[content.AnyItem],
        Field(min_length=1, max_length=MAX_EMBEDDING_ITEMS, examples=[["a red circle"]]),
        BeforeValidator(_as_items, json_schema_input_type=_Inputs),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: AtLeastOne | None = None
    space: requests.EmbeddingSpace = "joint"
    normalize: bool = True
    tiling: requests.Tiling = "auto"
    timeout: Timeout | None = None


class VideoRequest(Sampling):
    """``POST /v1/video/describe``; the fields are the contract's."""

    video: content.AnyMediaUrl
    model: str | None = None
    segments: Literal["scenes"] | Seconds = "scenes"
    start: Second | None = None
    end: Seconds | None = None
    num_frames: AtLeastOne = 8
    longest: Seconds | None = 60.0
    max_tokens: Tokens = None
    system: str | None = None
    timeout: Timeout | None = None
