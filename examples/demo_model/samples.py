"""Training samples: what a picture shows, and several questions about it at once.

A sample is one conversation prefix (its media) and questions that all stand right behind it, in a
buffer (`buffers.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from examples.demo_model import narrating
from examples.demo_model import questions as q
from examples.demo_model.phrases import vary
from examples.demo_model.scenes import (
    sample_empty,
    sample_scene,
    sample_size,
    sample_still,
    sample_video,
)
from examples.demo_model.world import COLOURS, CORNERS, Scene, Size

PREFIX = 3  # <|im_start|> user, space
SLOTS = 205  # rows of media at most: 198 of an image, 193 of a video of 48 frames
TEXT = 144  # length of the question buffer
FRAMES = 48
FEATURES = 19  # numbers that describe one shape to the renderer
SHAPES = 4

TURNS = ("second turn", "third turn", "fourth turn")
TEXT_SAMPLES = 64  # samples a batch of text alone
LABELS = (
    *q.IMAGE_KINDS,
    *q.EXTRA_KINDS,
    *q.MULTI_KINDS,
    *(f"images: {kind}" for kind in (*q.IMAGE_KINDS, "exists")),
    *q.VIDEO_KINDS,
    *(f"video: {kind}" for kind in ("list", "count", "colour", "shape")),
    *narrating.TOLD_KINDS,
    *TURNS,
)
LABEL = {name: index for index, name in enumerate(LABELS)}


@dataclass(frozen=True)
class Group:
    """Samples of a batch that have the same number of tile slots."""

    name: str
    media: str  # "image", "images" or "video"
    tiles: int
    count: int  # samples a batch
    exact: int  # of them drawn with Pillow and cut by the package itself

    @property
    def pictures(self) -> int:
        return 4 if self.media == "images" else 1


GROUPS = (
    Group("small", "image", 10, 64, 14),
    Group("middle", "image", 19, 100, 24),
    Group("large", "image", 37, 112, 28),
    Group("several", "images", 4, 88, 22),
    Group("short", "video", 8, 64, 16),
    Group("long", "video", FRAMES, 40, 8),
)


@dataclass(frozen=True)
class Medium:
    """The pictures of one sample: one, several, or a video with the times of its frames."""

    scenes: tuple[Scene, ...]
    times: tuple[float, ...] = ()

    @property
    def video(self) -> bool:
        return bool(self.times)


def sample_medium(
    rng: Random, group: Group, size: Size | None, most: int, largest: int = 1200
) -> Medium:
    """Pictures for one sample of a group.

    size : of an image alone; `largest` is the longest side of others, `most` the most shapes.
    """
    if group.media == "image":
        assert size is not None
        if rng.random() < 0.05:
            return Medium((sample_empty(rng, size),))
        count = rng.choices((1, 2, 3, 4)[:most], (3, 5, 6, 6)[:most])[0]
        return Medium((sample_scene(rng, size, count),))
    if group.media == "images":
        number = 0 if rng.random() < 0.03 else rng.randint(2, 4)
        counts = rng.choices((1, 2, 3)[:most], (5, 4, 2)[:most], k=number)
        sizes = [sample_size(rng, 64, largest, 2.0) for _ in counts]
        scenes = (sample_scene(rng, s, c, 0.18) for s, c in zip(sizes, counts, strict=True))
        return Medium(tuple(scenes))
    count = rng.choices((1, 2, 3)[:most], (5, 4, 2)[:most])[0]
    size = sample_size(rng, 64, largest, 16 / 9)
    low, high = (2, 8) if group.tiles <= 8 else (9, group.tiles)
    pick = rng.random()
    if pick < 0.12:
        scene = sample_still(rng, size, count if pick < 0.09 else 0)
        low = 1 if low == 2 else low
    else:
        scene = sample_video(rng, size, count)
    return Medium((scene,), frame_times(rng, rng.randint(low, high)))


def frame_times(rng: Random, frames: int) -> tuple[float, ...]:
    """How far everything has moved at each frame, 0 to 1.

    Evenly or nearly so; often only a part is shown, or it is still for a while at either end.
    """
    ease = rng.uniform(0.8, 1.25) if rng.random() < 0.3 else 1.0
    shares = ((index / max(1, frames - 1)) ** ease for index in range(frames))
    pick = rng.random()
    first, last = rng.uniform(0, 0.25), rng.uniform(0.75, 1)
    if pick < 0.25:
        return tuple(first + (last - first) * share for share in shares)
    if pick < 0.45:
        return tuple(min(1.0, max(0.0, (share - first) / (last - first))) for share in shares)
    return tuple(shares)


def ask(rng: Random, medium: Medium) -> list[tuple[str, str, str]]:
    """Questions (label, question, answer) about a medium, the most informative first."""
    found: list[tuple[str, q.Turn | None]] = []
    if medium.video:
        scene = medium.scenes[0]
        if not scene.shapes:
            found += [("", narrating.ask_empty(rng))]
            found += [("", q.ask_empty(rng, scene)) for _ in range(3)]
            found = [
                (head, turn and (turn[0], q.of_video(turn[1]), turn[2])) for head, turn in found
            ]
        else:
            found.append(("", narrating.ask_segment(rng, scene)))
            found += [("", q.ask_video(rng, scene, "motion")) for _ in range(2)]
            kinds = rng.sample(("list", "count", "colour", "shape"), 3)
            found += [("video: ", q.ask_video(rng, scene, kind)) for kind in kinds]
    elif not medium.scenes:
        found += [("", q.ask_no_image(rng)) for _ in range(2)]
    elif len(medium.scenes) == 1:
        scene = medium.scenes[0]
        if not scene.shapes:
            found += [("", q.ask_empty(rng, scene)) for _ in range(6)]
        else:
            kinds = [*q.IMAGE_KINDS, *rng.sample(("exists", "absent", "number"), 1)]
            kinds += rng.sample(("colour", "shape", "where", "where"), 2)
            found += [("", q.ask_picture(rng, scene, kind)) for kind in kinds]
    else:
        scenes = medium.scenes
        found += [("", q.ask_images(rng, scenes, "which image")) for _ in range(3)]
        if sum(len(scene.shapes) for scene in scenes) <= 6 and rng.random() < 0.5:
            found.append(("", q.ask_images(rng, scenes, "each image")))
        if rng.random() < 0.2:
            found.append(("", q.ask_images(rng, scenes, "images")))
        kinds = rng.sample((*q.IMAGE_KINDS, "exists"), 5)
        found += [("images: ", q.ask_images(rng, scenes, kind)) for kind in kinds]
    if rng.random() < 0.15:
        found.insert(rng.randrange(3), ("", q.ask_off_topic(rng)))
    return [(head + turn[0], vary(rng, turn[1]), turn[2]) for head, turn in found if turn]


def ask_nothing(rng: Random) -> list[tuple[str, str, str]]:
    """Short questions without anything to look at."""
    turns = [q.ask_off_topic(rng) if rng.random() < 0.6 else q.ask_no_image(rng) for _ in range(6)]
    return [(kind, vary(rng, question), answer) for kind, question, answer in turns]


def scene_numbers(scene: Scene) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(SHAPES, FEATURES) and (11,): the scene in pixels, as `rendering.py` reads it."""
    high, wide = scene.size
    unit = min(scene.size)
    shapes = np.zeros((SHAPES, FEATURES), np.float32)
    for row, shape in zip(shapes, scene.shapes, strict=False):
        points = CORNERS[shape.kind][0]
        half = math.pi / points
        ex, ey = shape.inner * math.cos(half) - 1, shape.inner * math.sin(half)
        length = math.hypot(ex, ey)
        x, y, radius = shape.at(1.0)
        row[:] = (
            *(shape.x * wide, shape.y * high, shape.radius * unit),
            *(x * wide, y * high, radius * unit),
            *(math.cos(shape.angle), math.sin(shape.angle), half, ex / length, ey / length),
            *(shape.stretch, *shape.rgb, 1.0),
            *(float(shape.kind == "circle"), list(CORNERS).index(shape.kind) + 1),
            list(COLOURS).index(shape.colour) + 1,
        )
    back = scene.background
    return shapes, np.asarray(
        (*back.first, *back.second, *back.direction, back.noise, wide, high), np.float32
    )
