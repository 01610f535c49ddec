"""What the routes take, field by field, strictly typed; the OpenAPI file is made of the same.

Fields that are not known are ignored, as OpenAI's clients expect; those that are known, are not
supported, and would change what the answer means are refused.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_onevision.plugins.contract.requests import (
    LONGEST_TIMEOUT,
    EmbeddingSpace,
    Order,
    Tiling,
)
from mlx_onevision.plugins.hosts.http.content import (
    AnyItem,
    AssistantTurn,
    ChatFormat,
    FlatFormat,
    Strict,
    SystemTurn,
    Turn,
    UserTurn,
    Where,
)
from mlx_onevision.sampling.ranges import RANGES

# Fields that several routes have, strictly typed, and how fields are refused.

AtLeastOne = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Second = Annotated[float, Field(ge=0)]
Timeout = Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT)]


def _within(name: str) -> Any:
    return Field(**RANGES[name].bounds)


TopLogprobs = Annotated[int, _within("logprobs")]


class Sampling(Strict):
    """How tokens are chosen; what is left out is the checkpoint's own."""

    temperature: Annotated[float, _within("temperature")] | None = None
    top_p: Annotated[float, _within("top_p")] | None = None
    top_k: Annotated[int, _within("top_k")] | None = None
    min_p: Annotated[float, _within("min_p")] | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    seed: Annotated[int, _within("seed")] | None = None


class Looking(Sampling):
    """Which frames of a video are looked at, and how pictures are; this server's own."""

    num_frames: AtLeastOne | None = None
    fps: Seconds | None = None
    start: Second | None = None
    end: Seconds | None = None
    tiling: Tiling = "auto"
    order: Order = "template"
    timeout: Timeout | None = None


Neutral = dict[str, tuple[Any, ...]]


class Refusing(Strict):
    """Fields that change what an answer is, and the values with which they do not."""

    neutral: ClassVar[Neutral] = {}
    ways_out: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, allowed in cls.neutral.items() if isinstance(values, dict) else ():
            value = values.get(name)
            if value is not None and not any(_same(value, one) for one in allowed):
                raise ValueError(cls.ways_out.get(name, f"{name} is not supported; leave it out"))
        return values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, allowed in cls.neutral.items():
            properties[name] = {"enum": [None, *allowed], "description": "Not supported."}
        return schema


def _same(value: Any, allowed: Any) -> bool:
    """As JSON compares them: false is not 0."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


STOPS = 16
ITEMS = 256
LONGEST_STOP = 1000  # characters
PAIRS = 16  # of metadata, as OpenAI's

LOGPROBS = "message.output_text.logprobs"
"""What ``include`` has to hold for them."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=STOPS)]


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Refusing, Looking):
    """``POST /v1/chat/completions``"""

    messages: Annotated[
        list[Turn],
        Field(
            min_length=1,
            fail_fast=True,
            examples=[[{"role": "user", "content": "What is in the image?"}]],
        ),
    ]
    model: str | None = None
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    stop: Annotated[
        Stops | None, BeforeValidator(_as_list, json_schema_input_type=Stop | Stops | None)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ChatFormat | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    neutral: ClassVar[Neutral] = {
        "n": (1,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "tools": ([],),
        "functions": ([],),
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "moderation": (),
        "store": (False,),
    }
    ways_out: ClassVar[dict[str, str]] = {"n": "n must be 1; ask again for another answer"}

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true")
        return self


class SystemItem(SystemTurn):
    type: Literal["message"] = "message"


class UserItem(UserTurn):
    type: Literal["message"] = "message"


class AssistantItem(AssistantTurn):
    type: Literal["message"] = "message"


Item = Annotated[SystemItem | UserItem | AssistantItem, Field(discriminator="role")]
Items = Annotated[list[Item], Field(min_length=1, fail_fast=True)]


def _as_messages(asked: Any) -> Any:
    """A text as one message; items of other types are named before their fields are looked at."""
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    for item in asked if isinstance(asked, list) else ():
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind != "message":
            raise ValueError("only messages are taken; there are no tools and nothing is kept")
    return asked


def _few(pairs: Any) -> Any:
    """Looked at before the pairs themselves are, of which there may be very many."""
    if isinstance(pairs, dict) and len(pairs) > PAIRS:
        raise ValueError(f"there are {len(pairs)} pairs; {PAIRS} are kept")
    return pairs


class TextConfig(Strict):
    format: FlatFormat | None = None


class ResponsesRequest(Refusing, Looking):
    """``POST /v1/responses``"""

    input: Annotated[
        Items,
        BeforeValidator(_as_messages, json_schema_input_type=str | Items),
        Field(examples=["What is in the image?"]),
    ]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: AtLeastOne | None = None
    text: TextConfig | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = None
    top_logprobs: TopLogprobs | None = None
    stream: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=PAIRS), BeforeValidator(_few)] | None = (
        None
    )

    neutral: ClassVar[Neutral] = {
        "store": (False,),
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "truncation": ("disabled",),
        "context_management": ([],),
        "moderation": (),
    }
    ways_out: ClassVar[dict[str, str]] = {
        "store": "nothing is stored here; leave store out, or set it to false",
        "previous_response_id": "nothing is kept from one request to the next; send all messages",
        "conversation": "nothing is kept from one request to the next; send all messages",
        "background": "answers are given at once; leave background out, or stream",
    }


def _as_items(value: Any) -> Any:
    """One item or several, texts written out as parts."""
    items = [value] if isinstance(value, str | dict) else value
    if not isinstance(items, list):
        return items
    return [_as_item(item) for item in items]


def _as_item(item: Any) -> Any:
    if isinstance(item, int | list):
        raise ValueError("tokens are not taken; send texts (check_embedding_ctx_length=False)")
    if not isinstance(item, str):
        return item
    for kind in ("image", "video"):
        if item[:11].lower() == f"data:{kind}/":
            return {"type": f"{kind}_url", f"{kind}_url": item}
    return {"type": "text", "text": item}


Bounds = Field(min_length=1, max_length=ITEMS)


class EmbeddingsRequest(Strict):
    """``POST /v1/embeddings``; groups, and space to timeout, are this server's own."""

    input: Annotated[
        list[AnyItem],
        Field(min_length=1, max_length=ITEMS, examples=[["a red circle"]]),
        BeforeValidator(
            _as_items,
            json_schema_input_type=str | AnyItem | Annotated[list[str | AnyItem], Bounds],
        ),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: AtLeastOne | None = None
    space: EmbeddingSpace = "joint"
    normalize: bool = True
    tiling: Tiling = "auto"
    timeout: Timeout | None = None


class VideoRequest(Sampling):
    """``POST /v1/video/describe``; the fields are the contract's."""

    video: Where
    model: str | None = None
    segments: Literal["scenes"] | Seconds = "scenes"
    start: Second | None = None
    end: Seconds | None = None
    num_frames: AtLeastOne = 8
    longest: Seconds | None = 60.0
    max_tokens: AtLeastOne | None = None
    system: str | None = None
    timeout: Timeout | None = None
