# pyright: reportUnknownMemberType=false
"""From uint8 tiles to pixel values, and from the features of tiles to the embeddings that the
language model reads.

Follows transformers' ``pack_image_features``, ``get_video_features`` and ``apply_pooling``
(modeling_llava_onevision.py); for settings that it does not have, the original code's
``prepare_inputs_labels_for_multimodal`` and ``get_2dPool`` (LLaVA-NeXT, llava/model/llava_arch.py).
"""

from math import isqrt

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_onevision.media.anyres import Packing, VideoPacking


def normalize(tiles: NDArray[np.uint8], normalization: NDArray[np.float32]) -> mx.array:
    """Pixel values, float32 (tiles, S, S, 3), of uint8 tiles of the same shape.

    normalization : (256, 3), the pixel value of each level in each channel: a look-up gives the
        same values on every device.
    """
    levels = mx.array(tiles).astype(mx.int32) * 3 + mx.arange(3)
    return mx.array(normalization.reshape(-1))[levels]


def pack_image(features: mx.array, packing: Packing, newline: mx.array | None) -> mx.array:
    """One tiled image's embeddings, (packing.tokens, D): the base tile's, then the grid's.

    features : (1 + rows * columns, patches, D), the base tile first, then row by row.
    newline : (D,), where ``packing`` has newlines.
    """
    (grid_rows, grid_cols), n = packing.grid, packing.patches
    D = features.shape[-1]
    top, bottom, left, right = packing.box
    if packing.merge == "flat":
        tiles = features[1:]
        if packing.interpolated:
            side = packing.shape[0] // grid_rows
            tiles = interpolate(tiles.reshape(-1, n, n, D), side, side)
        return mx.concatenate([features[0], tiles.reshape(-1, D)])
    grid = features[1:].reshape(grid_rows, grid_cols, n, n, D)
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(grid_rows * n, grid_cols * n, D)
    grid = grid[top:bottom, left:right]  # without what came from padding
    if packing.interpolated:
        grid = interpolate(grid, *packing.shape)
    if packing.merge == "spatial_unpad":
        grid = _with_newlines(grid, newline)
    return mx.concatenate([features[0], grid.reshape(-1, D)])


def pack_tile(features: mx.array, newline: mx.array | None) -> mx.array:
    """An untiled image's embeddings: those of its one tile (1, patches, D), (patches, D), and the
    newline (D,) behind them where the model has one.
    """
    return features[0] if newline is None else _with_newlines(features[:1], newline)


def pack_video(frames: mx.array, position: str, newline: mx.array | None) -> mx.array:
    """A video's embeddings, (tokens, D): its frames' and newlines.

    frames : (frames, side * side, D), as :func:`pool_frames` makes them.
    position : ``newline`` of :class:`~mlx_onevision.media.anyres.VideoPacking`.
    newline : (D,), where there is to be any.
    """
    patches, D = frames.shape[1:]
    if position == "no_token":
        return frames.reshape(-1, D)
    row = {"grid": isqrt(patches), "frame": patches}.get(position, len(frames) * patches)
    return _with_newlines(frames.reshape(-1, row, D), newline)


def _with_newlines(rows: mx.array, newline: mx.array | None) -> mx.array:
    """Rows (n, length, D) with a newline (D,) after each, (n * (length + 1), D)."""
    assert newline is not None, "a packing with newlines for a model without"
    n, length, D = rows.shape
    newlines = mx.broadcast_to(newline.astype(rows.dtype), (n, 1, D))
    return mx.concatenate([rows, newlines], axis=1).reshape(n * (length + 1), D)


def pool_frames(features: mx.array, packing: VideoPacking) -> mx.array:
    """A video's frames (n, patches, D), pooled by two along both axes: (n, side * side, D), where
    side is ``packing.side``.
    """
    frames, _, D = features.shape
    n, side = packing.patches, packing.side
    grid = features.reshape(frames, n, n, D)
    if packing.pooling != "bilinear":
        half = n // 2
        cells = grid[:, : 2 * half, : 2 * half].reshape(frames, half, 2, half, 2, D)
        if packing.pooling == "max":
            grid = cells.max(axis=(2, 4))
        else:
            grid = cells.astype(mx.float32).mean(axis=(2, 4)).astype(features.dtype)
    if grid.shape[1] != side:
        grid = interpolate(grid, side, side)
    return grid.reshape(frames, -1, D)


def interpolate(grid: mx.array, rows: int, cols: int) -> mx.array:
    """Bilinear interpolation, as torch's ``interpolate(align_corners=False, antialias=False)``.

    grid : (..., H, W, D), of any type; computed in float32.

    Returns (..., rows, cols, D), of the type of ``grid``.
    """
    dtype = grid.dtype
    left, right, x = _neighbours(grid.shape[-2], cols)
    x = x[:, None]
    first, second = mx.take(grid, left, axis=-2), mx.take(grid, right, axis=-2)
    grid = (1 - x) * first.astype(mx.float32) + x * second.astype(mx.float32)
    upper, lower, y = _neighbours(grid.shape[-3], rows)
    y = y[:, None, None]
    first, second = mx.take(grid, upper, axis=-3), mx.take(grid, lower, axis=-3)
    return ((1 - y) * first + y * second).astype(dtype)


def _neighbours(length: int, wanted: int) -> tuple[mx.array, mx.array, mx.array]:
    """The two source indices of each of ``wanted`` target indices, int32 (wanted,), and the weight
    of the second, float32 (wanted,); computed in float32 as torch does.
    """
    scale = np.float32(length) / np.float32(wanted)
    position = scale * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    first = position.astype(np.int32)
    second = np.minimum(first + 1, length - 1)
    return mx.array(first), mx.array(second), mx.array(position - first.astype(np.float32))
