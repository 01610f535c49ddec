"""The client of the process that decodes videos, and the rarer kinds of images
(``decoder_process.py``): starts it, sends commands, checks the answers.
"""

import fcntl
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mlx_onevision.errors import (
    ContextOverflowError,
    MediaError,
    OneVisionError,
    RequestError,
    TooLargeError,
)
from mlx_onevision.media.frame_sampling import DEFAULT_FRAMES, FrameOptions
from mlx_onevision.media.parallel import POLL_SECONDS, Budget, no_check
from mlx_onevision.media.resize import Pixels
from mlx_onevision.subprocesses import (
    MISSING,
    environment,
    find_interpreter,
    footprint,
    import_path,
)

READ_BYTES = 50 << 20  # of a file, for each of which a decoder gets another second
MAX_LINE = 16 << 20  # bytes of one message; a long video's lists the times of its frames


@dataclass(frozen=True)
class Limits:
    """What decoding one video or image may take.

    memory : bytes of the decoding process, the interpreter and its libraries included.
    seconds : of wall time, and another one for every ``READ_BYTES`` of the file; as much processor
        time for each thread.
    pixels : the most of one frame; 8K has 35 million.
    threads : of one decoder.
    processes : a budget that working processes share; None for any number of them.
    """

    memory: int = 3 << 30
    seconds: float = 300.0
    pixels: int = 8192 * 4352
    threads: int = 4
    processes: Budget | None = None


class TooManyFramesError(ContextOverflowError):
    """More frames were chosen than the caller has room for; ``wanted`` is their number."""

    def __init__(self, wanted: int) -> None:
        super().__init__(f"{wanted} frames are too many")
        self.wanted = wanted


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before a frame is decoded.

    total : frames in the file. length : seconds.
    claimed : frames, with those that the container declares behind the end of a cut file.
    codec : libav's name of it.
    """

    total: int
    length: float
    claimed: int
    codec: str


@dataclass(frozen=True)
class FrameSelection:
    """Chosen frames: their numbers in the video, and the second at which each appears.

    frames : yields (position in ``indices``, uint8 RGB (H, W, 3)) for those that can be decoded; to
        be read to its end, or closed, before the next command.
    """

    indices: tuple[int, ...]
    times: tuple[float, ...]
    frames: Iterator[tuple[int, Pixels]]


def decode_image(
    file: BinaryIO, name: str, limits: Limits, check: Callable[[], None] = no_check
) -> Pixels:
    """The pixels of an image, uint8 RGB (H, W, 3), which another process decodes.

    file : a real file, seekable. name : what errors call it.
    check : called a few times a second; ends the work by raising.

    Raises MediaError, and TooLargeError beyond ``limits``.
    """
    with closing(_Process(file, name, limits, check, once=True, kind="image")) as process:
        return process.pixels(process.message("frame"))


class VideoReader:
    """An open video file, and the process that decodes it; where that breaks off, the next command
    starts another one.

    file : a real file, seekable. name : what errors call it.
    limits : their seconds are for each command and each thumbnail; with ``once``, for everything.
    check : called a few times a second; ends the work by raising.
    once : whether there will be one command only.

    Raises MediaError, and TooLargeError beyond ``limits``, when it is made and when it is read.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        limits: Limits | None = None,
        check: Callable[[], None] = no_check,
        *,
        once: bool = False,
    ) -> None:
        self.name = name
        self._start = lambda: _Process(file, name, limits or Limits(), check, once, "video")
        self._process, self.info = self._opened()
        self._process.rest()

    def _opened(self) -> tuple["_Process", VideoInfo]:
        process = self._start()
        try:
            values = process.message("video")
            with process.parsing():
                total, claimed = int(values["total"]), int(values["claimed"])
                info = VideoInfo(total, float(values["length"]), claimed, str(values["codec"]))
        except BaseException:
            process.close()
            raise
        return process, info

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def thumbnails(
        self, begin: float | None = None, end: float | None = None
    ) -> Iterator[tuple[float, Pixels]]:
        """All decodable frames on screen between two seconds: the second at which each appears, and
        its pixels, uint8 RGB (h, w, 3), 64x64 or fewer.

        Raises RequestError for a beginning behind the end of the video.
        """
        options = asdict(FrameOptions(start=begin, end=end))
        with self._command({"do": "thumbnails", "options": options}) as process:
            for _, about in process.frames(self.info.total):
                with process.parsing():
                    seconds = float(about["time"])
                pixels = process.pixels(about)
                process.renew()
                yield seconds, pixels

    def read_frames(
        self, options: FrameOptions, default: int = DEFAULT_FRAMES, most: int | None = None
    ) -> FrameSelection:
        """Chosen frames of the video, or of a part of it.

        default : their number where ``options`` set none. most : the most that may be chosen.

        Raises, before any is decoded:
            RequestError: when the options do not fit the video.
            TooManyFramesError: beyond ``most``.
        """
        command = {"do": "frames", "options": asdict(options), "default": default, "most": most}
        answer = self._frames(command)
        indices, times = next(answer)
        return FrameSelection(indices, times, answer)

    def _frames(self, command: Mapping[str, Any]) -> Iterator[Any]:
        """Yields (indices, times) first, and then (position, pixels) of each frame."""
        with self._command(command) as process:
            values = process.message("chosen")
            with process.parsing():
                indices = tuple(map(int, values["indices"]))
                times = tuple(map(float, values["times"]))
                if len(indices) != len(times):
                    raise ValueError("times and indices differ")
            yield indices, times
            for place, about in process.frames(len(indices)):
                yield place, process.pixels(about)

    @contextmanager
    def _command(self, command: Mapping[str, Any]) -> Generator["_Process"]:
        """The process, at work on a command; an answer that is not read to its end ends it."""
        # It broke off, or still sends frames that nobody waits for.
        if self._process.closed or not self._process.idle:
            self._process.close()
            self._process, _ = self._opened()
        process = self._process
        try:
            process.send(command)
            yield process
        except BaseException:
            process.close()
            raise
        process.rest()


