"""The process that decodes a video, seen from this side: how it is started, and what it sends.

The process is a Python interpreter that runs ``decoder.py``; see :mod:`interpreter`.
"""

import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import (
    ContextOverflowError,
    MediaError,
    OneVisionError,
    RequestError,
    TooLargeError,
)
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions
from mlx_onevision.subprocesses import INTERPRETER, MISSING, find_interpreter, import_path

__all__ = ["INTERPRETER", "Decoded", "Header", "Limits", "Pipe", "TooManyFramesError", "no_check"]

POLL_SECONDS = 0.1  # how often a cancellation is looked for
MAX_HEADER = 16 << 20  # bytes of a line from the decoder; a long film's has many times in it


@dataclass(frozen=True)
class Limits:
    """What decoding one video may take.

    memory : bytes of the decoding process, the interpreter and its libraries included.
    seconds : wall time; and as much processor time for each thread.
    pixels : of one frame; 8K has 35 million.
    """

    memory: int = 3 << 30
    seconds: float = 300.0
    pixels: int = 8192 * 4352
    threads: int = 4


class TooManyFramesError(ContextOverflowError):
    """``wanted`` frames were asked for, which is more than there is room for."""

    def __init__(self, wanted: int) -> None:
        super().__init__(f"{wanted} frames are too many")
        self.wanted = wanted


def no_check() -> None:
    """No cancellation."""


