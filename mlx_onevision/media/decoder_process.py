"""The process that decodes a video: started by :mod:`decoding`, never imported by the rest.

Decoders of video are large, written in C, and meet files of strangers. So they run in a process of
their own, with limits on memory, processor time and open files, that can die without harm. The
file arrives as standard input, already open: libav sees bytes, and neither a name nor a URL, and it
may take them for one of a few containers only (a playlist, which names other files, is none).

What comes back on standard output is a line of JSON, which may be followed by one frame's pixels:

    {"video": {…}}                     once: how many frames there are, and which are coming
    {"frame": {…, "bytes": n}}         then n bytes: rows of RGB, each of "stride" bytes
    {"end": {…}}  or  {"error": "…", "kind": "…"}

Where the request names a descriptor to read commands from, the video is kept open, and each command
(a line of JSON, see :mod:`reel`) is answered by frames and an end.
"""

import gc
import json
import os
import struct
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from mlx_onevision.media.libav import Index

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
        _allow(request, 0.0)
        confine(request["memory"], files=FILES)
        try:
            _decode(request, send) if request["control"] is None else _serve(request, send)
        except libav.Refusal as error:
            send("error", {"text": str(error), "kind": error.kind})
    except MemoryError:
        send("error", {"text": "it takes too much memory to decode", "kind": "too_large"})
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        send("error", {"text": text, "kind": "media"})


def _allow(request: dict[str, Any], film: float) -> None:
    """Sets the processor time from now on: what one answer may take, and each thread as long as the
    film lasts. Commands are answered one after another, each with its own.
    """
    import resource

    seconds = (request["seconds"] + film) * request["threads"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        if request["control"] is None:
            hard = soft
        elif hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
    except (OSError, ValueError):
        pass  # a stricter one is in force, or the system has none


def _decode(request: dict[str, Any], send: Any) -> None:
    """Sends the frames that the request asks for, and ends."""
    from mlx_onevision.media.libav import Refusal, open_video, read_index

    container, stream = open_video(request)
    index = read_index(container, stream)
    chosen, times = _chosen(request, stream, index)
    if request["most"] is not None and len(chosen) > request["most"]:
        raise Refusal(str(len(chosen)), "too_many")
    facts = {**_facts(stream, index), "indices": chosen, "times": times}
    container.close()
    send("video", facts)
    _send_chosen(request, index, chosen, send)


def _serve(request: dict[str, Any], send: Any) -> None:
    """Sends what is known of the video, and then what each command asks for."""
    from mlx_onevision.media.frame_sampling import FrameOptions, on_screen
    from mlx_onevision.media.libav import open_video, read_index, thumbnails

    container, stream = open_video(request)
    index = read_index(container, stream)
    send("video", _facts(stream, index))
    with os.fdopen(request["control"], encoding="utf-8") as commands:
        for line in commands:
            command = json.loads(line)
            if command["do"] == "frames":
                _allow(request, 0.0)
                chosen, times = _chosen(command, stream, index)
                send("chosen", {"indices": chosen, "times": times})
                _send_chosen(request, index, chosen, send)
                continue
            _allow(request, index.length)
            times = _times(stream, index)
            part = on_screen(times, index.length, FrameOptions(**command["options"]))
            matrix = None
            for number, frame, small in thumbnails(request, index, part.start, part.stop):
                matrix = matrix or _matrix(frame)  # of a film; that of each frame takes longer
                _send_frame(send, small, matrix, place=number, time=times[number])
            send("end", {})


def _facts(stream: "VideoStream", index: "Index") -> dict[str, Any]:
    return {
        "total": len(index.stamps),
        "length": index.length,
        "claimed": stream.frames,
        "codec": stream.codec_context.name,
    }


def _times(stream: "VideoStream", index: "Index") -> list[float]:
    """The second at which each frame appears."""
    from mlx_onevision.media.libav import tick_of

    tick = tick_of(stream)
    return [float(stamp * tick) - index.zero for stamp in index.stamps]


def _chosen(
    command: dict[str, Any], stream: "VideoStream", index: "Index"
) -> tuple[list[int], list[float]]:
    """The frames that ``command`` asks for, and when they appear."""
    from mlx_onevision.errors import OneVisionError
    from mlx_onevision.media.frame_sampling import FrameOptions, choose
    from mlx_onevision.media.libav import Refusal

    times = _times(stream, index)
    try:
        options = FrameOptions(**command["options"])
        chosen = choose(times, index.length, options, command["default"])
    except OneVisionError as error:
        raise Refusal(str(error), "request") from None
    return chosen, [times[i] for i in chosen]


def _send_chosen(request: dict[str, Any], index: "Index", chosen: list[int], send: Any) -> None:
    from mlx_onevision.media.libav import chosen_frames

    sent = 0
    for place, frame in chosen_frames(request, index, chosen):
        plain = frame.reformat(format="rgb24", dst_color_range="JPEG", threads=1)
        _send_frame(send, plain, _matrix(frame), place=place)
        sent += 1
        del frame, plain
        gc.collect()  # see _matrix
    send("end", {"sent": sent, "broken": index.broken})


def _send_frame(send: Any, frame: "VideoFrame", matrix: list[int], **about: Any) -> None:
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
