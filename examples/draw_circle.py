"""Draws ``examples/circle.mp4``: two seconds of a red circle that moves past a blue square.

python examples/draw_circle.py [FILE]
"""

import sys
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 320, 240
FRAMES, RATE = 48, 24
SMOOTH = 4  # drawn this many times larger, then reduced, so that edges are smooth


def draw(time: float) -> Image.Image:
    """The picture at ``time``, 0 to 1."""
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), (244, 241, 234))
    pen = ImageDraw.Draw(image)
    x = 60 + 200 * time
    pen.circle((x * SMOOTH, 80 * SMOOTH), 36 * SMOOTH, fill=(220, 38, 38))
    pen.rectangle([v * SMOOTH for v in (130, 150, 190, 210)], fill=(37, 99, 235))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def write(target: str) -> None:
    with av.open(target, "w") as out:
        stream: Any = out.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            frame = av.VideoFrame.from_image(draw(number / (FRAMES - 1)))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    write(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("circle.mp4")))
