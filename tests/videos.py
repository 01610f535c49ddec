"""Small videos made on the spot: frames that carry their own number, and drawn scenes."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import av
import numpy as np

BITS = 10
HIGH, WIDE = 48, 80  # eight columns a bit

# By container: codec, pixel format and the codec's options.
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("libx264", "yuv420p", {}),
    "mov": ("libx264", "yuv420p", {"g": "12"}),
    "mkv": ("libx264", "yuv420p", {"g": "250"}),
    "webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8"}),
    "avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "gif": ("gif", "rgb8", {}),
    "ts": ("libx264", "yuv420p", {}),
    "mpg": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "ogv": ("libvpx", "yuv420p", {"cpu-used": "8"}),  # there is a decoder of Theora, no encoder
}
MUXERS = {"mkv": "matroska", "ts": "mpegts", "mpg": "vob", "ogv": "ogg"}


def numbered(number: int) -> np.ndarray:
    """A frame that shows ``number`` in black and white columns, uint8 (HIGH, WIDE, 3)."""
    bits = [(number >> bit & 1) * 255 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8), WIDE // BITS)
    return np.broadcast_to(row[None, :, None], (HIGH, WIDE, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """The number that a frame of any size shows."""
    high, wide = frame.shape[:2]
    columns = [int((bit + 0.5) * wide / BITS) for bit in range(BITS)]
    levels = frame[high // 4 : -(high // 4), columns].mean((0, 2))
    assert ((levels < 70) | (levels > 185)).all(), levels
    return sum(1 << bit for bit in range(BITS) if levels[bit] > 127)


def encode_video(
    frames: Iterable[np.ndarray],
    kind: str = "mp4",
    *,
    rate: int = 25,
    stamps: Sequence[int] | None = None,
    codec: str | None = None,
    pixels: str | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> bytes:
    """A video file of uint8 frames (H, W, 3), as bytes.

    stamps : when each frame appears, in milliseconds; evenly at ``rate`` without.
    """
    usual, format, settings = KINDS[kind]
    name = MUXERS.get(kind, kind)
    with (
        NamedTemporaryFile() as data,  # with a name, because "faststart" opens it again
        av.open(data.name, "w", format=name, options=container or {}) as out,
    ):
        stream: Any = out.add_stream(codec or usual, rate=rate, options=options or settings)
        for number, picture in enumerate(frames):
            if not number:
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pixels or format
                if stamps:
                    stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamps[number] if stamps else number
            frame.time_base = Fraction(1, 1000) if stamps else Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if codec == "libsvtav1" and sys.platform == "linux":
            # It gives root's threads real-time priority; processes started later would inherit it.
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        out.close()
        return Path(data.name).read_bytes()


def counting(total: int, kind: str = "mp4", **settings: Any) -> bytes:
    """A video of frames that show 0, 1, 2, …"""
    return encode_video(map(numbered, range(total)), kind, **settings)


def grainy(path: Path) -> bytes:
    """The video of a file, twice as wide and high and with half of its frames, in grain that no
    encoder makes small: some 5 MB a second.
    """
    grain = np.random.default_rng(0)

    def frames() -> Iterator[np.ndarray]:
        with av.open(path) as source:
            for frame in list(source.decode(video=0))[::2]:
                picture = frame.to_ndarray(format="rgb24").repeat(2, 0).repeat(2, 1)
                noise = grain.integers(-32, 33, picture.shape, dtype=np.int16)
                yield np.clip(picture + noise, 0, 255).astype(np.uint8)

    return encode_video(
        frames(), rate=12, codec="libx264", options={"crf": "1", "preset": "ultrafast"}
    )


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def trimmed(data: bytes, milliseconds: int) -> bytes:
    """An MP4 of which an edit list shows only the beginning."""
    place = data.index(b"elst") + 12
    return data[:place] + milliseconds.to_bytes(4, "big") + data[place + 4 :]


def turned(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 whose track is to be shown through the display matrix (a, b; c, d)."""
    start = data.index(b"tkhd") + 44
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], ">i4") * (1 << 16)
    return data[:start] + matrix.astype(">i4").tobytes() + data[start + 36 :]
