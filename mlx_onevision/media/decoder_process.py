"""The process that decodes a video: started by :mod:`decoder`, never imported by the rest.

Video decoders are large, written in C, and meet untrusted files. So they run in a process of their
own, with limits on memory, processor time and open files, that can die without harm. The file
arrives as standard input, already open: libav sees bytes, and neither a name nor a URL, and it may
take them for one of a few containers only (a playlist, which names other files, is none).

The video is kept open, and commands (lines of JSON) are read from a descriptor. What comes back on
standard output is lines of JSON, some followed by one frame's pixels:

    {"video": {…}}                     once: how many frames there are, and how long it is
    {"chosen": {…}}                    after the command "frames": which are coming
    {"frame": {…, "bytes": n}}         then n bytes: rows of RGB, each of "stride" bytes
    {"end": {}}                        of an answer
    {"error": {"text": "…", "kind": "…"}}
"""

import gc
import json
import os
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

    from mlx_onevision.media.libav import Index

Send: TypeAlias = Callable[..., None]

FILES = 32  # open at once


def main() -> None:
    request = json.loads(sys.argv[1])
    sys.path[:] = request["path"]
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not be believed

    def send(kind: str, value: Any, pixels: Any = None) -> None:
        out.write(json.dumps({kind: value}).encode() + b"\n")
        if pixels is not None:
            out.write(pixels)
        out.flush()

    try:
        from mlx_onevision.media import libav  # before the limits: PyAV opens and maps many files
        from mlx_onevision.subprocesses import confine

        gc.freeze()  # so that looking for cycles takes no time
        _limit_processor_time(request)
        confine(request["memory"], files=FILES)
        try:
            _serve(request, send)
        except libav.Refusal as error:
            send("error", {"text": str(error), "kind": error.kind})
    except MemoryError:
        send("error", {"text": "it takes too much memory to decode", "kind": "too_large"})
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        send("error", {"text": text, "kind": "media"})


def _limit_processor_time(request: dict[str, Any], length: float = 0.0) -> None:
    """Sets the processor time from now on: what one answer may take, and each thread as long as the
    video lasts. Commands are answered one after another, each with its own.
    """
    import resource

    seconds = (request["seconds"] + length) * request["threads"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        if request["once"]:
            hard = soft
        elif hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    except (OSError, ValueError):
        pass  # a stricter one is in force, or the system has none


def _serve(request: dict[str, Any], send: Send) -> None:
    """Sends what is known of the video, and then what each command asks for."""
    from mlx_onevision.errors import RequestError
    from mlx_onevision.media.frame_sampling import FrameOptions
    from mlx_onevision.media.libav import Refusal, open_video, read_index

    container, stream = open_video(request)
    index = read_index(container, stream)
    info = {"total": len(index.stamps), "length": index.length}
    info |= {"claimed": stream.frames, "codec": stream.codec_context.name}
    container.close()
    send("video", info)
    with os.fdopen(request["commands"], encoding="utf-8") as commands:
        for line in commands:
            command = json.loads(line)
            thumbnails = command["do"] == "thumbnails"
            if not request["once"]:
                _limit_processor_time(request, index.length if thumbnails else 0.0)
            try:
                options = FrameOptions(**command.pop("options"))
                if thumbnails:
                    _send_thumbnails(request, index, options, send)
                else:
                    _send_frames(request, index, options, command, send)
            except RequestError as error:
                raise Refusal(str(error), "request") from None
            send("end", {})


def _send_thumbnails(request: dict[str, Any], index: "Index", options: Any, send: Send) -> None:
    from mlx_onevision.media.frame_sampling import frames_between
    from mlx_onevision.media.libav import thumbnails

    part = frames_between(index.times, index.length, options)
    matrix = None
    for number, frame, small in thumbnails(request, index, part.start, part.stop):
        matrix = matrix or _matrix(frame)  # of a video; that of each frame takes longer
        _send_frame(send, small, matrix, place=number, time=index.times[number])


def _send_frames(
    request: dict[str, Any], index: "Index", options: Any, command: dict[str, Any], send: Send
) -> None:
    from mlx_onevision.media.frame_sampling import select_frames
    from mlx_onevision.media.libav import Refusal, chosen_frames

    chosen = select_frames(index.times, index.length, options, command["default"])
    if command["most"] is not None and len(chosen) > command["most"]:
        raise Refusal(str(len(chosen)), "too_many")
    send("chosen", {"indices": chosen, "times": [index.times[i] for i in chosen]})
    for place, frame in chosen_frames(request, index, chosen):
        plain = frame.reformat(format="rgb24", dst_color_range="JPEG", threads=1)
        _send_frame(send, plain, _matrix(frame), place=place)
        del frame, plain
        gc.collect()  # see _matrix


def _send_frame(send: Send, frame: "VideoFrame", matrix: list[int], **about: Any) -> None:
    """``frame`` : in RGB, to be turned by ``matrix``."""
    plane = frame.planes[0]
    size = {"wide": frame.width, "high": frame.height, "stride": plane.line_size}
    about |= {**size, "matrix": matrix, "bytes": plane.buffer_size}
    send("frame", about, memoryview(plane))


def _matrix(frame: "VideoFrame") -> list[int]:
    """Signs (a, b, c, d) of where the display matrix takes x and y; only quarter turns count.

    A frame that has been asked for its side data is in a cycle with it, and stays, with all its
    pixels, until Python looks for cycles.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return [1, 0, 0, 1]
    a, b, _, c, d = struct.unpack("5i", bytes(data)[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):
        a = d = 0
    else:
        b = c = 0
    return [(n > 0) - (n < 0) for n in (a, b, c, d)]


if __name__ == "__main__":
    main()
