"""A video file in, the chosen frames out, one after another; decoded in a process of its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.media.decoder import (
    INTERPRETER,
    Limits,
    Pipe,
    TooManyFramesError,
    nothing,
    start,
    stop,
)
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions

__all__ = [
    "INTERPRETER",
    "Decoded",
    "Header",
    "Limits",
    "TooManyFramesError",
    "decoding",
    "nothing",
]


@dataclass(frozen=True)
class Header:
    """What is known of a video before its frames come.

    total : frames in the file. length : seconds.
    indices, times : of the frames that are coming, and the second at which each appears.
    claimed : frames that the file says it has; 0 where it says nothing.
    """

    total: int
    length: float
    claimed: int
    indices: tuple[int, ...]
    times: tuple[float, ...]
    codec: str


@dataclass(frozen=True)
class Decoded:
    """``frames`` yields (position in ``header.indices``, uint8 RGB (H, W, 3)); one that cannot be
    decoded is left out.
    """

    header: Header
    frames: Iterator[tuple[int, NDArray[np.uint8]]]


@contextmanager
def decoding(
    file: BinaryIO,
    name: str,
    options: FrameOptions,
    *,
    default: int = DEFAULT_FRAMES,
    most: int | None = None,
    limits: Limits | None = None,
    check: Callable[[], None] = nothing,
) -> Iterator[Decoded]:
    """Decodes the chosen frames of an open file, for as long as the context lasts.

    file : a real file, seekable. name : what errors call it.
    default : how many frames where the options do not say.
    most : more than that are refused.
    check : called a few times a second; ends the decoding by raising.

    Raises:
        MediaError: when it cannot be read as a video, in one sentence.
        TooLargeError: beyond ``limits``.
        RequestError: when the options do not fit the video.
        TooManyFramesError: beyond ``most``.
    """
    limits = limits or Limits()
    request = {"options": asdict(options), "default": default, "most": most}
    process = start(file, limits, request)
    try:
        pipe = Pipe(process, name, limits, check)
        header = _header(pipe)
        yield Decoded(header, _frames(pipe, header))
    finally:
        stop(process)


def _header(pipe: Pipe) -> Header:
    values = pipe.message("video")
    try:
        header = Header(
            total=int(values["total"]),
            length=float(values["length"]),
            claimed=int(values["claimed"]),
            indices=tuple(map(int, values["indices"])),
            times=tuple(map(float, values["times"])),
            codec=str(values["codec"]),
        )
        if len(header.indices) != len(header.times):
            raise ValueError("times and indices differ")
    except (KeyError, TypeError, ValueError):
        raise pipe.failed() from None
    return header


def _frames(pipe: Pipe, header: Header) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    last = -1
    while (about := pipe.message("frame", "end")) is not None:
        try:
            place = int(about["place"])
        except (KeyError, TypeError, ValueError):
            raise pipe.failed() from None
        if not last < place < len(header.indices):
            raise pipe.failed()
        last = place
        yield place, pipe.pixels(about)
