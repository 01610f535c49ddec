"""Draws ``examples/shapes.png``: the picture that ``make demo`` asks about.

python examples/draw_shapes.py [FILE]
"""

import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 960, 640
SMOOTH = 4  # drawn this many times larger, then reduced, so that edges are smooth


def corners(
    x: float, y: float, radius: float, points: int, inner: float
) -> list[tuple[float, float]]:
    """A star's outline, clockwise from the top; ``inner`` is the ratio of its inner radius."""
    outline = []
    for step in range(2 * points):
        angle = math.pi * step / points - math.pi / 2
        length = radius * (inner if step % 2 else 1)
        outline.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return outline


def draw() -> Image.Image:
    """A red circle, a blue star and an orange triangle, from left to right."""
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), (244, 241, 234))
    pen = ImageDraw.Draw(image)
    pen.circle((190 * SMOOTH, 330 * SMOOTH), 118 * SMOOTH, fill=(220, 38, 38))
    pen.polygon(corners(480 * SMOOTH, 310 * SMOOTH, 150 * SMOOTH, 5, 0.42), fill=(37, 99, 235))
    pen.polygon(corners(770 * SMOOTH, 350 * SMOOTH, 150 * SMOOTH, 3, 0.5), fill=(249, 115, 22))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("shapes.png")
    draw().save(target, optimize=True)
