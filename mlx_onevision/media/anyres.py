"""Which grid of tiles an image gets, and which of its tokens the language model reads: AnyRes of
LLaVA-OneVision (arXiv 2408.03326, section 3.2).

Follows transformers: ``select_best_resolution`` (image_processing_utils.py), and ``unpad_image``
and ``pack_image_features`` (modeling_llava_onevision.py); for settings that it does not have, the
original code (LLaVA-NeXT, llava/model/llava_arch.py). Processor and model both ask
:func:`plan_packing` and :class:`VideoPacking`.

Every size is (height, width). All quotients are float64 and every comparison is as strict as the
reference's: some hundred sizes sit exactly on an edge, where ``H * (w / W)`` and ``H * w / W``
differ. The functions in the plural take and return int64 arrays, one entry an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import MediaError

Size = tuple[int, int]
Integers = NDArray[np.int64]

# A grid is thinned out where it exceeds max_tiles tiles by more than this factor along each axis.
_THIN_BEYOND = 1.1


@dataclass(frozen=True)
class Packing:
    """How the features of one tiled image become the embeddings that the language model reads: the
    base tile's, and then those of the other tiles, stitched into one grid, without the rows or
    columns that came from padding, thinned out if too many, with a newline after each row.

    grid : rows and columns of tiles, without the base tile. patches : tokens along a tile's side.
    box : (top, bottom, left, right), the half-open ranges kept of the stitched token grid.
    shape : rows and columns of tokens after thinning, without the newlines.
    merge : ``mm_patch_merge_type``. ``spatial`` keeps the whole grid and has no newlines, nor has
        ``flat``, whose tiles come one after another.
    """

    grid: Size
    patches: int
    box: tuple[int, int, int, int]
    shape: Size
    merge: str = "spatial_unpad"

    @property
    def tiles(self) -> int:
        """The base tile included."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Embeddings of the packed image: the base tile's, the grid's, and any newlines."""
        rows, cols = self.shape
        newlines = rows if self.merge == "spatial_unpad" else 0
        return self.patches**2 + rows * cols + newlines

    @property
    def interpolated(self) -> bool:
        """Whether the kept box is thinned out (bilinearly) to ``shape``."""
        top, bottom, left, right = self.box
        return self.shape != (bottom - top, right - left)


class Packings(NamedTuple):
    """The fields of :class:`Packing` for n images: int64 (n, 2), rows and columns."""

    grid: Integers
    start: Integers  # of the box
    kept: Integers  # size of the box
    shape: Integers


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint (height, width) that keeps the most of an image's pixels; of several, the one
    that wastes the least; of those, the first. ``size`` is the image's, in pixels.
    """
    return pinpoints[int(best_resolutions([size[0]], [size[1]], pinpoints)[0])]


def best_resolutions(heights: ArrayLike, widths: ArrayLike, pinpoints: Sequence[Size]) -> Integers:
    """:func:`select_best_resolution` for arrays (n,): indices into ``pinpoints``, int64 (n,).

    Raises ValueError for no pinpoints, and for an image without pixels.
    """
    if not pinpoints:
        raise ValueError("image_grid_pinpoints must not be empty")
    high = np.asarray(heights, np.int64)
    wide = np.asarray(widths, np.int64)
    if min(high.min(initial=1), wide.min(initial=1)) < 1:
        raise ValueError("an image must have at least one pixel each way")
    grid = np.asarray(pinpoints, np.int64)[:, :, None]  # (pinpoints, 2, 1)
    scale = np.minimum(grid[:, 1] / wide, grid[:, 0] / high)
    # int() of the reference truncates, as does this cast.
    kept = (wide * scale).astype(np.int64) * (high * scale).astype(np.int64)
    kept = np.minimum(kept, wide * high)
    area = grid[:, 0] * grid[:, 1]
    # Most kept, then least wasted: of those that keep as much, the smaller area wastes less.
    # argmax takes the first of the best.
    return np.argmax(kept * (area.max() + 1) - area, axis=0)


def fitted_size(size: Size, resolution: Size) -> Size:
    """``size`` fitted into ``resolution``, its aspect ratio kept: ``get_patch_output_size`` of the
    reference (image_processing_utils.py), which rounds up where ``unpad_image`` rounds down.
    """
    (high, wide), (room_high, room_wide) = size, resolution
    scale_wide, scale_high = room_wide / wide, room_high / high
    if scale_wide < scale_high:
        return min(ceil(high * scale_wide), room_high), room_wide
    return room_high, min(ceil(wide * scale_high), room_wide)


def plan_packing(
    size: Size,
    pinpoints: Sequence[Size],
    image_size: int,
    patches: int,
    max_tiles: int | None,
    merge: str = "spatial_unpad",
) -> Packing:
    """The packing of one tiled image: ``pack_image_features`` of the reference.

    size : the image's own (height, width) in pixels, before any resize.
    image_size, patches : side of a tile in pixels and in tokens (384 and 27).
    max_tiles : the 9 of ``anyres_max_9``; None, as for ``anyres``, never thins out.
    merge : see :class:`Packing`.
    """
    if merge != "spatial_unpad":
        resolution = select_best_resolution(size, pinpoints)
        rows, cols = (edge // image_size for edge in resolution)
        shape = (rows * patches, cols * patches)
        return Packing((rows, cols), patches, (0, shape[0], 0, shape[1]), shape, merge)
    many = plan_packings([size[0]], [size[1]], pinpoints, image_size, patches, max_tiles)
    grid, (top, left), (rows, cols), shape = (field[0].tolist() for field in many)
    box = (top, top + rows, left, left + cols)
    return Packing((grid[0], grid[1]), patches, box, (shape[0], shape[1]))


def plan_packings(
    heights: ArrayLike,
    widths: ArrayLike,
    pinpoints: Sequence[Size],
    image_size: int,
    patches: int,
    max_tiles: int | None,
) -> Packings:
    """:func:`plan_packing` for arrays of heights and widths (n,)."""
    high = np.asarray(heights, np.int64)
    wide = np.asarray(widths, np.int64)
    grid = np.asarray(pinpoints, np.int64)[best_resolutions(high, wide, pinpoints)] // image_size
    stitched = grid * patches
    rows, cols = stitched.T

    # Only one axis was padded. An exact fit counts as padded left and right (by nothing, mostly).
    padded_above = wide / high > cols / rows
    top = np.where(padded_above, (rows - _whole(high * (cols / wide))) // 2, 0)
    left = np.where(padded_above, 0, (cols - _whole(wide * (rows / high))) // 2)
    start = np.stack([top, left], axis=1)
    kept = stitched - 2 * start

    if max_tiles is None:
        return Packings(grid, start, kept, kept)
    ratio = np.sqrt(kept.prod(axis=1) / (max_tiles * patches**2))
    # Where nothing is thinned, a strip may keep no tokens at all: no 0 // 0 for it.
    ratio = np.where(ratio > _THIN_BEYOND, ratio, 1.0)[:, None]
    return Packings(grid, start, kept, (kept // ratio).astype(np.int64))


def single_tile_tokens(patches: int, merge: str = "spatial_unpad") -> int:
    """Embeddings of an untiled image: its one tile's, and one newline where ``merge`` has any."""
    return patches**2 + (merge == "spatial_unpad")


