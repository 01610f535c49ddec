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
class Space:
    """Tokens: of the context, taken by text and images, and to be left for the answer where the
    number of frames is open. ``patches`` : tokens along a side of a tile.
    """

    limit: int
    taken: int
    answer: int
    patches: int


def load_clips(
    blocks: Sequence[Mapping[str, Any]],
    options: FrameOptions,
    size: int,
    space: Space,
    check: Callable[[], None] = lambda: None,
) -> list[VideoFrames]:
    """The videos of ``blocks``, as tiles of ``size`` pixels.

    First those whose frames the caller has settled, which fit or are refused; then the files of
    which the usual number is taken, or fewer where they share what is left.

    options : what holds unless a block says otherwise.

    Raises:
        ContextOverflowError: with how many tokens it would take, and how many there are.
        MediaError, RequestError: see :func:`~mlx_onevision.media.video.load_video`.
    """
    names = FrameOptions.names()
    wanted = [options.over({k: block[k] for k in names if k in block}) for block in blocks]
    sources = [block["video"] for block in blocks]
    is_open = [
        is_file(source) and not o.explicit for source, o in zip(sources, wanted, strict=True)
    ]
    left = space.limit - space.taken - 1  # the answer has one token at least
    found: dict[int, VideoFrames] = {}
    for place, source in enumerate(sources):
        if not is_open[place]:
            found[place] = _settled(source, wanted[place], size, space, left, check)
            left -= video_tokens(len(found[place].tiles), space.patches)
    left -= min(space.answer, space.limit // 4)
    while len(found) < len(sources):
        place = next(n for n in range(len(sources)) if n not in found)
        share = left // (len(sources) - len(found))
        found[place] = _open(sources[place], wanted[place], size, space, share, check)
        left -= video_tokens(len(found[place].tiles), space.patches)
    return [found[place] for place in range(len(sources))]


def _settled(
    source: Any,
    options: FrameOptions,
    size: int,
    space: Space,
    left: int,
    check: Callable[[], None],
) -> VideoFrames:
    most = _frames_in(left, space)
    try:
        return load_video(source, size, options, most=most, check=check)
    except TooManyFramesError as error:
        raise ContextOverflowError(
            f"{error.wanted} frames of a video take {video_tokens(error.wanted, space.patches)} "
            f"tokens, but the model's context of {space.limit} has {max(left, 0)} left beside the "
            f"rest of the prompt; use num_frames or fps for at most {most} frames"
        ) from None


def _open(
    source: Any,
    options: FrameOptions,
    size: int,
    space: Space,
    left: int,
    check: Callable[[], None],
) -> VideoFrames:
    number = min(DEFAULT_FRAMES, _frames_in(left, space))
    if number < 1:
        raise ContextOverflowError(
            f"one frame of a video takes {video_tokens(1, space.patches)} tokens, but the model's "
            f"context of {space.limit} has {max(left, 0)} left for it; use fewer media or a "
            "shorter text"
        )
    clip = load_video(source, size, options, default=number, check=check)
    if number == DEFAULT_FRAMES or len(clip.tiles) < number or clip.total == number:
        return clip
    note = (
        f"{number} frames of a video are used instead of {DEFAULT_FRAMES}: more do not fit into "
        f"the model's context of {space.limit} tokens"
    )
    logger.warning("%s", note)
    return replace(clip, notes=(*clip.notes, note))


def _frames_in(tokens: int, space: Space) -> int:
    """Frames of one video that take at most so many tokens."""
    return max(tokens - 1, 0) // video_side(space.patches) ** 2
