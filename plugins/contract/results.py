"""What a backend answers: results, and the events that come before them; standard library only.

The order of events is: any number of progress, text and segment events; at most one usage event;
then one done or error event, and nothing after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mlx_onevision.plugins.contract.errors import Code, PluginError, bad_request
from mlx_onevision.plugins.contract.wire import Part, Record, without_version

Capability = Literal[
    "generate", "embed", "describe_video", "images", "videos", "logprobs", "json_schema"
]
Input = Literal["text", "image", "video"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Space(Part):
    """A space of vectors.

    trained : whether the model was trained for what the space is used for; if not, how well it
        finds things has to be tried.
    """

    id: str
    dim: int
    inputs: tuple[Input, ...]
    trained: bool
    note: str = ""


@dataclass(frozen=True)
class ModelInfo(Record):
    """The model of a backend, and how busy it is.

    context : tokens of prompt and answer together.
    loaded : whether its weights are in memory. active, waiting : requests.
    healthy : False once it cannot answer any more, whatever it is asked, until it is opened again.
    """

    id: str
    revision: str
    context: int
    capabilities: tuple[Capability, ...]
    quantization: str | None = None
    spaces: tuple[Space, ...] = ()
    loaded: bool = False
    active: int = 0
    waiting: int = 0
    healthy: bool = True


@dataclass(frozen=True)
class Usage(Part):
    """What an answer took: tokens, seconds of wall time, bytes of the device at the peak.

    cached_tokens : of the prompt, those whose KV cache was still there. media_tokens : of the
        prompt, those that stand for images and videos.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    media_tokens: int = 0
    completion_tokens: int = 0
    prepare_seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def seconds(self) -> dict[str, float]:
        """The wall time of each stage."""
        stages = ("prepare", "encode", "prefill", "decode")
        return {stage: getattr(self, f"{stage}_seconds") for stage in stages}


@dataclass(frozen=True)
class TopLogprob(Part):
    """A token, and how likely it was in its place.

    token : its text; where it is a part of a character only, that part is U+FFFD.
    data : its bytes.
    logprob : natural logarithm of its probability before temperature and filters, after penalties
        and schema; LOGPROB_FLOOR where that is 0.
    """

    token: str
    data: bytes
    logprob: float


LOGPROB_FLOOR = -9999.0
"""Stands for the logarithm of 0, for which JSON has no number."""


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """The token that was chosen, and the likeliest ones in its place, the likeliest first."""

    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class GenerateResult(Record, discriminator="generation"):
    """A whole answer.

    finish_reason : "stop", the model ended or a stop string came; "length", it was cut off.
    notes : what of the videos was not used as it was asked for, a sentence each.
    logprobs : where they were asked for, of every token that the text is made of.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    notes: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class EmbedResult(Record, discriminator="embeddings"):
    """Vectors, one for each item, with all that has to be known to compare them with others.

    Two vectors mean the same only if space, model, revision, quantization and method agree.
    """

    vectors: tuple[tuple[float, ...], ...]
    space: str
    dim: int
    model: str
    revision: str
    method: str
    normalized: bool
    quantization: str | None = None

    def check(self) -> None:
        if any(len(vector) != self.dim for vector in self.vectors):
            raise bad_request(f"a vector has another length than dim, {self.dim}")


@dataclass(frozen=True)
class Segment(Part):
    """A part of a video and what is seen in it. Times are seconds from the video's beginning.

    frames : when those appear that were looked at.
    """

    index: int
    start: float
    end: float
    text: str
    frames: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chapter(Part):
    """Where a chapter begins, in seconds, and its title. It ends where the next one begins."""

    start: float
    title: str


@dataclass(frozen=True)
class DescribeResult(Record, discriminator="description"):
    """A whole video, described. Sound is not.

    duration : seconds. warnings : what was left out, or could not be read.
    """

    duration: float
    segments: tuple[Segment, ...]
    summary: str = ""
    chapters: tuple[Chapter, ...] = ()
    warnings: tuple[str, ...] = ()
    usage: Usage | None = None


Result = GenerateResult | DescribeResult | EmbedResult


@dataclass(frozen=True)
class ProgressEvent(Record, discriminator="progress"):
    """How far it has come: ``done`` of ``total``, where there is something to count.

    stage : "queued", "loading", "preparing", "answering"; of a described video also what is done
        with it just now. New stages may be added; show one that is not known as it stands.
    """

    stage: str
    done: float = 0
    total: float | None = None
    message: str = ""


@dataclass(frozen=True)
class TextEvent(Record, discriminator="text"):
    """The next characters, whole ones.

    segment : of which segment's text, of a described video.
    logprobs : where they were asked for, those of the tokens that have come since the event before.
    """

    delta: str
    segment: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class SegmentEvent(Record, discriminator="segment"):
    """A segment of a video is described."""

    segment: Segment


@dataclass(frozen=True)
class UsageEvent(Record, discriminator="usage"):
    """What the request took."""

    usage: Usage


@dataclass(frozen=True)
class DoneEvent(Record, discriminator="done"):
    """The end, well done. The deltas of a generation, joined, are its text."""

    result: Result


@dataclass(frozen=True)
class ErrorEvent(Record, discriminator="error"):
    """The end, without a result. What has come before it may be shown, but is not an answer."""

    code: Code
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: PluginError) -> "ErrorEvent":
        return cls(error.code, error.message, error.hint)

    @property
    def error(self) -> PluginError:
        return PluginError(self.code, self.message, self.hint)


Event = ProgressEvent | TextEvent | SegmentEvent | UsageEvent | DoneEvent | ErrorEvent

_CLASSES: dict[str | None, type[Event]] = {cls.discriminator: cls for cls in get_args(Event)}


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """The event that its ``to_dict`` was taken of, of whichever class. Raises PluginError:
    ``bad_request``, for values that are no event of this version.
    """
    without_version(values, "the event")
    kind = values.get("kind")
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise bad_request(f"there is no event of the kind {repr(kind)[:40]}")
    return cls.from_dict(values)
