"""Videos in, tiles out: each chosen frame squeezed into one tile, as the reference does it.

A video is a file (path, URL, bytes), or frames that are there already: a list of pictures, each
whatever :func:`~mlx_onevision.media.image.load_image` takes, or a uint8 array (T, H, W, C) or
(T, C, H, W). Of a file, 32 frames are taken unless the caller says how many; of frames that are
there, all of them, as in the reference. Frames have no clock, so a rate, a start and an end need a
file.

Files: MP4, MOV, Matroska, WebM, AVI, GIF. Turned upright by their display matrix; transparency is
dropped; of several video streams the first counts. No more than one decoded frame and the tiles are
ever in memory.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.json_fields import Json
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import ConfigError, MediaError, RequestError
from mlx_onevision.files import read_json
from mlx_onevision.media.decoder import Decoded, Limits, TooManyFramesError, decoding, no_check
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions, spread
from mlx_onevision.media.image import load_image
from mlx_onevision.media.resize import Pixels, resize
from mlx_onevision.media.sources import bare_base64, data_uri, download, is_url, quoted

# How videos become pixel values, which a checkpoint may say apart from images.

FILE = "video_preprocessor_config.json"


@dataclass(frozen=True)
class VideoConfig:
    """``pixels`` : size, mean and so on of a frame. ``frames`` : how many are taken of a video
    where the caller does not say; unset in the published checkpoints.
    """

    pixels: ImageConfig
    frames: FrameOptions = field(default_factory=FrameOptions)

    @classmethod
    def from_folder(
        cls, folder: Path, processor: Json, images: ImageConfig, config: OneVisionConfig
    ) -> VideoConfig:
        """From ``video_processor`` of processor_config.json, else from the file of its own, else
        as images are.

        Raises:
            ConfigError: for a setting that is not supported.
        """
        where, values = "processor_config.json's video_processor", processor.get("video_processor")
        if not values:
            where, values = FILE, read_json(folder / FILE)
        if values is None:
            return cls(images)
        if not isinstance(values, Mapping):
            raise ConfigError("processor_config.json has a video_processor that is no object")
        return cls.from_dict(values, config, where)

    @classmethod
    def from_dict(cls, values: Json, config: OneVisionConfig, where: str = FILE) -> VideoConfig:
        """Raises ConfigError for a setting that is not supported."""
        size = values.get("size")
        if isinstance(size, Mapping) and not size.keys() & {"height", "width"}:
            raise ConfigError(
                f"{where} has size {dict(size)}; a frame fills one tile, so it needs height and "
                "width"
            )
        pixels = {key: value for key, value in values.items() if key != "image_grid_pinpoints"}
        return cls(ImageConfig.from_dict(pixels, config, where), _frames(values, where))


def _frames(values: Json, where: str) -> FrameOptions:
    if not values.get("do_sample_frames"):
        return FrameOptions()
    given: dict[str, Any] = {key: values.get(key) for key in ("num_frames", "fps")}
    try:
        return FrameOptions(**given)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from None


VideoSource: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | list[Any]
    | tuple[Any, ...]
    | NDArray[Any]
)

logger = logging.getLogger("mlx_onevision")

__all__ = [
    "Limits",
    "TooManyFramesError",
    "VideoFrames",
    "VideoSource",
    "is_file",
    "load_video",
    "opened",
]


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """The frames of a video that the model will see, and which ones they are.

    tiles : uint8 (n, S, S, 3).
    indices : of each in the video. times : the second at which each appears; None without a clock.
    total : frames in the video. length : seconds; None without a clock.
    notes : what did not go as asked, a sentence each; also logged.
    """

    tiles: Pixels
    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    total: int
    length: float | None
    notes: tuple[str, ...] = ()


def load_video(
    source: VideoSource,
    size: int,
    options: FrameOptions | None = None,
    *,
    default: int = DEFAULT_FRAMES,
    most: int | None = None,
    limits: Limits | None = None,
    check: Callable[[], None] = no_check,
) -> VideoFrames:
    """The chosen frames of a video as tiles of ``size`` pixels.

    default : how many of a file where ``options`` do not say.
    most : more frames than that are refused, before any is decoded.
    check : called between frames and while waiting; ends the work by raising.

    Raises:
        MediaError: for what cannot be read, in one sentence that names it.
        TooLargeError: beyond ``limits``, or a download that is too large.
        RequestError: for options that do not fit the video.
        TooManyFramesError: beyond ``most``.
    """
    options = options or FrameOptions()
    if not is_file(source):
        return _from_frames(source, size, options, most, check)
    file, name = opened(source)
    with (
        file,
        decoding(
            file, name, options, default=default, most=most, limits=limits, check=check
        ) as decoded,
    ):
        return _gather(decoded, name, size, options)


def is_file(source: Any) -> bool:
    """Whether a video has to be decoded; otherwise its frames are there."""
    return isinstance(source, str | bytes | bytearray | memoryview | os.PathLike) or (
        hasattr(source, "read") and not hasattr(source, "shape")
    )


def _gather(decoded: Decoded, name: str, size: int, options: FrameOptions) -> VideoFrames:
    header = decoded.header
    wanted = len(header.indices)
    tiles = np.empty((wanted, size, size, 3), np.uint8)
    places: list[int] = []
    for place, pixels in decoded.frames:
        tiles[len(places)] = resize(np.ascontiguousarray(pixels), (size, size))
        places.append(place)
    if not places:
        raise MediaError(f"cannot read {name}: none of its {header.total} frames can be decoded")
    notes = []
    if header.total < header.claimed:
        notes.append(f"{name} breaks off: {header.total} of its {header.claimed} frames are there")
    if len(places) < wanted:
        notes.append(
            f"{name} is damaged: {wanted - len(places)} of {wanted} chosen frames "
            "cannot be decoded and are left out"
        )
    if options.num_frames is not None and options.num_frames > wanted:
        notes.append(_fewer(name, wanted, options.num_frames))
    return _clip(
        tiles[: len(places)],
        tuple(header.indices[place] for place in places),
        tuple(header.times[place] for place in places),
        header.total,
        header.length,
        notes,
    )


def _from_frames(
    source: Any, size: int, options: FrameOptions, most: int | None, check: Callable[[], None]
) -> VideoFrames:
    given = np.asarray(source) if hasattr(source, "__array_interface__") else source
    if isinstance(given, np.ndarray):
        name = f"the array of shape {given.shape}"
        if given.ndim != 4:
            raise MediaError(f"{name} is not one video; a video has four axes, time first")
    elif isinstance(given, list | tuple):
        name = f"the list of {len(given)} frames"
    else:
        kind = type(source).__name__
        raise MediaError(
            f"a {kind} is not a video; give a path, URL, bytes, list of frames or array"
        )
    total = len(given)
    if not total:
        raise MediaError(f"{name} has no frame in it")
    for option in ("fps", "start", "end"):
        if getattr(options, option) is not None:
            raise RequestError(f"{name} has no clock, so {option} has no meaning; use num_frames")
    indices = spread(total, options, total)
    if most is not None and len(indices) > most:
        raise TooManyFramesError(len(indices))
    tiles = np.empty((len(indices), size, size, 3), np.uint8)
    for tile, index in zip(tiles, indices, strict=True):
        check()
        try:
            tile[:] = resize(load_image(given[index]), (size, size))
        except MediaError as error:
            raise type(error)(f"frame {index} of a video: {error}") from error
    notes = []
    if options.num_frames is not None and options.num_frames > total:
        notes.append(_fewer(name, total, options.num_frames))
    return _clip(tiles, tuple(indices), None, total, None, notes)


def _clip(
    tiles: Pixels,
    indices: tuple[int, ...],
    times: tuple[float, ...] | None,
    total: int,
    length: float | None,
    notes: list[str],
) -> VideoFrames:
    for note in notes:
        logger.warning("%s", note)
    return VideoFrames(tiles, indices, times, total, length, tuple(notes))


def _fewer(name: str, there: int, asked: int) -> str:
    frames = "1 frame" if there == 1 else f"{there} frames"
    return f"{name} has {frames} there, fewer than the {asked} that were asked for: all are used"


def opened(source: Any) -> tuple[BinaryIO, str]:
    """A real file that holds a video, open, and what to call it.

    Raises:
        MediaError: for what is no file, or an empty one.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return _spooled(bytes(source), "the video given as bytes")
    if hasattr(source, "read"):
        return _real_file(source) or _spooled(source.read(), "the video given as a file object")
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _spooled(data_uri(source), "the video in a data URI")
        if is_url(source):
            return _spooled(download(source), quoted(source))
        data = bare_base64(source)
        if data is not None:
            return _spooled(data, "the video given as base64")
        if not source or "\0" in source:
            raise MediaError(f"{quoted(source)} is not the path of a video")
    path = Path(os.path.expanduser(source))
    name = quoted(str(path))
    try:
        # Not waiting: opening a pipe that nobody writes to would never end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MediaError(f"{name} does not exist; give the path of a video") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"cannot read {name}: {getattr(error, 'strerror', error)}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise MediaError(f"{name} is {kind}, not a video")
    file = os.fdopen(descriptor, "rb", buffering=0)
    if not status.st_size:
        file.close()
        raise MediaError(f"{name} is empty (0 bytes)")
    return file, name


def _real_file(source: Any) -> tuple[BinaryIO, str] | None:
    """An unbuffered file that stands at its beginning, which need not be copied."""
    if not isinstance(source, FileIO) or not source.readable():
        return None
    status = os.fstat(source.fileno())
    if not stat.S_ISREG(status.st_mode) or not status.st_size or source.tell():
        return None
    name = quoted(source.name) if isinstance(source.name, str) else "the video given as a file"
    return os.fdopen(os.dup(source.fileno()), "rb", buffering=0), name


def _spooled(data: bytes, name: str) -> tuple[BinaryIO, str]:
    """``data`` as a file without a name, which is gone when it is closed."""
    if not data:
        raise MediaError(f"{name} is empty (0 bytes)")
    file = TemporaryFile()
    file.write(data)
    file.flush()
    return file, name