def start(
    file: BinaryIO, limits: Limits, request: Mapping[str, Any], control: int | None = None
) -> "subprocess.Popen[bytes]":
    """Starts the decoder on an open file.

    control : a descriptor to read commands from, which the process inherits.
    """
    interpreter = find_interpreter()
    if interpreter is None:
        raise MediaError(f"videos are decoded by {MISSING}")
    whole = {
        "path": import_path(),
        "memory": limits.memory,
        "seconds": limits.seconds,
        "max_pixels": limits.pixels,
        "threads": max(1, min(limits.threads, os.cpu_count() or 1)),
        "control": control,
        **request,
    }
    return subprocess.Popen(
        [interpreter, "-I", str(Path(__file__).with_name("decoder_process.py")), json.dumps(whole)],
        stdin=file,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        start_new_session=True,  # Ctrl-C is this process's business
        pass_fds=() if control is None else (control,),
    )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the decoder, whatever it does."""
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


class Pipe:
    """The decoder's messages, waited for no longer than its limits allow.

    Only waiting counts, from the beginning or from the last :meth:`renew`; what the reader does
    between two messages takes nothing off the decoder's time.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        name: str,
        limits: Limits,
        check: Callable[[], None],
    ) -> None:
        assert process.stdout is not None
        self._process, self._name, self._limits, self._check = process, name, limits, check
        self._source = process.stdout.fileno()
        self._left = limits.seconds
        self._buffer = bytearray()

    def renew(self) -> None:
        """The decoder has shown that it lives, and may take as long again."""
        self._left = self._limits.seconds

    def message(self, kind: str, end: str | None = None) -> Any:
        """The next message's value; None for one of the kind ``end``."""
        seen = 0
        while (newline := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if len(self._buffer) > MAX_HEADER or not self._more():
                raise self.failed()
        line = bytes(self._buffer[:newline])
        del self._buffer[: newline + 1]
        try:
            values = json.loads(line)
            if "error" in values:
                raise self._refused(values["error"])
            if end is not None and end in values:
                return None
            return values[kind]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.failed() from None

    def pixels(self, about: Mapping[str, Any]) -> NDArray[np.uint8]:
        """The frame that a message was about, upright; uint8 RGB (H, W, 3)."""
        try:
            high, wide, stride, size = (
                int(about[name]) for name in ("high", "wide", "stride", "bytes")
            )
            a, b, c, d = map(int, about["matrix"])
        except (KeyError, TypeError, ValueError):
            raise self.failed() from None
        # The decoder has met a stranger's file, so it is not believed either.
        if not 0 < high * wide <= self._limits.pixels or high < 0:
            raise self.failed()
        if not 3 * wide <= stride <= 3 * wide + 4096:
            raise self.failed()
        if not (high - 1) * stride + 3 * wide <= size <= (high + 16) * stride + 4096:
            raise self.failed()
        rows = np.frombuffer(self.read(size), np.uint8)
        picture = np.lib.stride_tricks.as_strided(
            rows, (high, wide, 3), (stride, 3, 1), writeable=False
        )
        return upright(picture, (a, b, c, d))

    def read(self, size: int) -> bytearray:
        while len(self._buffer) < size:
            if not self._more():
                raise self.failed()
        taken = self._buffer[:size]
        del self._buffer[:size]
        return taken

    def failed(self) -> MediaError:
        """The decoder broke off, or talks nonsense; the error that says so."""
        self._process.kill()
        code = self._process.wait()
        why = f"signal {-code}" if code < 0 else f"code {code}"
        return MediaError(f"cannot read {self._name}: the decoder broke off ({why})")

    def _more(self) -> bool:
        """Waits for more bytes; False at the end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            ready = False
            while not ready:
                began = time.monotonic()
                ready = bool(selector.select(POLL_SECONDS))
                self._left -= time.monotonic() - began
                self._check()
                if self._left < 0:
                    raise TooLargeError(
                        f"{self._name} takes more than {self._limits.seconds:g} s to decode; "
                        "use fewer frames or a shorter part of it"
                    )
        data = os.read(self._source, 1 << 20)
        self._buffer += data
        return bool(data)

    def _refused(self, error: Any) -> OneVisionError:
        text, kind = str(error["text"])[:300], error["kind"]
        if kind == "too_many" and text.isdigit():
            return TooManyFramesError(int(text))
        if kind == "request":
            return RequestError(f"{self._name}: {text}")
        cls = TooLargeError if kind == "too_large" else MediaError
        return cls(f"cannot read {self._name}: {text.rstrip('.')}")


def upright(pixels: NDArray[np.uint8], matrix: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """``pixels`` (H, W, 3) as a display matrix (a, b, c, d) wants them: x' = ax + cy, y' = bx + dy,
    of signs; one that is no turn or mirror image leaves them as they are.
    """
    a, b, c, d = matrix
    if b and c and not a and not d:
        pixels, across, down = pixels.swapaxes(0, 1), c, b
    elif a and d and not b and not c:
        across, down = a, d
    else:
        return pixels
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


# A video file in, the chosen frames out, one after another; decoded in a process of its own.


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
    check: Callable[[], None] = no_check,
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


# A video file that is looked at many times: all of it small, then parts of it as they are.
#
# One process decodes for as long as the file is open (see :mod:`decoder_pipe`), so the file is read
# through once for its index, not once for each part. Where it breaks off, the next look starts
# another one. Looks come one after another; each is to be read to its end, or given up.

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
class FrameSelection:
    """Chosen frames. ``frames`` yields (position in ``indices``, uint8 RGB (H, W, 3)); one that
    cannot be decoded is left out.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    frames: Iterator[tuple[int, Pixels]]


class VideoReader:
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
        check: Callable[[], None] = no_check,
    ) -> None:
        self.name = name
        self._file, self._limits, self._check = file, limits or Limits(), check
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Pipe | None = None
        self._commands: int | None = None
        self._answering = False
        self.facts = self._start()

    def __enter__(self) -> "VideoReader":
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

    def look(self, options: FrameOptions, default: int = DEFAULT_FRAMES) -> FrameSelection:
        """Chosen frames of the video, or of a part of it.

        default : how many of them where ``options`` do not say.

        Raises:
            RequestError: when the options do not fit the video.
        """
        answer = self._looked({"do": "frames", "options": asdict(options), "default": default})
        indices, times = next(answer)
        return FrameSelection(indices, times, answer)

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
