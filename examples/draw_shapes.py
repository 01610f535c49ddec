"""Draws the pictures of the examples: ``shapes.png``, which ``make demo`` asks about, and
``square.png``.

    python examples/draw_shapes.py [FOLDER]
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


def blank() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), (244, 241, 234))
    return image, ImageDraw.Draw(image)


def draw_shapes() -> Image.Image:
    """A red circle, a blue star and an orange triangle, from left to right."""
    image, pen = blank()
    pen.circle((190 * SMOOTH, 330 * SMOOTH), 118 * SMOOTH, fill=(220, 38, 38))
    pen.polygon(corners(480 * SMOOTH, 310 * SMOOTH, 150 * SMOOTH, 5, 0.42), fill=(37, 99, 235))
    pen.polygon(corners(770 * SMOOTH, 350 * SMOOTH, 150 * SMOOTH, 3, 0.5), fill=(249, 115, 22))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def draw_square() -> Image.Image:
    """A green square, right of the middle."""
    image, pen = blank()
    pen.rectangle([v * SMOOTH for v in (440, 190, 720, 470)], fill=(22, 163, 74))
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    draw_shapes().save(folder / "shapes.png", optimize=True)
    draw_square().save(folder / "square.png", optimize=True)