class _Process:
    """A decoding process and its messages, all of which are checked: it reads an untrusted file.
    Only time that is spent waiting for it counts, from the beginning or the last :meth:`renew`.
    While it works, it counts among ``limits.processes``.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        limits: Limits,
        check: Callable[[], None],
        once: bool,
        kind: str,
    ) -> None:
        interpreter = find_interpreter()
        if interpreter is None:
            raise MediaError(f"{kind}s are decoded by {MISSING}")
        self._name, self._limits, self._check, self._once = name, limits, check, once
        self._seconds = limits.seconds + os.fstat(file.fileno()).st_size / READ_BYTES
        self._left = self._seconds
        self._buffer = bytearray()
        self.idle = True
        inherited, self._commands = os.pipe()
        request = {
            "kind": kind,
            "path": import_path(),
            "memory": limits.memory,
            "seconds": self._seconds,
            "max_pixels": limits.pixels,
            "threads": max(1, min(limits.threads, os.cpu_count() or 1)),
            "commands": inherited,
            "once": once,
        }
        script = str(Path(__file__).with_name("decoder_process.py"))
        try:
            self._work()
            self._process = subprocess.Popen(  # noqa: S603 (an interpreter, and a file of ours)
                [interpreter, "-I", script, json.dumps(request)],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**environment(), "MALLOC_ARENA_MAX": "2"},
                start_new_session=True,  # Ctrl-C is this process's business
                pass_fds=(inherited,),
            )
        except BaseException:
            os.close(self._commands)
            self.rest()
            raise
        finally:
            os.close(inherited)
        assert self._process.stdout is not None
        self._out = self._process.stdout
        if sys.platform == "linux":  # a frame in fewer reads; the sum of a user's pipes is limited
            with suppress(OSError):
                fcntl.fcntl(self._out.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)

    def _work(self) -> None:
        """Waits until another process may work."""
        if self.idle and self._limits.processes is not None:
            self._limits.processes.acquire(1, self._check)
        self.idle = False

    def rest(self) -> None:
        """Its answer was read to the end, or it ends: another process may work."""
        if not self.idle and self._limits.processes is not None:
            self._limits.processes.release()
        self.idle = True

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self.rest()
        if not self._out.closed:
            self._out.close()
            os.close(self._commands)

    @property
    def closed(self) -> bool:
        return self._out.closed

    def send(self, command: Mapping[str, Any]) -> None:
        self._work()
        if not self._once:
            self.renew()
        try:
            os.write(self._commands, json.dumps(command).encode() + b"\n")
        except OSError:
            self.fail()

    def renew(self) -> None:
        """Lets the process take its whole time again."""
        self._left = self._seconds

    def message(self, kind: str, end: str | None = None) -> Any:
        """The value of the next message, which has to be of this ``kind``; None for one of the kind
        ``end``.
        """
        seen = 0
        while (newline := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if seen > MAX_LINE:
                self.fail()
            self._receive()
        line = bytes(self._buffer[:newline])
        del self._buffer[: newline + 1]
        with self.parsing():
            values = json.loads(line)
            if "error" in values:
                raise self._refusal(values["error"])
            return None if end is not None and end in values else values[kind]

    def frames(self, total: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The position of each frame, rising below ``total``, and its message, which its pixels
        follow.
        """
        last = -1
        while (about := self.message("frame", "end")) is not None:
            with self.parsing():
                place = int(about["place"])
            if not last < place < total:
                self.fail()
            last = place
            yield place, about

    def pixels(self, about: Mapping[str, Any]) -> Pixels:
        """The pixels that follow a frame's message, turned upright: uint8 RGB (H, W, 3)."""
        with self.parsing():
            fields = ("high", "wide", "stride", "bytes")
            high, wide, stride, size = (int(about[name]) for name in fields)
            a, b, c, d = map(int, about["matrix"])
        if (
            not 0 < high * wide <= self._limits.pixels
            or high < 0
            or not 3 * wide <= stride <= 3 * wide + 4096
            or not (high - 1) * stride + 3 * wide <= size <= (high + 16) * stride + 4096
        ):
            self.fail()
        rows, there = np.empty(size, np.uint8), min(size, len(self._buffer))
        rows[:there] = np.frombuffer(self._buffer[:there], np.uint8)
        del self._buffer[:there]
        while there < size:
            self._await()
            count = os.readv(self._out.fileno(), [rows[there:].data])
            if not count:
                self.fail()
            there += count
        image = np.lib.stride_tricks.as_strided(
            rows, (high, wide, 3), (stride, 3, 1), writeable=False
        )
        return _upright(image, (a, b, c, d))

    @contextmanager
    def parsing(self) -> Generator[None]:
        """Turns errors of parsing a message into that of :meth:`fail`."""
        try:
            yield
        except (ValueError, KeyError, TypeError, RecursionError):
            self.fail()

    def fail(self) -> NoReturn:
        """The process broke off, or sent an invalid message."""
        self._process.kill()
        code = self._process.wait()
        why = f"signal {-code}" if code < 0 else f"code {code}"
        raise MediaError(f"cannot read {self._name}: the decoder broke off ({why})") from None

    def _receive(self) -> None:
        self._await()
        data = os.read(self._out.fileno(), 1 << 16)
        if not data:
            self.fail()
        self._buffer += data

    def _await(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            ready = False
            while not ready:
                began = time.monotonic()
                ready = bool(selector.select(POLL_SECONDS))
                self._left -= time.monotonic() - began
                self._check()
                if footprint(self._process.pid) > self._limits.memory:
                    why = "it takes too much memory to decode"
                    raise TooLargeError(f"cannot read {self._name}: {why}")
                if self._left < 0:
                    raise TooLargeError(
                        f"{self._name} takes more than {self._seconds:.1f} s to decode; "
                        "use fewer frames or a shorter part of it"
                    )

    def _refusal(self, error: Any) -> OneVisionError:
        text, kind = str(error["text"])[:300], error["kind"]
        if kind == "too_many" and text.isdigit():
            return TooManyFramesError(int(text))
        if kind == "request":
            return RequestError(f"{self._name}: {text}")
        cls = TooLargeError if kind == "too_large" else MediaError
        return cls(f"cannot read {self._name}: {text.rstrip('.')}")


def _upright(image: Pixels, matrix: tuple[int, int, int, int]) -> Pixels:
    """A view of ``image`` (H, W, 3), turned by the signs of a display matrix: x' = ax + cy,
    y' = bx + dy. A matrix that is no quarter turn or mirror image is ignored.
    """
    a, b, c, d = matrix
    if b and c and not a and not d:
        image, across, down = image.swapaxes(0, 1), c, b
    elif a and d and not b and not c:
        across, down = a, d
    else:
        return image
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
