"""The videos of a prompt within the model's context: how many frames of each, and the line that
says when they are.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_onevision.errors import ContextOverflowError
from mlx_onevision.media.anyres import VideoPacking
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions
from mlx_onevision.media.sources import is_file
from mlx_onevision.media.video import TooManyFramesError, VideoFrames
from mlx_onevision.prompt.chat_template import Segment

TIME_TOKENS = 10  # of a frame's time in a prompt, "99999.99s,", at the most

logger = logging.getLogger("mlx_onevision")


@dataclass(frozen=True)
class ContextBudget:
    """The tokens of a context.

    limit : all of them. taken : by text and images.
    answer : to be left for the answer, where the number of frames is open.
    packing : of the videos.
    sentence : of the sentence behind each video, without the times of its frames; 0 without one.
    """

    limit: int
    taken: int
    answer: int
    packing: VideoPacking
    sentence: int

    def frames(self, tokens: int) -> int:
        """How many frames of one video take at most so many tokens."""
        ends = self.tokens(0)
        return max(tokens - ends, 0) // (self.tokens(1) - ends)

    def tokens(self, frames: int) -> int:
        """Tokens of one video of so many frames, its sentence included."""
        text = self.sentence + frames * TIME_TOKENS if self.sentence else 0
        return self.packing.tokens(frames) + text


def load_videos(
    blocks: Sequence[Mapping[str, Any]],
    options: FrameOptions,
    size: int,
    budget: ContextBudget,
    load: Callable[..., VideoFrames],
) -> list[VideoFrames]:
    """The videos of ``blocks``, as tiles of ``size`` pixels.

    First those whose number of frames the caller has set, which fit or are refused; then the files
    of which the usual number is taken, or fewer where they share what is left.

    options : what holds unless a block says otherwise.
    load : :func:`~mlx_onevision.media.video.load_video`, whose errors are raised, too.

    Raises:
        ContextOverflowError: with how many tokens it would take, and how many there are.
    """
    names = FrameOptions.names()
    wanted = [options.over({k: block[k] for k in names if k in block}) for block in blocks]
    sources = [block["video"] for block in blocks]
    is_open = [is_file(s) and not o.explicit for s, o in zip(sources, wanted, strict=True)]
    left = budget.limit - budget.taken - 1  # the answer has one token at least
    found: dict[int, VideoFrames] = {}
    for place, source in enumerate(sources):
        if not is_open[place]:
            found[place] = _load_fixed(source, wanted[place], size, budget, left, load)
            left -= budget.tokens(len(found[place].tiles))
    left -= min(budget.answer, budget.limit // 4)
    for place, source in enumerate(sources):
        if is_open[place]:
            share = left // (len(sources) - len(found))
            found[place] = _load_open(source, wanted[place], size, budget, share, load)
            left -= budget.tokens(len(found[place].tiles))
    return [found[place] for place in range(len(sources))]


def _load_fixed(
    source: Any,
    options: FrameOptions,
    size: int,
    budget: ContextBudget,
    left: int,
    load: Callable[..., VideoFrames],
) -> VideoFrames:
    most = budget.frames(left)
    try:
        return load(source, size, options, most=most)
    except TooManyFramesError as error:
        raise ContextOverflowError(
            f"{error.wanted} frames of a video take {budget.tokens(error.wanted)} "
            f"tokens, but the context of {budget.limit} has {max(left, 0)} left beside the rest of "
            f"the prompt; use num_frames or fps for at most {most} frames"
        ) from None


def _load_open(
    source: Any,
    options: FrameOptions,
    size: int,
    budget: ContextBudget,
    left: int,
    load: Callable[..., VideoFrames],
) -> VideoFrames:
    number = min(DEFAULT_FRAMES, budget.frames(left))
    if number < 1:
        raise ContextOverflowError(
            f"one frame of a video takes {budget.tokens(1)} tokens, but the "
            f"context of {budget.limit} has {max(left, 0)} left for it; use fewer media or a "
            "shorter text"
        )
    video = load(source, size, options, default=number)
    if number == DEFAULT_FRAMES or len(video.tiles) < number or video.total == number:
        return video
    note = (
        f"{number} frames of a video are used instead of {DEFAULT_FRAMES}: more do not fit into "
        f"the context of {budget.limit} tokens"
    )
    logger.warning("%s", note)
    return replace(video, notes=(*video.notes, note))


def with_times(segments: Sequence[Segment], videos: Sequence[VideoFrames]) -> list[Segment]:
    """``segments`` with a line behind each video that says when its frames are, as the original
    code's training data have it with ``addtime_instruction``; a video without a clock has none.
    """
    waiting = iter(videos)
    made: list[Segment] = []
    line: str | None = None
    for segment in segments:
        if line is not None and segment.control:
            made.append(Segment(f"\n{line}\n", False))
        elif line is not None:
            segment = Segment(f"\n{line}\n{segment.text.removeprefix(chr(10))}", False)
        made.append(segment)
        line = None
        if segment.control and segment.text == "<video>":
            video = next(waiting)
            if video.times is not None and video.length is not None:
                line = time_instruction(video.times, video.length)
    return made


def time_instruction(times: Sequence[float], length: float) -> str:
    """The sentence that LLaVA-Video's original code adds with ``add_time_instruction``, word by
    word.

    times : seconds of the frames. length : seconds of the video.
    """
    located = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {length:.2f} seconds, and {len(times)} frames are uniformly sampled "
        f"from it. These frames are located at {located}.Please answer the following questions "
        "related to this video."
    )
