"""The description of a video, segment by segment, and the file formats that it is written in.

All times are seconds from the beginning of the video. They are where it was cut, never numbers that
a model wrote.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from mlx_onevision.errors import RequestError

VERSION = 1  # of the JSON form

SILENT = "Only the picture is described, not the sound."
EMPTY = "(not described)"  # the subtitle of a segment without text, else it would look like a gap


@dataclass(frozen=True)
class Segment:
    """A part of a video, and its caption.

    start, end : seconds from the beginning of the video.
    text : the caption; empty where the segment is not described.
    frames : the times of the frames that the model saw, in seconds.

    Raises:
        RequestError: for an end that is not behind the start.
    """

    start: float
    end: float
    text: str
    frames: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < float("inf"):
            raise RequestError(f"a segment cannot last from {self.start} s to {self.end} s")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "frames": list(self.frames)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Segment":
        """The segment that :meth:`to_dict` made; unknown keys are ignored.

        Raises:
            RequestError: for a mapping that is no segment.
        """
        with _reading("a segment"):
            return cls(
                start=_number(values["start"]),
                end=_number(values["end"]),
                text=_string(values["text"]),
                frames=tuple(map(_number, values.get("frames", ()))),
            )


@dataclass(frozen=True)
class Chapter:
    """Where a chapter begins, in seconds, and its title. It ends where the next one begins."""

    start: float
    title: str


@dataclass(frozen=True)
class VideoDescription:
    """A whole video, described.

    source : the video's path or address.
    duration : its length in seconds.
    model : the name of the model.
    segments : its parts in order, each with ``start``, ``end`` (seconds), ``text`` and ``frames``
        (the times of the frames that the model saw).
    summary : one to three sentences; empty where there is none.
    chapters : up to twelve, each with ``start`` (seconds) and ``title``.
    warnings : what was left out, or could not be read, a sentence each.
    """

    source: str
    duration: float
    model: str
    segments: tuple[Segment, ...]
    summary: str = ""
    chapters: tuple[Chapter, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": VERSION,
            "source": self.source,
            "duration": self.duration,
            "model": self.model,
            "summary": self.summary,
            "chapters": [asdict(chapter) for chapter in self.chapters],
            "segments": [segment.to_dict() for segment in self.segments],
            "warnings": list(self.warnings),
            "note": SILENT,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VideoDescription":
        """The description of which :meth:`to_dict` made ``values``.

        Raises:
            RequestError: for a mapping that is no description, or a later version's.
        """
        with _reading("a video's description"):
            if values["version"] != VERSION:
                raise RequestError(
                    f"the description has version {values['version']!r}; {VERSION} can be read"
                )
            return cls(
                source=_string(values["source"]),
                duration=_number(values["duration"]),
                model=_string(values["model"]),
                segments=tuple(map(Segment.from_dict, values["segments"])),
                summary=_string(values.get("summary", "")),
                chapters=tuple(
                    Chapter(_number(chapter["start"]), _string(chapter["title"]))
                    for chapter in values.get("chapters", ())
                ),
                warnings=tuple(map(_string, values.get("warnings", ()))),
            )


def write(description: VideoDescription, form: str) -> str:
    """The text of a file of one of the ``FORMS``; to be saved as UTF-8.

    Raises:
        RequestError: for another form.
    """
    if form not in FORMS:
        raise RequestError(f"{form!r} is no form of a description; known are {', '.join(FORMS)}")
    return FORMS[form](description)


def clock(seconds: float, separator: str = ".") -> str:
    """``1:02:03.456`` of a time: hours, minutes, seconds, milliseconds."""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, rest = divmod(milliseconds, 1000)
    return f"{hours}:{minutes:02}:{whole:02}{separator}{rest:03}"


def _text(description: VideoDescription) -> str:
    lines = [_one_line(description.summary), ""] if description.summary else []
    lines += [
        f"[{clock(segment.start)} - {clock(segment.end)}] {_one_line(segment.text)}"
        for segment in description.segments
    ]
    return "\n".join([*lines, *description.warnings]) + "\n"


def _json(description: VideoDescription) -> str:
    return json.dumps(description.to_dict(), ensure_ascii=False, indent=2) + "\n"


def _jsonl(description: VideoDescription) -> str:
    """A segment a line, then one line for the video without them."""
    rows = [
        {"type": "segment", "index": index, **segment.to_dict()}
        for index, segment in enumerate(description.segments)
    ]
    video = description.to_dict()
    del video["segments"]
    lines = (json.dumps(row, ensure_ascii=False) for row in [*rows, {"type": "video", **video}])
    return "".join(line.translate(_LINE_ENDS) + "\n" for line in lines)


def _srt(description: VideoDescription) -> str:
    """SubRip has no way to write what looks like a tag, so that is given wide brackets."""

    def plain(text: str) -> str:
        return re.sub(r"<(?=\s*/?\s*\w)", "＜", text).replace("{\\", "｛\\")

    cues = [
        f"{number}\n{start} --> {end}\n{plain(text)}\n"
        for number, (start, end, text) in enumerate(_cues(description, ","), 1)
    ]
    return "\n".join(cues)


def _vtt(description: VideoDescription) -> str:
    def escaped(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    cues = [f"{start} --> {end}\n{escaped(text)}\n" for start, end, text in _cues(description, ".")]
    return "\n".join(["WEBVTT\n", f"NOTE {SILENT}\n", *cues])


def _cues(description: VideoDescription, separator: str) -> Iterator[tuple[str, str, str]]:
    """Start, end and text."""
    for segment in description.segments:
        text = _one_line(segment.text) or EMPTY
        end = max(segment.end, segment.start + 0.001)
        yield _padded(segment.start, separator), _padded(end, separator), text


def _padded(seconds: float, separator: str) -> str:
    return clock(seconds, separator).rjust(len("00:00:00.000"), "0")


def _md(description: VideoDescription) -> str:
    blocks = [f"# {_escaped(description.source)}"]
    if description.summary:
        blocks.append(_escaped(description.summary))
    if description.chapters:
        rows = (f"- {clock(c.start)[:-4]} {_escaped(c.title)}" for c in description.chapters)
        blocks += ["## Chapters", "\n".join(rows)]
    rows = (
        f"- **{clock(s.start)[:-4]} to {clock(s.end)[:-4]}** {_escaped(s.text)}"
        for s in description.segments
    )
    blocks += ["## Segments", "\n".join(rows)]
    blocks += [f"*{_escaped(warning)}*" for warning in description.warnings]
    return "\n\n".join([*blocks, f"*{SILENT} Model: {_escaped(description.model)}.*"]) + "\n"


def _csv(description: VideoDescription) -> str:
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(["index", "start", "end", "text"])
    for index, segment in enumerate(description.segments):
        rows.writerow([index, f"{segment.start:.3f}", f"{segment.end:.3f}", segment.text])
    return file.getvalue()


FORMS: dict[str, Callable[[VideoDescription], str]] = {
    "text": _text,
    "json": _json,
    "jsonl": _jsonl,
    "srt": _srt,
    "vtt": _vtt,
    "md": _md,
    "csv": _csv,
}


# JSON may hold these as they are, but some readers take them for the end of a line.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """One line that Markdown shows as it stands."""
    return re.sub(r"([\\`*_<>\[\]#|~])", r"\\\1", _one_line(text))


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


@contextmanager
def _reading(what: str) -> Generator[None]:
    """Turns what a wrong mapping raises into one sentence."""
    try:
        yield
    except KeyError as error:
        raise RequestError(f"{what} lacks {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"this is not {what}: {error}") from None
