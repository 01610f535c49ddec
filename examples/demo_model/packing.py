"""Which tile tokens make each row that the language model reads: four indices and four weights.

The geometry is the package's own (`media.anyres`); this turns it into arrays, so that the
packing of a whole batch is one matrix product, whose backward pass is one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.media.anyres import Packing, Size, VideoPacking, fitted_size, plan_packing

TILE = 56
PATCH = 14
PATCHES = TILE // PATCH  # tokens along one side of a tile
TOKENS = PATCHES**2
MAX_TILES = 9
GRIDS: tuple[Size, ...] = tuple((TILE * r, TILE * c) for r in range(1, 7) for c in range(1, 7))
PADDING = 127.0  # of untiled images; the padding around a grid is black
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Packed rows: (n, 4) indices into the sample's tile tokens, weights, and newlines."""

    index: NDArray[np.int16]
    weight: Floats
    newline: NDArray[np.bool_]  # (n,), rows that are the newline instead


NO_ROWS = Rows(np.zeros((0, 4), np.int16), np.zeros((0, 4), np.float32), np.zeros(0, bool))


def plan(size: Size) -> Packing:
    """The packing of a tiled image of `size`."""
    return plan_packing(size, GRIDS, TILE, PATCHES, MAX_TILES)


def _linear(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Neighbours and the second one's share, bilinear without antialiasing, corners not aligned."""
    at = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, source - 1), (at - low).astype(np.float32)


def _grid_rows(box: tuple[int, int, int, int], shape: Size, cols: int, first: int) -> Rows:
    """A box of stitched tokens, thinned to `shape`, with a newline at each row's end."""
    top, bottom, left, right = box
    y0, y1, ly = _linear(bottom - top, shape[0])
    x0, x1, lx = _linear(right - left, shape[1])

    def token(y: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.int64]:
        y, x = (y + top)[:, None], (x + left)[None, :]
        tile = first + (y // PATCHES) * cols + x // PATCHES
        return tile * TOKENS + (y % PATCHES) * PATCHES + x % PATCHES

    index = np.stack([token(y0, x0), token(y0, x1), token(y1, x0), token(y1, x1)], -1)
    wy, wx = np.stack([1 - ly, ly], -1), np.stack([1 - lx, lx], -1)
    weight = (wy[:, None, :, None] * wx[None, :, None, :]).reshape(*shape, 4)
    last = np.zeros((shape[0], 1, 4))  # the column of the newlines, which has no weight
    newline = np.zeros((shape[0], shape[1] + 1), bool)
    newline[:, -1] = True
    return Rows(
        np.concatenate([index, last], 1).reshape(-1, 4).astype(np.int16),
        np.concatenate([weight, last], 1).reshape(-1, 4).astype(np.float32),
        newline.reshape(-1),
    )


def join(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.newline for part in parts]),
    )


def _copied(first: int, newline: bool) -> Rows:
    """One whole tile, perhaps with a newline behind it."""
    count = TOKENS + newline
    index, weight = np.zeros((count, 4), np.int16), np.zeros((count, 4), np.float32)
    index[:TOKENS, 0] = np.arange(TOKENS) + first * TOKENS
    weight[:TOKENS, 0] = 1
    mark = np.zeros(count, bool)
    mark[TOKENS:] = True
    return Rows(index, weight, mark)


def image_rows(packing: Packing) -> Rows:
    """Rows of one tiled image."""
    grid = _grid_rows(packing.box, packing.shape, packing.grid[1], 1)
    return join([_copied(0, False), grid])


def images_rows(count: int) -> Rows:
    """Rows of several untiled images, or of none."""
    if not count:
        return NO_ROWS
    return join([_copied(index, True) for index in range(count)])


def video_rows(frames: int) -> Rows:
    """Rows of a video: each frame pooled, one newline at the very end."""
    side = VideoPacking(PATCHES).side
    box = (0, PATCHES, 0, PATCHES)
    parts = [_grid_rows(box, (side, side), 1, frame) for frame in range(frames)]
    parts = [Rows(p.index[~p.newline], p.weight[~p.newline], p.newline[~p.newline]) for p in parts]
    end = Rows(np.zeros((1, 4), np.int16), np.zeros((1, 4), np.float32), np.ones(1, bool))
    return join([*parts, end])


def tile_windows(size: Size, packing: Packing) -> Floats:
    """(tiles, 5): x0, dx, y0, dy, fill; tile pixel (u, v) looks at (x0 + dx*u, y0 + dy*v).

    u, v are pixel centres (0.5 is the first); outside of the picture the level is `fill`.
    """
    high, wide = size
    rows, cols = packing.grid
    fit_high, fit_wide = fitted_size(size, (rows * TILE, cols * TILE))
    dy, dx = high / fit_high, wide / fit_wide
    top, left = (rows * TILE - fit_high) // 2, (cols * TILE - fit_wide) // 2
    windows = [(0.0, wide / TILE, 0.0, high / TILE, 0.0)]
    for row in range(rows):
        for col in range(cols):
            windows.append(((col * TILE - left) * dx, dx, (row * TILE - top) * dy, dy, 0.0))
    return np.asarray(windows, np.float32)


def square_window(size: Size) -> Floats:
    """(1, 5): the one tile of an untiled image, padded to a square."""
    high, wide = size
    side = max(size)
    scale = side / TILE
    x0, y0 = -((side - wide) // 2), -((side - high) // 2)
    return np.asarray([(x0, scale, y0, scale, PADDING)], np.float32)


def frame_window(size: Size) -> Floats:
    """(1, 5): a video frame, stretched onto its tile."""
    return np.asarray([(0.0, size[1] / TILE, 0.0, size[0] / TILE, 0.0)], np.float32)
