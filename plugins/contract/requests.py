"""What a host may ask; standard library only.

Settings have the names, meanings and defaults of :class:`mlx_onevision.engine.options.Options`. A
number that is left out, or None, is the checkpoint's own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_onevision.files import SNIFF_BYTES as SNIFF_BYTES
from mlx_onevision.files import sniff as sniff
from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.results import Capability
from mlx_onevision.plugins.contract.wire import Part, Record
from mlx_onevision.sampling import ranges
from mlx_onevision.sampling.ranges import MOST_BIAS, Range

Kind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Media(Part):
    """An image or a video: exactly one of ``path``, ``url`` and ``data``.

    path : an absolute path on the machine of the backend.
    url : http(s), a ``data:`` address, or ``upload:`` and the id of what was sent before.
    data : the file's bytes; base64 in JSON.

    Whether a path or a URL is read at all is for whoever opened the backend to say.
    """

    kind: Kind
    path: str | None = None
    url: str | None = None
    data: bytes | None = None

    def check(self) -> None:
        given = [name for name in ("path", "url", "data") if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none of them"
            raise bad_request(f"the {self.kind} has {named}; give one of path, url and data")
        if not getattr(self, given[0]):
            raise bad_request(f"the {given[0]} of the {self.kind} is empty")
        if self.path is not None and "\0" in self.path:
            raise bad_request(f"the path of the {self.kind} holds a NUL")

    def __repr__(self) -> str:
        source = self.path or self.url or f"{len(self.data or b'')} bytes"
        return f"Media({self.kind}, {source if len(source) <= 80 else source[:77] + '…'})"


@dataclass(frozen=True)
class Message(Part):
    """One turn: a text, or texts and media in their order."""

    role: Role
    content: str | Sequence[str | Media]

    @property
    def parts(self) -> tuple[str | Media, ...]:
        """Texts and media in their order."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for part in self.parts if isinstance(part, Media))


@dataclass(frozen=True)
class TokenBias(Part):
    """What is added to the logit of a token, by its id; -100 to 100."""

    token: int
    bias: float

    def check(self) -> None:
        if self.token < 0:
            raise bad_request(f"the token id {self.token} is negative")
        if not -MOST_BIAS <= self.bias <= MOST_BIAS:
            raise bad_request(
                f"the bias of token {self.token} is {self.bias:g}", "give -100 to 100"
            )


Tiling = Literal["auto", "always", "never"]
Order = Literal["template", "given"]
EmbeddingSpace = Literal["vision", "joint"]

MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0
MAX_SCHEMA_CHARACTERS = 1 << 18

RANGES = {
    **ranges.RANGES,
    "num_frames": Range(ge=1),
    "fps": Range(gt=0),
    "start": Range(ge=0),
    "end": Range(gt=0),
    "longest": Range(gt=0),
    "timeout": Range(gt=0, le=round(MAX_TIMEOUT_SECONDS)),
}


class _Request(Record):
    """A record whose numbers are checked against ``RANGES``."""

    def check(self) -> None:
        for name, allowed in RANGES.items():
            _check_range(name, getattr(self, name, None), allowed)


@dataclass(frozen=True)
class GenerateRequest(_Request):
    """An answer to a conversation. ``timeout`` is in seconds, waiting in the queue included.

    max_tokens : of the answer; None for the checkpoint's own limit, else 256, within the backend's.
    logprobs : how many of the likeliest tokens are reported for each token of the answer, 0 for the
        chosen one alone; None for no logprobs.
    json_schema : a JSON Schema, as JSON: the answer is a document that it allows, and nothing else.
    """

    messages: Sequence[Message]
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Sequence[TokenBias] | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    num_frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    tiling: Tiling = "auto"
    order: Order = "template"
    logprobs: int | None = None
    json_schema: str | None = None
    timeout: float | None = None

    @classmethod
    def ask(cls, question: str, *media: Media, **settings: Any) -> "GenerateRequest":
        """One question about images and videos."""
        return cls(messages=[Message("user", [*media, question])], **settings)

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(medium for message in self.messages for medium in message.media)

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise bad_request("there are no messages", "ask something")
        if self.system is not None and self.messages[0].role == "system":
            raise bad_request("there are two system messages: in messages, and beside them")
        parts = [part for message in self.messages for part in message.parts]
        if not any(isinstance(part, Media) or part.strip() for part in parts):
            raise bad_request("the conversation is empty", "ask something")
        if not all(self.stop):
            raise bad_request("a stop string is empty")
        if self.num_frames is not None and self.fps is not None:
            raise bad_request("there are both num_frames and fps", "give one of them")
        if self.json_schema is not None:
            _check_schema(self.json_schema)
        _check_window(self.start, self.end)


