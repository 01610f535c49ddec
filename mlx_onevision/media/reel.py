"""A video file that is looked at many times: all of it small, then parts of it as they are.

One process decodes for as long as the file is open (see :mod:`decoder_pipe`), so the file is read
through once for its index, not once for each part. Where it breaks off, the next look starts
another one. Looks come one after another; each is to be read to its end, or given up.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.media.decoder import Limits, Pipe, nothing, start, stop
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Facts:
    """What is known of a video.

    total : frames in the file. length : seconds.
    claimed : frames that the file says it has; 0 where it says nothing.
    """

    total: int
    length: float
    claimed: int
    codec: str


@dataclass(frozen=True)
class Look:
    """Chosen frames. ``frames`` yields (position in ``indices``, uint8 RGB (H, W, 3)); one that
    cannot be decoded is left out.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    frames: Iterator[tuple[int, Pixels]]


class Reel:
    """An open video file.

    file : a real file, seekable. name : what errors call it.
    limits : their seconds are for each look, and for each small picture of a long film.
    check : called a few times a second; ends a look by raising.

    Raises, when it is made and when it is looked at:
        MediaError: when it cannot be read as a video, in one sentence.
        TooLargeError: beyond ``limits``.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        limits: Limits | None = None,
        check: Callable[[], None] = nothing,
    ) -> None:
        self.name = name
        self._file, self._limits, self._check = file, limits or Limits(), check
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._commands: int | None = None
        self._answering = False
        self.facts = self._start()

    def __enter__(self) -> "Reel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; another look starts another one."""
        process, commands = self._process, self._commands
        self._process = self._commands = self._pipe = None
        if process is not None:
            stop(process)
        if commands is not None:
            os.close(commands)

    def thumbnails(
        self, begin: float | None = None, end: float | None = None
    ) -> Iterator[tuple[float, Pixels]]:
        """All frames on screen between two times that can be decoded: the second at which each
        appears, and its pixels, 64x64 of them or fewer, uint8 RGB (h, w, 3).

        Raises:
            RequestError: for a beginning behind the end of the video.
        """
        options = FrameOptions(start=begin, end=end)
        with self._answer({"do": "thumbnails", "options": asdict(options)}) as pipe:
            for _, about in _messages(pipe, self.facts.total):
                try:
                    time = float(about["time"])
                except (KeyError, TypeError, ValueError):
                    raise pipe.failed() from None
                pixels = pipe.pixels(about)
                pipe.renew()
                yield time, pixels

    def look(self, options: FrameOptions, default: int = DEFAULT_FRAMES) -> Look:
        """Chosen frames of the video, or of a part of it.

        default : how many of them where ``options`` do not say.

        Raises:
            RequestError: when the options do not fit the video.
        """
        answer = self._looked({"do": "frames", "options": asdict(options), "default": default})
        indices, times = next(answer)
        return Look(indices, times, answer)

    def _looked(self, command: Mapping[str, Any]) -> Iterator[Any]:
        """Which frames are coming, and then the frames."""
        with self._answer(command) as pipe:
            values = pipe.message("chosen")
            try:
                indices = tuple(map(int, values["indices"]))
                times = tuple(map(float, values["times"]))
                if len(indices) != len(times):
                    raise ValueError("times and indices differ")
            except (KeyError, TypeError, ValueError):
                raise pipe.failed() from None
            yield indices, times
            for place, about in _messages(pipe, len(indices)):
                yield place, pipe.pixels(about)

    @contextmanager
    def _answer(self, command: Mapping[str, Any]) -> Iterator[Pipe]:
        """The process's answer to a command; what is not read to its end ends the process."""
        if self._answering:  # the look before was given up, and its frames are still coming
            self.close()
        if self._pipe is None:
            self._start()
        assert self._pipe is not None and self._commands is not None
        self._answering = True
        pipe = self._pipe
        try:
            pipe.renew()
            try:
                os.write(self._commands, json.dumps(command).encode() + b"\n")
            except OSError:
                raise pipe.failed() from None
            yield pipe
        except BaseException:
            if pipe is self._pipe:
                self.close()
                self._answering = False
            raise
        self._answering = False

    def _start(self) -> Facts:
        self.close()
        inherited, self._commands = os.pipe()
        try:
            self._process = start(self._file, self._limits, {}, inherited)
        finally:
            os.close(inherited)
        self._pipe = pipe = Pipe(self._process, self.name, self._limits, self._check)
        self._answering = False
        try:
            values = pipe.message("video")
            try:
                return Facts(
                    total=int(values["total"]),
                    length=float(values["length"]),
                    claimed=int(values["claimed"]),
                    codec=str(values["codec"]),
                )
            except (KeyError, TypeError, ValueError):
                raise pipe.failed() from None
        except BaseException:
            self.close()
            raise


def _messages(pipe: Pipe, total: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The places of frames, rising, and what was said of each; their pixels come next."""
    last = -1
    while (about := pipe.message("frame", "end")) is not None:
        try:
            place = int(about["place"])
        except (KeyError, TypeError, ValueError):
            raise pipe.failed() from None
        if not last < place < total:
            raise pipe.failed()
        last = place
        yield place, about
