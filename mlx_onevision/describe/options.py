"""How to describe a video: which segments, how many frames of each, how many tokens."""

from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal, TypedDict, get_args

from mlx_onevision.describe.scenes import DetectorName, Span, scenes, windows
from mlx_onevision.errors import RequestError
from mlx_onevision.media.frame_sampling import FrameOptions

MOST_SEGMENTS = 100_000


class DescribeOptions(TypedDict, total=False):
    """Settings of a description; each has a default.

    segments : "scenes" (the default) finds where the video is cut; a number of seconds makes
        windows of that length.
    start, end : seconds; only this part of the video.
    num_frames : of each segment, 8 by default; it is described from these.
    longest : seconds; a scene that lasts longer is divided into equal parts. 60 by default; None
        never divides one.
    finder : how cuts are found: "histogram" (the default), or "pyscenedetect", which needs the
        extra ``scenes``.
    max_tokens : of a segment's caption, at most; 128 by default.
    system, temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, seed : as in
        :class:`~mlx_onevision.engine.options.Options`, for every text that is generated.
    """

    segments: Literal["scenes"] | float
    start: float | None
    end: float | None
    num_frames: int
    longest: float | None
    finder: DetectorName
    max_tokens: int
    system: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None


@dataclass(frozen=True)
class DescribeSettings:
    """The settings that are not those of generating text; see :class:`DescribeOptions`.

    Raises:
        RequestError: for a setting out of range.
    """

    segments: Literal["scenes"] | float = "scenes"
    start: float | None = None
    end: float | None = None
    num_frames: int = 8
    longest: float | None = 60.0
    finder: DetectorName = "histogram"
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.segments, str):
            if self.segments != "scenes":
                raise RequestError(f"segments is {self.segments!r}; give scenes, or seconds")
        else:
            _check_seconds("segments", self.segments)
        if self.longest is not None:
            _check_seconds("longest", self.longest)
        if self.finder not in get_args(DetectorName):
            known = " or ".join(get_args(DetectorName))
            raise RequestError(f"the finder is {self.finder!r}; it must be {known}")
        if type(self.num_frames) is not int:
            raise RequestError(f"num_frames is {self.num_frames!r}; it must be a whole number")
        FrameOptions(self.num_frames, start=self.start, end=self.end)

    @classmethod
    def of(cls, given: dict[str, Any]) -> tuple["DescribeSettings", dict[str, Any]]:
        """These, and the rest of the options: settings of generating text that were given.

        Raises:
            RequestError: for an option that does not exist.
        """
        unknown = sorted(given.keys() - DescribeOptions.__annotations__.keys())
        if unknown:
            raise RequestError(f"a description has no option {unknown[0]!r}; see DescribeOptions")
        own = {field.name for field in fields(cls)}
        return (
            cls(**{name: value for name, value in given.items() if name in own}),
            {n: value for n, value in given.items() if n not in own and value is not None},
        )

    def part(self, length: float) -> Span:
        """Start and end of what is described of a video of ``length`` seconds.

        Raises:
            RequestError: for a start behind its end.
        """
        start = float(self.start or 0.0)
        if start >= length:
            raise RequestError(f"start is {start:g} s, but the video is {length:.2f} s long")
        return start, length if self.end is None else min(float(self.end), length)

    def spans(self, start: float, end: float, cuts: list[float]) -> list[Span]:
        """The segments between ``start`` and ``end``.

        Raises:
            RequestError: for more of them than anyone can want.
        """
        seconds = self.longest if isinstance(self.segments, str) else float(self.segments)
        if seconds is not None and (end - start) / seconds > MOST_SEGMENTS:
            raise RequestError(
                f"{end - start:.0f} s in segments of {seconds:g} s are more than {MOST_SEGMENTS} "
                "segments; use longer ones"
            )
        if isinstance(self.segments, str):
            return scenes(cuts, start, end, self.longest)
        return windows(start, end, float(self.segments))


def _check_seconds(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not isfinite(number) or number <= 0:
        raise RequestError(f"{name} is {value!r}; it must be more than 0 seconds")
