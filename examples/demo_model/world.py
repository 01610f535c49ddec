"""The demo model's world: pictures and short videos of one to four coloured shapes.

A scene is a small set of numbers. Everything else is made from it: the drawing (`drawing.py` with
Pillow, `rendering.py` straight at tile pixels on a GPU) and the questions with their only right
answers (`questions.py`). `scenes.py` makes scenes at random. Positions are fractions of the picture
(x to the right, y down); radii are fractions of its shorter side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RGB = tuple[float, float, float]
Size = tuple[int, int]

KINDS = ("circle", "square", "triangle", "star")
REGIONS = ("left", "right", "top", "bottom", "centre")
MOTIONS = ("left to right", "right to left", "up", "down", "grows", "shrinks")
COLOURS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 38, 38), (200, 20, 30), (235, 60, 50)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 160, 70), (46, 190, 100)),
    "blue": ((0, 0, 255), (37, 99, 235), (30, 60, 180), (20, 120, 255)),
    "yellow": ((255, 255, 0), (250, 220, 30), (255, 215, 0), (240, 230, 60)),
    "orange": ((255, 165, 0), (255, 140, 0), (249, 115, 22), (240, 130, 30)),
    "purple": ((128, 0, 128), (147, 51, 234), (110, 40, 160), (160, 32, 240)),
    "black": ((0, 0, 0), (20, 20, 20), (30, 30, 35)),
    "white": ((255, 255, 255), (246, 246, 246)),
}
# Points of the outline and ratio of its inner to its outer radius; a circle has no corners.
CORNERS = {
    "circle": (1, 0.0),
    "square": (4, math.sqrt(0.5)),
    "triangle": (3, 0.5),
    "star": (5, 0.4),
}

ORDER_GAP = 0.08  # least distance in x between two centres, so that left to right is never a tie
CENTRE = 0.10  # a centred shape is at most this far from the middle, in x and in y
OUTSIDE = 0.20  # any other shape whose place is asked is at least this far, in x or in y
DIAGONAL = 0.08  # and this much farther along one axis than along the other


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape; `x, y` is the centre and `radius` the circle that holds every corner."""

    kind: str
    colour: str
    rgb: RGB
    x: float
    y: float
    radius: float
    angle: float  # radians, clockwise
    inner: float  # inner radius over outer radius, 0 for a circle
    stretch: float  # width over height, before the rotation
    end: tuple[float, float, float] | None = None  # x, y, radius at the end of a video
    motion: str | None = None

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    def at(self, time: float) -> tuple[float, float, float]:
        """Centre and radius at `time`, 0 to 1."""
        if self.end is None:
            return self.x, self.y, self.radius
        x, y, radius = self.end
        return (
            self.x + (x - self.x) * time,
            self.y + (y - self.y) * time,
            self.radius + (radius - self.radius) * time,
        )


@dataclass(frozen=True, slots=True)
class Background:
    """From `first` to `second` along `direction`; `noise` levels of noise (standard deviation)."""

    first: RGB
    second: RGB
    direction: tuple[float, float]  # |dx| + |dy| <= 1, so that the mixture stays within 0..1
    noise: float
    texture: int | None = None  # of a picture without shapes: what grows from this seed, instead

    def mixed(self, share: float) -> RGB:
        a, b = self.first, self.second
        return (
            a[0] + (b[0] - a[0]) * share,
            a[1] + (b[1] - a[1]) * share,
            a[2] + (b[2] - a[2]) * share,
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, or a video when a shape moves; `size` is (height, width) in pixels."""

    size: Size
    shapes: tuple[Shape, ...]  # from left to right
    background: Background


def region(x: float, y: float) -> str | None:
    """Where a centre lies: `None` near a border between two regions, which is never asked."""
    dx, dy = x - 0.5, y - 0.5
    far = max(abs(dx), abs(dy))
    if far <= CENTRE:
        return "centre"
    if far < OUTSIDE or abs(abs(dx) - abs(dy)) < DIAGONAL:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"
