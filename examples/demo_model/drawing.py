"""Scenes drawn with Pillow, as a person's program would draw them: aliased or anti-aliased."""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from examples.demo_model.world import CORNERS, Background, Scene, Shape, Size

Pixels = NDArray[np.uint8]
_FINE = 4  # samples per pixel and axis of an anti-aliased edge


@lru_cache(maxsize=1)
def _noise() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((517, 523, 3), np.float32)


def paint_background(background: Background, size: Size, rng: Random) -> Pixels:
    """uint8 (height, width, 3)."""
    high, wide = size
    if background.texture is not None:
        return _texture(background.texture, size)
    plain = background.first == background.second
    if plain and not background.noise:
        return np.broadcast_to(np.asarray(background.first, np.uint8), (high, wide, 3)).copy()
    first, second = (np.asarray(c, np.float32) for c in (background.first, background.second))
    dx, dy = background.direction
    x = (np.arange(wide, dtype=np.float32) + 0.5) / wide - 0.5
    y = (np.arange(high, dtype=np.float32) + 0.5) / high - 0.5
    step = second - first
    across = first + step * (0.5 + dx * x)[:, None]  # (wide, 3)
    canvas = across[None] + (step * (dy * y)[:, None])[:, None]  # (high, wide, 3)
    if background.noise:
        noise = _noise()
        repeats = (-(-high // noise.shape[0]) + 1, -(-wide // noise.shape[1]) + 1, 1)
        top, left = rng.randrange(noise.shape[0]), rng.randrange(noise.shape[1])
        block = np.tile(noise, repeats) if max(repeats[:2]) > 1 else noise
        canvas += block[top : top + high, left : left + wide] * np.float32(background.noise)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _texture(seed: int, size: Size) -> Pixels:
    """Clouds, and often clouds of two kinds with ragged borders: as uneven as a photograph."""
    rng = np.random.default_rng(seed)
    first = _clouds(rng, size)
    if rng.random() < 0.6:
        second, border = _clouds(rng, size), _clouds(rng, size)[..., :1]
        first = np.where(border > rng.integers(90, 166), first, second)
    if rng.random() < 0.5:
        noise = rng.standard_normal(first.shape, np.float32) * rng.uniform(2, 20)
        first = np.clip(np.rint(first + noise), 0, 255).astype(np.uint8)
    return first


def _clouds(rng: np.random.Generator, size: Size) -> Pixels:
    """Waves of every length, the long ones the highest."""
    fall, grey = rng.uniform(0.4, 0.9), rng.uniform(0.2, 1)
    canvas = np.zeros((*size, 3), np.float32) + rng.uniform(-40, 40, 3).astype(np.float32)
    height = rng.uniform(60, 130)
    for power in range(1, 7):
        cells = (min(2**power, size[0]), min(2**power, size[1]))
        wave = (
            rng.standard_normal((*cells, 3)) * (1 - grey) + rng.standard_normal((*cells, 1)) * grey
        )
        levels = np.clip(128 + 50 * wave, 0, 255).astype(np.uint8)
        spread = Image.fromarray(levels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        canvas += (np.asarray(spread, np.float32) - 128) * (height / 50)
        height *= fall
    return np.clip(np.rint(canvas + 128), 0, 255).astype(np.uint8)


def outline(shape: Shape, size: Size, time: float = 0.0) -> list[tuple[float, float]]:
    """Corners (x, y) in pixels; of a circle, two corners of the square around it."""
    x, y, radius = shape.at(time)
    x, y, radius = x * size[1], y * size[0], radius * min(size)
    points, _ = CORNERS[shape.kind]
    if shape.kind == "circle":
        return [(x - radius, y - radius), (x + radius, y + radius)]
    corners = []
    sin, cos = math.sin(shape.angle), math.cos(shape.angle)
    for index in range(2 * points):
        angle = index * math.pi / points
        length = radius * (shape.inner if index % 2 else 1.0)
        u, v = length * math.sin(angle) * shape.stretch, -length * math.cos(angle)
        corners.append((x + u * cos - v * sin, y + u * sin + v * cos))
    return corners


def _draw(image: Image.Image, shape: Shape, size: Size, time: float, smooth: bool) -> None:
    corners = outline(shape, size, time)
    colour = tuple(round(v) for v in shape.rgb)
    if not smooth:
        # Pillow's pixel centres are whole numbers, ours lie half a pixel on.
        points = [(x - 0.5, y - 0.5) for x, y in corners]
        draw = ImageDraw.Draw(image)
        draw.ellipse(points, fill=colour) if shape.kind == "circle" else draw.polygon(
            points, colour
        )
        return
    left = math.floor(min(x for x, _ in corners)) - 1
    top = math.floor(min(y for _, y in corners)) - 1
    wide = math.ceil(max(x for x, _ in corners)) + 1 - left
    high = math.ceil(max(y for _, y in corners)) + 1 - top
    fine = _FINE if max(wide, high) <= 400 else 2
    mask = Image.new("L", (wide * fine, high * fine), 0)
    points = [((x - left) * fine - 0.5, (y - top) * fine - 0.5) for x, y in corners]
    draw = ImageDraw.Draw(mask)
    draw.ellipse(points, fill=255) if shape.kind == "circle" else draw.polygon(points, 255)
    image.paste(colour, (left, top), mask.reduce(fine))


def draw_scene(scene: Scene, rng: Random, time: float = 0.0, smooth: bool = False) -> Image.Image:
    """The picture, or the frame at `time` (0 to 1) of a video; RGB.

    smooth : anti-aliased edges; without, a pixel belongs to a shape or does not.
    """
    image = Image.fromarray(paint_background(scene.background, scene.size, rng))
    for shape in scene.shapes:
        _draw(image, shape, scene.size, time, smooth)
    return image


def through_file(frames: list[Image.Image], rng: Random) -> list[Image.Image]:
    """What is left of frames after a video file: scaled, compressed, or few colours; or all."""
    pick = rng.random()
    if rng.random() < 0.3:
        share = rng.uniform(0.4, 0.9)
        wide, high = (max(32, round(side * share)) for side in frames[0].size)
        frames = [frame.resize((wide, high), Image.Resampling.BILINEAR) for frame in frames]
    if pick < 0.35:
        quality = rng.randint(30, 90)
        return [through_jpeg(frame, quality) for frame in frames]
    if pick < 0.42:
        colours = rng.choice((32, 64, 128, 255))
        method = Image.Quantize.FASTOCTREE
        return [frame.quantize(colours, method).convert("RGB") for frame in frames]
    if pick < 0.52:
        noise = _noise()[: frames[0].height, : frames[0].width] if rng.random() < 0.6 else None
        return [_to_332(frame, noise) for frame in frames]
    return frames


def _to_332(frame: Image.Image, noise: NDArray[np.float32] | None) -> Image.Image:
    """The 256 fixed colours of simple GIF writers, dithered where there is noise for it."""
    steps = 255 / np.asarray((7, 7, 3), np.float32)
    levels = np.asarray(frame, np.float32) / steps
    if noise is not None:
        levels[: noise.shape[0], : noise.shape[1]] += 0.3 * noise
    return Image.fromarray(np.clip(np.rint(levels) * steps, 0, 255).astype(np.uint8))


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """What is left of a picture after a JPEG file."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")