@dataclass(frozen=True)
class Group(Part, discriminator="group"):
    """Several images that share one vector; in the joint space only."""

    media: Sequence[Media]

    def check(self) -> None:
        if not self.media:
            raise bad_request("a group holds no images")


@dataclass(frozen=True)
class EmbedRequest(_Request):
    """A vector for each item: a text, an image, a video, or a group of images."""

    items: Sequence[str | Group | Media]
    space: EmbeddingSpace = "vision"
    normalize: bool = True
    tiling: Tiling = "auto"
    timeout: float | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        groups = (item.media if isinstance(item, Group) else (item,) for item in self.items)
        return tuple(one for group in groups for one in group if isinstance(one, Media))

    def check(self) -> None:
        super().check()
        for place, item in enumerate(self.items):
            if isinstance(item, str) and not item.strip():
                raise bad_request(f"items[{place}] is an empty text")
            if self.space == "vision" and not isinstance(item, Media):
                what = "a text" if isinstance(item, str) else "a group"
                message = f"items[{place}] is {what}, for which the vision space has no place"
                raise bad_request(message, "take the joint space")


@dataclass(frozen=True)
class DescribeRequest(_Request):
    """A long video, described segment by segment, with chapters and a summary. Its settings are
    those of :class:`mlx_onevision.describe.options.DescribeOptions`.

    segments : "scenes", between cuts; or seconds, for parts of that length.
    num_frames : so many of each segment are sampled.
    longest : seconds; a scene that lasts longer is divided.
    max_tokens : of each segment's text.
    """

    video: Media
    segments: Literal["scenes"] | float = "scenes"
    start: float | None = None
    end: float | None = None
    num_frames: int = 8
    longest: float | None = 60.0
    max_tokens: int = 128
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    timeout: float | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        return (self.video,)

    def check(self) -> None:
        super().check()
        if self.video.kind != "video":
            raise bad_request("the medium is an image", "describe_video takes a video")
        if self.segments != "scenes":
            _check_range("segments", self.segments, Range(gt=0))
        _check_window(self.start, self.end)


def _check_schema(text: str) -> None:
    """Whether it can be a schema at all; which keywords are known is for the backend to say."""
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise bad_request(
            f"json_schema has {len(text)} characters", f"{MAX_SCHEMA_CHARACTERS} are read"
        )
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise bad_request("json_schema is not valid JSON") from None
    if not isinstance(schema, dict | bool):
        raise bad_request("json_schema is no JSON Schema", "give an object")


def _check_window(start: float | None, end: float | None) -> None:
    if start is not None and end is not None and end <= start:
        raise bad_request(f"end is {end:g} s, which is not after start, {start:g} s")


def _check_range(name: str, value: float | None, allowed: Range) -> None:
    if value is not None and not allowed.holds(value):
        raise bad_request(f"{name} is {str(value)[:30]}; it must be {allowed}")


def require_capability(
    request: GenerateRequest | EmbedRequest | DescribeRequest, claimed: Sequence[Capability]
) -> None:
    """Raises PluginError for a request that needs something which is not among ``claimed``."""
    for need in _needs(request):
        if need in claimed:
            continue
        if need in ("images", "videos"):
            raise PluginError("unsupported_media", f"{need} are not taken here", "ask without them")
        raise bad_request(f"there is no {need} here", "see the capabilities of info()")


def _needs(request: GenerateRequest | EmbedRequest | DescribeRequest) -> Iterator[Capability]:
    if isinstance(request, EmbedRequest):
        yield "embed"
    elif isinstance(request, DescribeRequest):
        yield "describe_video"
    else:
        yield "generate"
        if request.logprobs is not None:
            yield "logprobs"
        if request.json_schema is not None:
            yield "json_schema"
    for medium in request.media:
        yield "images" if medium.kind == "image" else "videos"
