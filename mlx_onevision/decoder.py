"""The process that decodes a video: started by :mod:`decoding`, never imported by the rest.

Decoders of video are large, written in C, and meet files of strangers. So they run in a process of
their own, with limits on memory, processor time and open files, that can die without harm. The
file arrives as standard input, already open: libav sees bytes, and neither a name nor a URL, and it
may take them for one of a few containers only (a playlist, which names other files, is none).

What comes back on standard output is a line of JSON, which may be followed by one frame's pixels:

    {"video": {…}}                     once: how many frames there are, and which are coming
    {"frame": {…, "bytes": n}}         then n bytes: rows of RGB, each of "stride" bytes
    {"end": {…}}  or  {"error": "…", "kind": "…"}
"""

import json
import os
import struct
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.video.frame import VideoFrame


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
        from mlx_onevision import footage  # before the limits: PyAV opens and maps many files

        _limit(request["memory"], request["seconds"], request["threads"])
        try:
            _decode(request, send)
        except footage.Refusal as error:
            send("error", {"text": str(error), "kind": error.kind})
    except MemoryError:
        send("error", {"text": "it takes too much memory to decode", "kind": "too_large"})
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        send("error", {"text": text, "kind": "media"})


def _limit(memory: int, seconds: float, threads: int) -> None:
    """Bounds this process: what the system enforces, and a watch where it does not (macOS)."""
    import resource
    import threading
    import time

    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds * threads) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in wanted.items():
        try:
            resource.setrlimit(limit, (value, value))
        except (OSError, ValueError):
            pass  # a stricter one is in force, or the system has none
    parent = os.getppid()
    unit = 1 if sys.platform == "darwin" else 1024

    def watch() -> None:
        while True:
            time.sleep(0.2)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            if used > memory or os.getppid() != parent:
                os._exit(9)

    threading.Thread(target=watch, daemon=True).start()


def _decode(request: dict[str, Any], send: Any) -> None:
    from mlx_onevision.errors import OneVisionError
    from mlx_onevision.footage import Refusal, chosen_frames, open_video, read_index, tick_of
    from mlx_onevision.frames import FrameOptions, choose

    container, stream = open_video(request)
    index = read_index(container, stream)
    tick = tick_of(stream)
    times = [float(stamp * tick) - index.zero for stamp in index.stamps]
    try:
        options = FrameOptions(**request["options"])
        chosen = choose(times, index.length, options, request["default"])
    except OneVisionError as error:
        raise Refusal(str(error), "request") from None
    if request["most"] is not None and len(chosen) > request["most"]:
        raise Refusal(str(len(chosen)), "too_many")
    facts = {
        "total": len(times),
        "length": index.length,
        "claimed": stream.frames,
        "indices": chosen,
        "times": [times[i] for i in chosen],
        "codec": stream.codec_context.name,
    }
    container.close()
    send("video", facts)
    sent = 0
    for place, frame in chosen_frames(request, index, chosen):
        plain = frame.reformat(format="rgb24", dst_color_range="JPEG", threads=1)
        plane = plain.planes[0]
        about = {
            "place": place,
            "wide": plain.width,
            "high": plain.height,
            "stride": plane.line_size,
            "matrix": _matrix(frame),
            "bytes": plane.buffer_size,
        }
        send("frame", about, memoryview(plane))
        sent += 1
    send("end", {"sent": sent, "broken": index.broken})


def _matrix(frame: "VideoFrame") -> list[int]:
    """Signs (a, b, c, d) of where the display matrix takes x and y; only quarter turns count."""
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
