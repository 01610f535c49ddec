"""Which frames of a video the model sees. Numbers only: the decoding process imports this, too.

Uniform sampling is the rule of transformers' ``BaseVideoProcessor.sample_frames``
(video_processing_utils.py), ``floor(i * T / N)`` for N of T frames, or all where N > T (the
reference refuses). A rate gives ``int(duration * fps)`` frames by the same rule, as there, if the
frames are evenly spaced in time; else the frame on screen at each of as many evenly spaced
instants, none of them twice.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from mlx_onevision.errors import RequestError

DEFAULT_FRAMES = 32

# Seconds below which two instants are the same: container clocks tick far more coarsely.
_INSTANT = 1e-6


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video a caller wants.

    num_frames : the number of frames, evenly spread over the video. None, with no ``fps`` either:
        32 of a file, or fewer where the model's context holds fewer; all of a list or an array.
    fps : frames a second instead.
    start, end : the seconds between which frames are on screen; None for the video's own.
    ends : whether the first frame and the last are among them, and frames are repeated where the
        video has fewer than wanted, as in the original code with ``force_sample``.

    Raises:
        RequestError: for a number out of range, and for ``fps`` with ``num_frames`` or ``ends``.
    """

    num_frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None
    ends: bool = False

    def __post_init__(self) -> None:
        count = self.num_frames
        if count is not None and (type(count) is not int or count < 1):
            raise RequestError(f"num_frames is {count!r}; it must be a whole number, 1 or more")
        for name in ("fps", "start", "end"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RequestError(f"{name} is {value!r}; it must be a number")
            try:
                finite = math.isfinite(value)
            except OverflowError:  # it may have more digits than can be printed
                raise RequestError(f"{name} is out of range; no float is as large") from None
            if not finite or value < 0 or (value == 0 and name != "start"):
                least = "0 or more" if name == "start" else "more than 0"
                raise RequestError(f"{name} is {value!r}; it must be {least}")
        if count is not None and self.fps is not None:
            raise RequestError("give either num_frames or fps, not both")
        if type(self.ends) is not bool:
            raise RequestError(f"ends is {self.ends!r}; it must be true or false")
        if self.ends and self.fps is not None:
            raise RequestError("ends has no meaning with fps; use num_frames")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise RequestError(f"end is {self.end:g} s, which is not after start, {self.start:g} s")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the options, as keyword arguments and as keys of a video block."""
        return tuple(field.name for field in fields(cls))

    def over(self, given: dict[str, Any]) -> "FrameOptions":
        """These options, replaced where ``given`` has others. ``num_frames`` and ``fps`` replace
        each other, and ``fps`` switches ``ends`` off.
        """
        number = {"num_frames": None, "fps": None}
        reset: dict[str, Any] = number if given.keys() & number else {}
        if given.get("fps") is not None:
            reset = reset | {"ends": False}
        return replace(self, **{**reset, **given})

    @property
    def explicit(self) -> bool:
        """Whether the caller has set the number of frames, or their rate."""
        return self.num_frames is not None or self.fps is not None


def uniform(total: int, wanted: int) -> list[int]:
    """Indices of ``wanted`` frames of ``total``, or of all where there are no more."""
    wanted = min(wanted, total)
    return [index * total // wanted for index in range(wanted)]


def end_to_end(total: int, wanted: int) -> list[int]:
    """Indices from the first frame to the last, as the original code's ``np.linspace(0, total - 1,
    wanted, dtype=int)`` (LLaVA-NeXT, ``process_video_with_decord``).
    """
    if wanted == 1:
        return [0]
    step = (total - 1) / (wanted - 1)
    return [*(int(index * step) for index in range(wanted - 1)), total - 1]


def uniform_or_endpoints(total: int, options: FrameOptions, default: int) -> list[int]:
    """Indices of frames by the rule of ``options``; ``default`` of them where it sets no number."""
    rule = end_to_end if options.ends else uniform
    return rule(total, options.num_frames or default)


def frames_between(times: Sequence[float], length: float, options: FrameOptions) -> range:
    """The indices of the frames on screen from ``start`` to before ``end``.

    times : the second at which each frame appears, rising from about 0.
    length : the second at which the last one disappears.

    Raises:
        RequestError: for a start behind the end of the video.
    """
    first, last = 0, len(times)
    if options.start is not None:
        if options.start >= length:
            raise RequestError(
                f"start is {options.start:g} s, but the video is {length:.2f} s long"
            )
        first = max(bisect_right(times, options.start + _INSTANT) - 1, 0)
    if options.end is not None:
        last = max(bisect_left(times, options.end - _INSTANT), first + 1)
    return range(first, last)


def select_frames(
    times: Sequence[float], length: float, options: FrameOptions, default: int
) -> list[int]:
    """Indices of the frames to decode, rising; at least one, and with ``ends`` some may be equal.
    ``times``, ``length`` : as in :func:`frames_between`, with at least one frame.
    """
    window = frames_between(times, length, options)
    if options.fps is None:
        return [window[i] for i in uniform_or_endpoints(len(window), options, default)]
    begin = times[window[0]]
    finish = times[window[-1] + 1] if window[-1] + 1 < len(times) else length
    # No more than there are, which may be less than a float holds.
    wanted = max(1, int(min((finish - begin) * options.fps + _INSTANT, len(window))))
    if wanted >= len(window):
        return list(window)
    step = (finish - begin) / len(window)
    if all(abs(times[k] - begin - i * step) <= step / 2 for i, k in enumerate(window)):
        return [window[i] for i in uniform(len(window), wanted)]
    instants = (begin + i * (finish - begin) / wanted for i in range(wanted))
    shown = (bisect_right(times, instant + _INSTANT) - 1 for instant in instants)
    return sorted(set(shown))
