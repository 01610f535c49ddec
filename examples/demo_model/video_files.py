"""Frames as a video file: H.264 in MP4, or GIF. Needs PyAV, as the package does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
from PIL import Image

_CODECS = {".mp4": ("libx264", "yuv420p"), ".gif": ("gif", "rgb8")}


def write_video(path: Path, frames: Sequence[Image.Image], rate: int) -> Path:
    """Write frames of one size, both sides even; the name says which kind of file."""
    codec, pixels = _CODECS[path.suffix]
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = pixels
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame).reformat(format=pixels)))
        file.mux(stream.encode())
    return path
