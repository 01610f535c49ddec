"""The process that decodes a video, or an image of a rarer kind: started by :mod:`decoder`, never
imported by other modules. The decoding is in :mod:`libav` and :mod:`image`; here are the process's
limits and messages.

Decoders are large, written in C, and meet untrusted files, so they run in a process of their own,
with limits on memory, processor time and open files. The file is standard input: libav gets neither
a name nor a URL, and accepts a few containers only (no playlist, which names other files).

Commands (lines of JSON) are read from a descriptor. Standard output is lines of JSON, some followed
by one frame's pixels:

    {"video": {…}}                     first: number of frames, length, codec
    {"chosen": {…}}                    after the command "frames": the frames that follow
    {"frame": {…, "bytes": n}}         then n bytes: rows of RGB, each of "stride" bytes
    {"end": {}}                        after the last frame of an answer; not for an image
    {"error": {"text": "…", "kind": "…"}}
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

FILES = 32  # open at once


def main() -> None:
    """Answers the commands for one file; its settings are JSON in the first argument."""
    request = json.loads(sys.argv[1])
    sys.path[:] = request["path"]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no message

    def send(kind: str, value: Any, pixels: Any = None) -> None:
        out.write(json.dumps({kind: value}).encode() + b"\n")
        if pixels is not None:
            out.write(pixels)
        out.flush()

    try:
        serve = _reader(request, send)  # before the limits: libraries open and map many files
        from mlx_onevision.errors import MediaError, TooLargeError
        from mlx_onevision.subprocesses import confine

        gc.freeze()  # so that looking for cycles takes no time
        _allow_seconds(request, 0.0)
        confine(request["memory"], files=FILES)
        try:
            serve()
        except MediaError as error:
            kind = "too_large" if isinstance(error, TooLargeError) else "media"
            send("error", {"text": str(error), "kind": kind})
    except MemoryError:
        send("error", {"text": "it takes too much memory to decode", "kind": "too_large"})
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        send("error", {"text": text, "kind": "media"})


def _reader(request: dict[str, Any], send: Callable[..., None]) -> Callable[[], None]:
    """A function that answers the commands for the file; what it needs is imported by now."""
    if request["kind"] == "image":
        from mlx_onevision.media.image import serve

        return lambda: serve(request, send)
    from mlx_onevision.media import libav

    def read() -> None:
        try:
            libav.serve(request, send, lambda length: _allow_seconds(request, length))
        except libav.Refusal as error:
            send("error", {"text": str(error), "kind": error.kind})

    return read


def _allow_seconds(request: dict[str, Any], length: float) -> None:
    """Limits the processor time of the next answer. length : seconds beside the request's own, for
    each thread.
    """
    from mlx_onevision.subprocesses import allow_seconds

    seconds = (request["seconds"] + length) * request["threads"]
    allow_seconds(seconds, for_good=request["once"])


if __name__ == "__main__":
    main()
