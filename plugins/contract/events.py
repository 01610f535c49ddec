"""What happens while a request is served; standard library only.

The order is: any number of progress, text and segment events; at most one usage event; then one
done or error event, and nothing after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_onevision.plugins.contract.errors import Code, PluginError, bad_request
from mlx_onevision.plugins.contract.results import (
    DescribeResult,
    EmbedResult,
    GenerateResult,
    Segment,
    TokenLogprob,
    Usage,
)
from mlx_onevision.plugins.contract.wire import Record, without_version

Result = GenerateResult | DescribeResult | EmbedResult


@dataclass(frozen=True)
class ProgressEvent(Record):
    """How far it has come: ``done`` of ``total``, where there is something to count.

    stage : "queued", "loading", "preparing", "answering"; of a described video also what is done
        with it just now. New stages may be added; show one that is not known as it stands.
    """

    discriminator: ClassVar[str | None] = "progress"

    stage: str
    done: float = 0
    total: float | None = None
    message: str = ""


@dataclass(frozen=True)
class TextEvent(Record):
    """The next characters, whole ones.

    segment : of which segment's text, of a described video.
    logprobs : where they were asked for, those of the tokens that have come since the event before.
    """

    discriminator: ClassVar[str | None] = "text"

    delta: str
    segment: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class SegmentEvent(Record):
    """A segment of a video is described."""

    discriminator: ClassVar[str | None] = "segment"

    segment: Segment


@dataclass(frozen=True)
class UsageEvent(Record):
    """What the request took."""

    discriminator: ClassVar[str | None] = "usage"

    usage: Usage


@dataclass(frozen=True)
class DoneEvent(Record):
    """The end, well done. The deltas of a generation, joined, are its text."""

    discriminator: ClassVar[str | None] = "done"

    result: Result


@dataclass(frozen=True)
class ErrorEvent(Record):
    """The end, without a result. What has come before it may be shown, but is not an answer."""

    discriminator: ClassVar[str | None] = "error"

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

_CLASSES: dict[str | None, type[Event]] = {
    cls.discriminator: cls
    for cls in (ProgressEvent, TextEvent, SegmentEvent, UsageEvent, DoneEvent, ErrorEvent)
}


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """The event that its ``to_dict`` was taken of, of whichever class.

    Raises:
        PluginError: ``bad_request``, for values that are no event of this version.
    """
    without_version(values, "the event")
    kind = values.get("kind")
    cls = _CLASSES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise bad_request(f"there is no event of the kind {repr(kind)[:40]}")
    return cls.from_dict(values)