def thinned(packing: Packing, share: float) -> Packing:
    """``packing`` with about this share of its grid's tokens: the grid is thinned out as
    LLaVA-OneVision's (arXiv 2408.03326, section 3.2) is where ``max_tiles`` asks for it, bilinearly
    and each row with its newline. The base tile stays whole. ``flat`` tiles are thinned one by one.
    """
    if share == 1 or 0 in packing.shape:
        return packing
    rows, cols = (max(1, round(length * sqrt(share))) for length in packing.shape)
    if packing.merge == "flat":
        side = max(1, round(packing.patches * sqrt(share)))
        rows, cols = packing.grid[0] * side, packing.grid[1] * side
    return replace(packing, shape=(rows, cols))


@dataclass(frozen=True)
class VideoPacking:
    """How the features of a video's frames become embeddings: pooled by two along both axes, and
    with newlines between them (``apply_pooling`` and ``get_video_features`` of the reference).

    patches : tokens along a tile's side. share : the part of a frame's tokens that is kept.
    pooling : ``mm_spatial_pool_mode``: "bilinear" rounds half of the side up, "average" and "max"
        leave the last row and column of an odd side out.
    newline : ``mm_newline_position``: one at the very end of the video ("one_token"), one after
        each frame, after each row of each frame ("grid"), or none ("no_token").
    """

    patches: int
    share: float = 1.0
    pooling: str = "bilinear"
    newline: str = "one_token"

    @classmethod
    def of(cls, config: OneVisionConfig, share: float = 1.0) -> VideoPacking:
        """How a model packs videos. Raises MediaError where the original code cannot."""
        newline = config.mm_newline_position
        if config.mm_patch_merge_type == "flat" or (
            newline == "one_token" and not config.has_newline
        ):
            newline = "no_token"
        if newline in ("grid", "frame") and not config.has_newline:
            raise MediaError(
                f"this model takes no videos: its mm_newline_position is {newline!r}, but with "
                f"mm_patch_merge_type {config.mm_patch_merge_type!r} it has no newline"
            )
        patches = config.vision_config.patches_per_side
        return cls(patches, share, config.mm_spatial_pool_mode, newline)

    @property
    def side(self) -> int:
        """Tokens along one side of a pooled frame."""
        whole = (self.patches + 1) // 2 if self.pooling == "bilinear" else self.patches // 2
        return max(1, round(whole * sqrt(self.share)))

    @property
    def frame_tokens(self) -> int:
        """Embeddings of one frame, with the newlines of each."""
        newlines = {"grid": self.side, "frame": 1}.get(self.newline, 0)
        return self.side**2 + newlines

    def tokens(self, frames: int) -> int:
        """Embeddings of a video of so many frames."""
        return frames * self.frame_tokens + (self.newline == "one_token")


def _whole(lengths: NDArray[np.float64]) -> Integers:
    """``int(round(length, 7))``. numpy's round agrees with Python's here: a length is n / side, so
    it is within rounding of a whole number or 1 / side away, and no side reaches 10 million.
    """
    return np.round(lengths, 7).astype(np.int64)
