"""Colours of a small image: histograms of its quarters, and the mean colours of its blocks.

A colour is a brightness and two differences from it. numpy only.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import RequestError

Pixels = NDArray[np.uint8]
"""RGB (h, w, 3)."""
Histogram = NDArray[np.float32]
"""(cells, bins), see :func:`histogram`."""

GRID = 2  # cells a side
BINS = (5, 7, 7)  # of brightness and of the two colour differences
FARTHEST = 96.0  # colour differences beyond this share the last bin
SIDE = 64  # pixels of an image that count, across and down
BLOCKS = 16  # across and down, of whose mean colours consecutive frames are compared

# BT.601: brightness, blue and red minus brightness; 0 to 255, and -128 to 127 around grey.
_COLOURS = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_LOWEST = np.array([0.0, -FARTHEST, -FARTHEST], np.float32)
_SPACING = np.array([255.0, 2 * FARTHEST, 2 * FARTHEST], np.float32) / (np.array(BINS) - 1)


def histogram(image: NDArray[np.uint8]) -> Histogram:
    """The colours of each cell of an image, float32 (cells, bins); each cell's sum is 1.

    A cell is a quarter of the image, so that a new arrangement of the same colours counts as well.
    A pixel is shared out between neighbouring bins: noise then moves little, whatever bin edge it
    is near.

    Raises:
        RequestError: for anything but uint8 (h, w, 3).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise RequestError(f"a frame is uint8 (h, w, 3), not {image.dtype} {image.shape}")
    high, wide = image.shape[:2]
    if min(high, wide) < GRID:
        raise RequestError(f"a frame has at least {GRID}x{GRID} pixels, not {wide}x{high}")
    pixels = image[:: ceil(high / SIDE), :: ceil(wide / SIDE)].astype(np.float32)
    high, wide = pixels.shape[:2]
    bins = np.array(BINS)
    place = (pixels.reshape(-1, 3) @ _COLOURS.T - _LOWEST) / _SPACING
    place = np.clip(place, 0, bins - 1)
    below = np.minimum(place.astype(np.int64), bins - 2)
    above = place - below  # each pixel's share in the upper neighbour
    rows, cols = (np.array([k * GRID // n for k in range(n)]) for n in (high, wide))
    cell = (rows[:, None] * GRID + cols).reshape(-1)
    total = np.zeros(GRID * GRID * int(bins.prod()))
    for corner in np.ndindex(2, 2, 2):
        y, b, r = (below + corner).T
        weights = np.where(np.array(corner, bool), above, 1 - above).prod(axis=1)
        flat = ((cell * BINS[0] + y) * BINS[1] + b) * BINS[2] + r
        total += np.bincount(flat, weights, minlength=total.size)
    cells = total.reshape(GRID * GRID, -1)
    return (cells / cells.sum(axis=1, keepdims=True)).astype(np.float32)


def distance(one: Histogram, other: Histogram) -> float:
    """The part of the pixels that changed colour, 0 to 1."""
    return float(np.abs(one - other).sum() / (2 * len(one)))


def block_means(image: Pixels) -> NDArray[np.float32]:
    """The mean colours of an image's blocks, float32 (blocks, 3)."""
    means = image.astype(np.float32)
    for axis, length in enumerate(image.shape[:2]):
        edges = np.unique(np.arange(BLOCKS) * length // BLOCKS)
        sizes = np.diff([*edges, length]).astype(np.float32)
        shape = (-1, 1, 1) if axis == 0 else (-1, 1)
        means = np.add.reduceat(means, edges, axis) / sizes.reshape(shape)
    return (means @ _COLOURS.T).reshape(-1, 3)
