"""Draws ``shapes.mp4``, the video that the page of ``mlx-onevision serve`` offers to try: fourteen
seconds of coloured shapes in five scenes.

    python examples/draw_page_video.py FILE
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import av
from PIL import Image, ImageDraw

WIDTH, HEIGHT, RATE = 320, 240, 24
SMOOTH = 2  # drawn this many times larger, then reduced, so that edges are smooth
CODEC = {"crf": "27", "preset": "slow", "g": "48"}

Shape = tuple[str, str, float, float, float]  # kind, colour, centre, radius

INK = {
    "black": (24, 24, 27),
    "blue": (37, 99, 235),
    "green": (22, 163, 74),
    "orange": (249, 115, 22),
    "purple": (147, 51, 234),
    "red": (220, 38, 38),
}
POINTS = {"star": (5, 0.42), "triangle": (3, 0.5)}  # and the ratio of the inner radius


def between(first: float, last: float, time: float) -> float:
    return first + (last - first) * time


# Background, seconds, and what is there at a time from 0 to 1.
SCENES: tuple[tuple[tuple[int, int, int], float, Callable[[float], list[Shape]]], ...] = (
    (
        (244, 241, 234),
        3.0,
        lambda t: [
            ("circle", "red", between(60, 260, t), 90, 38),
            ("square", "blue", 160, 180, 29),
        ],
    ),
    ((219, 234, 254), 2.5, lambda t: [("star", "orange", 160, between(190, 60, t), 50)]),
    ((220, 252, 231), 3.5, lambda t: [("triangle", "purple", between(250, 70, t), 120, 53)]),
    ((253, 230, 200), 2.5, lambda t: [("square", "green", 160, 120, between(20, 72, t))]),
    (
        (236, 232, 246),
        2.5,
        lambda t: [
            ("circle", "black", 100, 120, 40),
            ("star", "red", 225, between(60, 180, t), 46),
        ],
    ),
)


def draw(background: tuple[int, int, int], shapes: list[Shape]) -> Image.Image:
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), background)
    pen = ImageDraw.Draw(image)
    for kind, colour, x, y, radius in shapes:
        x, y, radius = x * SMOOTH, y * SMOOTH, radius * SMOOTH
        box = (x - radius, y - radius, x + radius, y + radius)
        if kind == "circle":
            pen.ellipse(box, fill=INK[colour])
        elif kind == "square":
            pen.rectangle(box, fill=INK[colour])
        else:
            points, inner = POINTS[kind]
            corners = []
            for step in range(2 * points):
                angle = math.pi * step / points - math.pi / 2
                length = radius * (inner if step % 2 else 1)
                corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
            pen.polygon(corners, fill=INK[colour])
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def write(target: str) -> None:
    with av.open(target, "w", options={"movflags": "faststart"}) as out:
        stream: Any = out.add_stream("libx264", rate=RATE, options=CODEC)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for background, seconds, scene in SCENES:
            frames = round(seconds * RATE)
            for number in range(frames):
                picture = draw(background, scene(number / (frames - 1)))
                out.mux(stream.encode(av.VideoFrame.from_image(picture)))
        out.mux(stream.encode())


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    write(sys.argv[1])
