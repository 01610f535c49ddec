"""Random scenes, each from its generator alone: the same seed makes the same scene."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from examples.demo_model.world import (
    CENTRE,
    COLOURS,
    CORNERS,
    KINDS,
    MOTIONS,
    ORDER_GAP,
    REGIONS,
    RGB,
    Background,
    Scene,
    Shape,
    Size,
    region,
)

CONTRAST = 110.0  # least RGB distance between a shape and what lies behind it


def sample_size(rng: Random, low: int = 64, high: int = 2000, aspect: float = 4.0) -> Size:
    """A picture size (height, width): both sides within low..high, at most `aspect` to one."""
    while True:
        short = low * math.exp(rng.random() * math.log(high / low))
        ratio = 1.0 if rng.random() < 0.2 else math.exp(rng.random() * math.log(aspect))
        long = short * ratio
        if long > high:
            continue
        a, b = round(short), min(round(long), int(round(short) * aspect))
        return (a, b) if rng.random() < 0.5 else (b, a)


def _distance(a: RGB, b: RGB) -> float:
    return math.sqrt((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2)


def sample_rgb(rng: Random, colour: str) -> RGB:
    """A tone of a named colour: between two of its anchors, a few levels off; often an anchor."""
    anchors = COLOURS[colour]
    first = rng.choice(anchors)
    if rng.random() < 0.4:
        return first
    second, share = rng.choice(anchors), rng.random()
    tone = [a + (b - a) * share + rng.uniform(-8, 8) for a, b in zip(first, second, strict=True)]
    red, green, blue = (float(min(255, max(0, round(v)))) for v in tone)
    return red, green, blue


def _backdrop(rng: Random) -> RGB:
    pick = rng.random()
    if pick < 0.4:  # white and nearly white
        level = 255.0 if rng.random() < 0.7 else float(rng.randint(235, 255))
        return level, level, level
    if pick < 0.6:  # grey
        level = float(rng.randint(0, 235))
        return level, level, level
    low, high = ((190, 255), (60, 200), (0, 70))[rng.choices((0, 1, 2), (5, 3, 2))[0]]
    return (
        float(rng.randint(low, high)),
        float(rng.randint(low, high)),
        float(rng.randint(low, high)),
    )


def sample_background(rng: Random) -> Background:
    """Plain, a gradient, or either with light noise."""
    first = _backdrop(rng)
    second, direction = first, (0.0, 0.0)
    if rng.random() < 0.35:
        second, angle = _backdrop(rng), rng.random() * math.tau
        dx, dy = math.cos(angle), math.sin(angle)
        norm = abs(dx) + abs(dy)
        direction = (dx / norm, dy / norm)
    noise = rng.uniform(1, 14) if rng.random() < 0.3 else 0.0
    return Background(first, second, direction, noise)


def sample_empty(rng: Random, size: Size) -> Scene:
    """A picture without a shape: a background, strong noise, or something like a photograph."""
    background = sample_background(rng)
    pick = rng.random()
    if pick < 0.3:
        background = replace(background, noise=rng.uniform(10, 80))
    elif pick < 0.65:
        background = replace(background, texture=rng.getrandbits(31))
    return Scene(size, (), background)


def _stands_out(rgb: RGB, background: Background) -> bool:
    if _distance(rgb, background.first) < CONTRAST:
        return False
    if background.first == background.second:
        return True
    return all(_distance(rgb, background.mixed(t)) >= CONTRAST for t in (0.25, 0.5, 0.75, 1.0))


def _names(rng: Random, count: int, background: Background) -> list[tuple[str, str, RGB]] | None:
    """`count` different (kind, colour) pairs whose tones stand out from the background."""
    found: list[tuple[str, str, RGB]] = []
    for _ in range(12 * count):
        kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
        used = any(k == kind and c == colour for k, c, _ in found)
        # Mostly different kinds and colours: a question needs something to point at.
        alike = any(k == kind or c == colour for k, c, _ in found)
        if used or (alike and rng.random() < 0.6):
            continue
        rgb = sample_rgb(rng, colour)
        if _stands_out(rgb, background):
            found.append((kind, colour, rgb))
            if len(found) == count:
                return found
    return None


def _centre(rng: Random, mx: float, my: float) -> tuple[float, float]:
    """A centre at least `mx`, `my` from the sides, in each region equally often."""
    where = rng.choice(REGIONS) if rng.random() < 0.8 else None
    for _ in range(12):
        if where == "centre":
            return 0.5 + rng.uniform(-CENTRE, CENTRE), 0.5 + rng.uniform(-CENTRE, CENTRE)
        x, y = rng.uniform(mx, 1 - mx), rng.uniform(my, 1 - my)
        if where is None or region(x, y) == where:
            return x, y
    return rng.uniform(mx, 1 - mx), rng.uniform(my, 1 - my)


def _outline(rng: Random, kind: str) -> tuple[float, float, float]:
    """Angle, inner ratio and stretch of one shape of a kind."""
    inner = CORNERS[kind][1]
    if kind == "circle":
        return 0.0, inner, 1.0
    angle = rng.gauss(0, 0.12) if rng.random() < 0.6 else rng.random() * math.tau
    if kind == "square":  # flat side up, unless turned
        angle += math.pi / 4
    if kind == "star":
        inner = rng.uniform(0.36, 0.5)
    return angle, inner, rng.uniform(0.8, 1.0) if kind == "triangle" else 1.0


def sample_scene(rng: Random, size: Size, count: int, low: float = 0.13) -> Scene:
    """A still picture of `count` shapes that neither touch nor tie, none under `low` in radius."""
    height, width = size
    unit = min(height, width)
    high = (0.40, 0.32, 0.27, 0.24)[count - 1]
    while True:
        background = sample_background(rng)
        names = _names(rng, count, background)
        if names is None:
            continue
        shapes: list[Shape] = []
        for kind, colour, rgb in names:
            for _ in range(25):
                radius = rng.uniform(low, max(low, high))
                # A circle fills its outer radius and looks larger than the others do.
                radius *= 0.85 if kind == "circle" else 1.0
                mx, my = (radius + 0.01) * unit / width, (radius + 0.01) * unit / height
                x, y = _centre(rng, mx, my)
                if _fits(shapes, x, y, radius, width / unit, height / unit):
                    angle, inner, stretch = _outline(rng, kind)
                    shapes.append(Shape(kind, colour, rgb, x, y, radius, angle, inner, stretch))
                    break
            else:
                break
        if len(shapes) == count:
            return Scene(size, tuple(sorted(shapes, key=lambda s: s.x)), background)


def sample_video(rng: Random, size: Size, count: int) -> Scene:
    """A video of `count` shapes, of which at least one moves, and none meets another."""
    height, width = size
    ux, uy = min(size) / width, min(size) / height
    while True:
        still = sample_scene(rng, size, count, 0.15)
        for _ in range(10):
            first = rng.randrange(count)
            shapes = tuple(
                _moved(rng, shape, ux, uy) if index == first or rng.random() < 0.35 else shape
                for index, shape in enumerate(still.shapes)
            )
            if _clear(shapes, 1 / ux, 1 / uy):
                return Scene(size, tuple(sorted(shapes, key=lambda s: s.x)), still.background)


def sample_still(rng: Random, size: Size, count: int) -> Scene:
    """A video of `count` shapes, perhaps none, in which nothing moves."""
    return sample_scene(rng, size, count, 0.15) if count else sample_empty(rng, size)


def _moved(rng: Random, shape: Shape, ux: float, uy: float) -> Shape:
    """The shape with a motion of its own: far enough to see, straight enough to name."""
    motion = rng.choice(MOTIONS)
    x, y, radius = shape.x, shape.y, shape.radius
    if motion in ("grows", "shrinks"):
        small, large = rng.uniform(0.12, 0.18), rng.uniform(0.27, 0.38)
        x, y = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)
        start, stop = (small, large) if motion == "grows" else (large, small)
        return replace(shape, x=x, y=y, radius=start, end=(x, y, stop), motion=motion)
    radius = min(radius, 0.2)
    mx, my = (radius + 0.01) * ux, (radius + 0.01) * uy
    drift = rng.uniform(-0.05, 0.05)
    across = motion in ("left to right", "right to left")
    margin = mx if across else my
    low = rng.uniform(margin, 0.3)
    high = low + rng.uniform(0.4, max(0.4, 1 - margin - low))
    start, stop = (low, high) if motion in ("left to right", "down") else (high, low)
    if across:
        y = min(max(y, my + 0.05), 0.95 - my)
        return replace(
            shape, x=start, y=y, radius=radius, end=(stop, y + drift, radius), motion=motion
        )
    x = min(max(x, mx + 0.05), 0.95 - mx)
    return replace(shape, x=x, y=start, radius=radius, end=(x + drift, stop, radius), motion=motion)


def _clear(shapes: tuple[Shape, ...], wide: float, high: float) -> bool:
    for step in range(6):
        placed = [shape.at(step / 5) for shape in shapes]
        for index, (ax, ay, ar) in enumerate(placed):
            for bx, by, br in placed[:index]:
                if math.hypot((ax - bx) * wide, (ay - by) * high) < (ar + br) * 1.05:
                    return False
    return True


def _fits(shapes: list[Shape], x: float, y: float, radius: float, wide: float, high: float) -> bool:
    for other in shapes:
        if abs(other.x - x) < ORDER_GAP:
            return False
        if math.hypot((other.x - x) * wide, (other.y - y) * high) < (other.radius + radius) * 1.08:
            return False
    return True
