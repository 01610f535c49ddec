"""The process that decodes a video, seen from this side: how it is started, and what it sends.

The process is a Python interpreter that runs ``decoder.py``; see :mod:`interpreter`.
"""

import json
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
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
from mlx_onevision.subprocesses import INTERPRETER, MISSING, find_interpreter, import_path

__all__ = ["INTERPRETER", "Limits", "Pipe", "TooManyFramesError", "nothing", "start", "stop"]

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


def nothing() -> None:
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
