"""The videos of one conversation, which share what its other parts leave of the context."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_onevision.errors import ContextOverflowError
from mlx_onevision.media.anyres import video_side, video_tokens
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions
from mlx_onevision.media.video import TooManyFramesError, VideoFrames, is_file, load_video

logger = logging.getLogger("mlx_onevision")


@dataclass(frozen=True)
class ContextBudget:
    """Tokens: of the context, taken by text and images, and to be left for the answer where the
    number of frames is open. ``patches`` : tokens along a side of a tile.
    """

    limit: int
    taken: int
    answer: int
    patches: int

    def frames(self, tokens: int) -> int:
        """Frames of one video that take at most so many tokens."""
        return max(tokens - 1, 0) // video_side(self.patches) ** 2


def load_videos(
    blocks: Sequence[Mapping[str, Any]],
    options: FrameOptions,
    size: int,
    budget: ContextBudget,
    check: Callable[[], None] = lambda: None,
) -> list[VideoFrames]:
    """The videos of ``blocks``, as tiles of ``size`` pixels.

    First those whose number of frames the caller has set, which fit or are refused; then the files
    of which the usual number is taken, or fewer where they share what is left.

    options : what holds unless a block says otherwise.

    Raises:
        ContextOverflowError: with how many tokens it would take, and how many there are.
        MediaError, RequestError: see :func:`~mlx_onevision.media.video.load_video`.
    """
    names = FrameOptions.names()
    wanted = [options.over({k: block[k] for k in names if k in block}) for block in blocks]
    sources = [block["video"] for block in blocks]
    is_open = [is_file(s) and not o.explicit for s, o in zip(sources, wanted, strict=True)]
    left = budget.limit - budget.taken - 1  # the answer has one token at least
    found: dict[int, VideoFrames] = {}
    for place, source in enumerate(sources):
        if not is_open[place]:
            found[place] = _load_fixed(source, wanted[place], size, budget, left, check)
            left -= video_tokens(len(found[place].tiles), budget.patches)
    left -= min(budget.answer, budget.limit // 4)
    for place, source in enumerate(sources):
        if is_open[place]:
            share = left // (len(sources) - len(found))
            found[place] = _load_open(source, wanted[place], size, budget, share, check)
            left -= video_tokens(len(found[place].tiles), budget.patches)
    return [found[place] for place in range(len(sources))]


def _load_fixed(
    source: Any,
    options: FrameOptions,
    size: int,
    budget: ContextBudget,
    left: int,
    check: Callable[[], None],
) -> VideoFrames:
    most = budget.frames(left)
    try:
        return load_video(source, size, options, most=most, check=check)
    except TooManyFramesError as error:
        raise ContextOverflowError(
            f"{error.wanted} frames of a video take {video_tokens(error.wanted, budget.patches)} "
            f"tokens, but the model's context of {budget.limit} has {max(left, 0)} left beside the "
            f"rest of the prompt; use num_frames or fps for at most {most} frames"
        ) from None


def _load_open(
    source: Any,
    options: FrameOptions,
    size: int,
    budget: ContextBudget,
    left: int,
    check: Callable[[], None],
) -> VideoFrames:
    number = min(DEFAULT_FRAMES, budget.frames(left))
    if number < 1:
        raise ContextOverflowError(
            f"one frame of a video takes {video_tokens(1, budget.patches)} tokens, but the model's "
            f"context of {budget.limit} has {max(left, 0)} left for it; use fewer media or a "
            "shorter text"
        )
    video = load_video(source, size, options, default=number, check=check)
    if number == DEFAULT_FRAMES or len(video.tiles) < number or video.total == number:
        return video
    note = (
        f"{number} frames of a video are used instead of {DEFAULT_FRAMES}: more do not fit into "
        f"the model's context of {budget.limit} tokens"
    )
    logger.warning("%s", note)
    return replace(video, notes=(*video.notes, note))
