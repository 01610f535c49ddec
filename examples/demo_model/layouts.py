"""Every packing that training uses, stacked and numbered, so that a batch names them by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from examples.demo_model.packing import (
    NO_ROWS,
    Rows,
    frame_window,
    image_rows,
    images_rows,
    plan,
    square_window,
    tile_windows,
    video_rows,
)
from examples.demo_model.samples import FRAMES, GROUPS, SLOTS, Group, Medium
from examples.demo_model.scenes import sample_size
from examples.demo_model.world import Size


@dataclass(frozen=True)
class Layouts:
    """Packings of images, of several images and of videos, in this order."""

    sizes: list[Size]  # of the images, in the order of their numbers
    groups: dict[str, range]  # group name -> numbers of its images
    index: NDArray[np.int16]  # (n, SLOTS, 4)
    weight: NDArray[np.float32]  # (n, SLOTS, 4)
    newline: NDArray[np.bool_]  # (n, SLOTS)
    rows: NDArray[np.int16]  # (n,)
    windows: NDArray[np.float32]  # (images, 37, 5)
    first_images: int  # number of the packing of no image; then one image, two...
    first_video: int  # number of the packing of a video of no frames; then one frame, two...


def image_group(size: Size) -> Group:
    """The group of an image alone."""
    tiles = plan(size).tiles
    return next(g for g in GROUPS if g.media == "image" and g.tiles >= tiles)


def make_layouts(seed: int, images: int = 1000) -> Layouts:
    """`images` sizes for each image group, and every number of images and of frames."""
    rng = Random(seed)
    names = [g.name for g in GROUPS if g.media == "image"]
    found: dict[str, list[Size]] = {name: [] for name in names}
    while any(len(sizes) < images for sizes in found.values()):
        size = sample_size(rng)
        sizes = found[image_group(size).name]
        if len(sizes) < images:
            sizes.append(size)
    sizes = [size for name in names for size in found[name]]
    groups = {name: range(i * images, (i + 1) * images) for i, name in enumerate(names)}
    windows = np.zeros((len(sizes), 37, 5), np.float32)
    rows: list[Rows] = []
    for number, size in enumerate(sizes):
        packing = plan(size)
        cut = tile_windows(size, packing)
        windows[number, : len(cut)] = cut
        rows.append(image_rows(packing))
    first_images = len(rows)
    rows += [images_rows(n) for n in range(5)]
    first_video = len(rows)
    rows += [NO_ROWS, *(video_rows(n) for n in range(1, FRAMES + 1))]
    return Layouts(
        sizes,
        groups,
        *stack_rows(rows),
        windows=windows,
        first_images=first_images,
        first_video=first_video,
    )


def stack_rows(
    rows: Sequence[Rows],
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.bool_], NDArray[np.int16]]:
    """`index`, `weight`, `newline` and `rows` of :class:`Layouts`."""
    index = np.zeros((len(rows), SLOTS, 4), np.int16)
    weight = np.zeros((len(rows), SLOTS, 4), np.float32)
    newline = np.zeros((len(rows), SLOTS), bool)
    for number, part in enumerate(rows):
        count = len(part.index)
        index[number, :count] = part.index
        weight[number, :count] = part.weight
        newline[number, :count] = part.newline
    return index, weight, newline, np.asarray([len(part.index) for part in rows], np.int16)


def layout_number(layouts: Layouts, group: Group, medium: Medium, image: int = 0) -> int:
    """The number of the packing of a medium; `image` is the one of its size."""
    if group.media == "image":
        return image
    if group.media == "images":
        return layouts.first_images + len(medium.scenes)
    return layouts.first_video + len(medium.times)


def medium_rows(medium: Medium) -> Rows:
    """The packing of any medium."""
    if medium.video:
        return video_rows(len(medium.times))
    if len(medium.scenes) == 1:
        return image_rows(plan(medium.scenes[0].size))
    return images_rows(len(medium.scenes))


def medium_window(medium: Medium, index: int) -> NDArray[np.float32]:
    """(5,): the window of one picture of several, or of a video's frames."""
    scene = medium.scenes[index]
    return (frame_window(scene.size) if medium.video else square_window(scene.size))[0]
