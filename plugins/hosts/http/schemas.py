"""What the routes take, field by field, strictly typed.

Fields that are not known are ignored, as OpenAI's clients expect; those that are known, are not
supported, and would change what the answer means are refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

STOPS = 16
ITEMS = 256
LONGEST_STOP = 1000  # characters


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_place(place: Any) -> Any:
    return {"url": place} if isinstance(place, str) else place


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Strict(BaseModel):
    """No "1" for 1, no infinity, nothing dropped in silence but unknown fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class Place(Strict):
    """Where a picture or a video is: a data URI, an address, or a path."""

    url: Annotated[str, Field(min_length=1)]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: Annotated[Place, BeforeValidator(_as_place)]


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: Annotated[Place, BeforeValidator(_as_place)]


AnyPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Turn(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[AnyPart], BeforeValidator(_as_parts)]


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Stops = Annotated[list[Stop], Field(max_length=STOPS)]


class StreamOptions(Strict):
    include_usage: bool = False


class Sampling(Strict):
    """How tokens are chosen; what is left out is the checkpoint's own."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


# Fields that change what an answer is, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "store": (False,),
}


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``; num_frames to order are this server's own."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: Annotated[Stops | None, BeforeValidator(_as_list)] = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    tiling: Literal["auto", "always", "never"] = "auto"
    order: Literal["template", "given"] = "template"
    timeout: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, neutral in _NEUTRAL.items():
            value = values.get(name)
            if value is not None and not any(value == allowed for allowed in neutral):
                raise ValueError(f"{name} is not supported; leave it out")
        return values

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.n not in (None, 1):
            raise ValueError("n must be 1; ask again for another answer")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self


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


ShownPart = Annotated[ImagePart | VideoPart, Field(discriminator="type")]


class GroupPart(Strict):
    """Several pictures that share one vector."""

    type: Literal["group"]
    content: Annotated[list[ShownPart], Field(min_length=1, max_length=ITEMS)]


AnyItem = Annotated[TextPart | ImagePart | VideoPart | GroupPart, Field(discriminator="type")]


class EmbeddingsRequest(Strict):
    """``POST /v1/embeddings``; groups, and space to timeout, are this server's own."""

    input: Annotated[
        list[AnyItem], BeforeValidator(_as_items), Field(min_length=1, max_length=ITEMS)
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    space: Literal["joint", "vision"] = "joint"
    normalize: bool = True
    tiling: Literal["auto", "always", "never"] = "auto"
    timeout: float | None = None


class VideoRequest(Sampling):
    """``POST /v1/video/describe``; the fields are the contract's."""

    video: Annotated[Place, BeforeValidator(_as_place)]
    model: str | None = None
    segments: Literal["scenes"] | float = "scenes"
    start: float | None = None
    end: float | None = None
    num_frames: int = 8
    longest: float | None = 60.0
    max_tokens: int = 128
    system: str | None = None
    timeout: float | None = None
