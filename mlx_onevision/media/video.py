"""Videos to tiles: each chosen frame squeezed into one tile, as transformers'
``LlavaOnevisionVideoProcessor`` does it.

A video is a file (path, URL, bytes), of which 32 frames are taken unless the caller says how many;
or frames in memory (a list of what :func:`~mlx_onevision.media.image.load_image` takes, or a uint8
array (T, H, W, C) or (T, C, H, W)), all of which are, without a rate, a start or an end.

Files are of ``VIDEO_KINDS``, and are turned upright by their display matrix; transparency is
dropped; of several video streams the first is read. ``IN_FLIGHT`` decoded frames are in memory.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.json_fields import Json, is_object, shown
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import ConfigError, MediaError, RequestError
from mlx_onevision.files import read_json
from mlx_onevision.media.cache import TileCache, array_key, digest_of, file_key
from mlx_onevision.media.decoder import Limits, TooManyFramesError, VideoReader
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions, uniform_or_endpoints
from mlx_onevision.media.image import load_image
from mlx_onevision.media.parallel import no_check, parallel_map
from mlx_onevision.media.resize import Pixels, resize
from mlx_onevision.media.sources import file_name, is_file, open_source

_File: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO"
VideoSource: TypeAlias = "_File | list[Any] | tuple[Any, ...] | NDArray[Any]"

FILE = "video_preprocessor_config.json"
IN_FLIGHT = 4  # decoded frames of a file that are held at once
LARGE = 32 << 20  # bytes of a frame that is held alone: resizing it takes all cores as it is

logger = logging.getLogger("mlx_onevision")


@dataclass(frozen=True)
class VideoConfig:
    """How videos become pixel values, where a checkpoint may have other settings than for images.

    frames : defaults for what the caller leaves open; unset in the published checkpoints.
    """

    pixels: ImageConfig
    frames: FrameOptions = field(default_factory=FrameOptions)

    @classmethod
    def from_folder(
        cls, folder: Path, processor: Json, images: ImageConfig, config: OneVisionConfig
    ) -> VideoConfig:
        """From ``video_processor`` of processor_config.json, else from ``FILE``, else those of
        images.

        processor : the object in processor_config.json.

        Raises ConfigError for a setting that is not supported.
        """
        where, values = "processor_config.json's video_processor", processor.get("video_processor")
        if not values:
            where, values = FILE, read_json(folder / FILE)
        if values is None:
            return cls(images, FrameOptions(ends=config.force_sample))
        if not is_object(values):
            raise ConfigError("processor_config.json has a video_processor that is no object")
        return cls.from_dict(values, config, where)

    @classmethod
    def from_dict(cls, values: Json, config: OneVisionConfig, where: str = FILE) -> VideoConfig:
        """From the object that ``where`` names in errors. Raises ConfigError as ``from_folder``."""
        size = values.get("size")
        if is_object(size) and not size.keys() & {"height", "width"}:
            needs = "a frame fills one tile, so it needs height and width"
            raise ConfigError(f"{where} has size {shown(dict(size))}; {needs}")
        pixels = {key: value for key, value in values.items() if key != "image_grid_pinpoints"}
        frames = FrameOptions(ends=config.force_sample)
        if values.get("do_sample_frames"):
            try:
                asked = {"num_frames": values.get("num_frames"), "fps": values.get("fps")}
                frames = frames.over(asked)
            except RequestError as error:
                raise ConfigError(f"{where}: {error}") from None
        return cls(ImageConfig.from_dict(pixels, config, where), frames)


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """The frames of a video that the model will see.

    tiles : uint8 (n, S, S, 3).
    indices : of the n frames in the video, which has ``total`` of them.
    times : the second at which each appears; None for frames in memory, which have no clock.
    length : seconds; None likewise.
    notes : sentences on what is not as it was asked for; they are logged, too.
    """

    tiles: Pixels
    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    total: int
    length: float | None
    notes: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> bytes:
        """A hash of the tiles."""
        return digest_of(self.tiles)


def load_video(
    source: VideoSource,
    size: int,
    options: FrameOptions | None = None,
    *,
    default: int = DEFAULT_FRAMES,
    most: int | None = None,
    limits: Limits | None = None,
    check: Callable[[], None] = no_check,
    cache: TileCache | None = None,
) -> VideoFrames:
    """The chosen frames of a video as tiles of ``size`` pixels.

    default : their number, of a file, where ``options`` set none. most : the most there may be.
    limits : of decoding a file.
    check : called between frames and while waiting; ends the work by raising.
    cache : of tiles, by the contents of a file or an array. Not cached are files of more than
        ``MAX_HASHED`` bytes, lists of frames, and videos with ``notes``.

    Raises:
        MediaError: for what cannot be read, in one sentence that names it.
        TooLargeError: beyond ``limits``, or a download that is too large.
        RequestError: for options that do not fit the video.
        TooManyFramesError: beyond ``most``, before any is decoded.
    """
    options = options or FrameOptions()
    if not is_file(source):
        array = np.asarray(source) if hasattr(source, "__array_interface__") else None
        key = None if cache is None or array is None else (array_key(array), size, options)
        video = _cached(cache, key, most)
        return video or _store(cache, key, _from_frames(source, size, options, most, check))
    file, name = open_video_file(source)
    with file:
        before = os.fstat(file.fileno())
        key = None if cache is None else file_key(file, check)
        key = None if key is None else (key, size, options, default)
        video = _cached(cache, key, most)
        if video is not None:
            return video
        with VideoReader(file, name, limits, check, once=True) as reader:
            video = _from_file(reader, size, options, default, most)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            key = None  # written to meanwhile: other contents than were hashed
        return _store(cache, key, video)


def _cached(cache: TileCache | None, key: Hashable, most: int | None) -> VideoFrames | None:
    """The video in the cache, if it is there. Raises TooManyFramesError beyond ``most``."""
    video = None if cache is None else cache.get(key, VideoFrames)
    if video is not None and most is not None and len(video.tiles) > most:
        raise TooManyFramesError(len(video.tiles))
    return video


def _store(cache: TileCache | None, key: Hashable, video: VideoFrames) -> VideoFrames:
    """Logs the notes of a new video, caches it if it has none, and returns it."""
    for note in video.notes:
        logger.warning("%s", note)
    if cache is not None and not video.notes:
        cache.put(key, video)
    return video


def open_video_file(source: Any) -> tuple[BinaryIO, str]:
    """A real, open file of the contents of ``source`` (for which :func:`is_file` holds), and what
    errors call it. Raises MediaError for a source that cannot be opened, or is empty.
    """
    if isinstance(source, FileIO) and _is_whole(source):
        data, name = FileIO(os.dup(source.fileno())), file_name(source, "video")  # without a copy
    else:
        data, name = open_source(source, "video")
    if isinstance(data, bytes):
        file: BinaryIO = TemporaryFile()
        file.write(data)
        file.flush()
    else:
        file = data
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise MediaError(f"{name} is empty (0 bytes)")
    return file, name


def _is_whole(file: FileIO) -> bool:
    """Whether it is an ordinary file, at its beginning, that can be read."""
    try:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        return regular and file.readable() and not file.tell()
    except (OSError, ValueError):  # it is closed, as reading it will say
        return False


def _from_file(
    reader: VideoReader, size: int, options: FrameOptions, default: int, most: int | None
) -> VideoFrames:
    name, info = reader.name, reader.info
    chosen = reader.read_frames(options, default, most)
    wanted = len(chosen.indices)
    tiles = np.empty((wanted, size, size, 3), np.uint8)
    places: list[int] = []

    def work(frame: tuple[int, Pixels]) -> None:
        tiles[frame[0]] = resize(np.ascontiguousarray(frame[1]), (size, size))

    def frames() -> Iterator[tuple[int, Pixels]]:
        for place, pixels in chosen.frames:
            places.append(place)
            if pixels.nbytes < LARGE:
                yield len(places) - 1, pixels
            else:
                work((len(places) - 1, pixels))
            del pixels

    parallel_map(work, frames(), most=IN_FLIGHT)
    if not places:
        raise MediaError(f"cannot read {name}: none of its {info.total} frames can be decoded")
    notes: list[str] = []
    if info.total < info.claimed:
        notes.append(f"{name} breaks off: {info.total} of its {info.claimed} frames are there")
    if len(places) < wanted:
        lost = f"{wanted - len(places)} of {wanted} chosen frames"
        notes.append(f"{name} is damaged: {lost} cannot be decoded and are left out")
    indices = tuple(chosen.indices[place] for place in places)
    times = tuple(chosen.times[place] for place in places)
    notes += _fewer_note(name, wanted, len(places), options)
    return VideoFrames(tiles[: len(places)], indices, times, info.total, info.length, tuple(notes))


def _from_frames(
    source: Any, size: int, options: FrameOptions, most: int | None, check: Callable[[], None]
) -> VideoFrames:
    given: NDArray[Any] | Sequence[Any]
    if hasattr(source, "__array_interface__"):
        given = np.asarray(source)
        name = f"the array of shape {given.shape}"
        if given.ndim != 4:
            raise MediaError(f"{name} is not one video; a video has four axes, time first")
    elif isinstance(source, list | tuple):
        given = cast("Sequence[Any]", source)
        name = f"the list of {len(given)} frames"
    else:
        sources = "give a path, URL, bytes, list of frames or array"
        raise MediaError(f"a {type(source).__name__} is not a video; {sources}")
    total = len(given)
    if not total:
        raise MediaError(f"{name} has no frame in it")
    for option in ("fps", "start", "end"):
        if getattr(options, option) is not None:
            raise RequestError(f"{name} has no clock, so {option} has no meaning; use num_frames")
    indices = uniform_or_endpoints(total, options, total)
    if most is not None and len(indices) > most:
        raise TooManyFramesError(len(indices))
    tiles = np.empty((len(indices), size, size, 3), np.uint8)

    def work(frame: tuple[int, Any]) -> None:
        place, pixels = frame
        try:
            tiles[place] = resize(load_image(pixels), (size, size))
        except MediaError as error:
            raise type(error)(f"frame {indices[place]} of a video: {error}") from error

    def frames() -> Iterator[tuple[int, Any]]:
        for place, index in enumerate(indices):
            check()
            yield place, given[index]

    parallel_map(work, frames())
    notes = _fewer_note(name, len(indices), len(indices), options)
    return VideoFrames(tiles, tuple(indices), None, total, None, notes)


def _fewer_note(name: str, there: int, used: int, options: FrameOptions) -> tuple[str, ...]:
    """A note on fewer frames than were asked for, if so.

    there : frames that were chosen. used : those of them that could be decoded.
    """
    asked = options.num_frames
    if asked is None or asked <= there:
        return ()
    frames = "1 frame" if there == 1 else f"{there} frames"
    note = f"{name} has {frames} there, fewer than the {asked} that were asked for"
    return (f"{note}: all are used" if used == there else note,)
