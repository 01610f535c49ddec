"""Token geometry, held against the reference's own formulas, written down here a second time."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from hostile.sizes import cases
from hypothesis import given
from hypothesis import strategies as st

from mlx_onevision.media import anyres
from mlx_onevision.media.anyres import Size

TILE, PATCHES, MOST = 384, 27, 9
PINPOINTS = tuple((TILE * rows, TILE * cols) for rows in range(1, 7) for cols in range(1, 7))


def scalar_best(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """select_best_resolution, statement by statement."""
    high, wide = size
    best, best_kept, least_waste = (0, 0), 0, math.inf
    for to_high, to_wide in pinpoints:
        scale = min(to_wide / wide, to_high / high)
        kept = min(int(wide * scale) * int(high * scale), wide * high)
        waste = to_high * to_wide - kept
        if kept > best_kept or (kept == best_kept and waste < least_waste):
            best, best_kept, least_waste = (to_high, to_wide), kept, waste
    return best


def scalar_count(size: Size, pinpoints: tuple[Size, ...], tile: int, n: int, most: int) -> int:
    """The processor's _get_number_of_features."""
    best = scalar_best(size, pinpoints)
    high, wide = n * (best[0] // tile), n * (best[1] // tile)
    if size[1] / size[0] > wide / high:
        high -= (high - int(round(size[0] * (wide / size[1]), 7))) // 2 * 2
    else:
        wide -= (wide - int(round(size[1] * (high / size[0]), 7))) // 2 * 2
    ratio = math.sqrt(high * wide / (most * n**2))
    if ratio > 1.1:
        return n * n + int(high // ratio) * int(wide // ratio) + int(high // ratio)
    return n * n + high * wide + high


def scalar_rows(size: Size, pinpoints: tuple[Size, ...], tile: int, n: int, most: int) -> int:
    """The model's pack_image_features, on a grid whose tokens are all alike."""
    best = scalar_best(size, pinpoints)
    grid = np.broadcast_to(np.uint8(0), (n * (best[0] // tile), n * (best[1] // tile)))
    high, wide = grid.shape
    if size[1] / size[0] > wide / high:
        pad = (high - int(round(size[0] * (wide / size[1]), 7))) // 2
        grid = grid[pad : high - pad, :]
    else:
        pad = (wide - int(round(size[1] * (high / size[0]), 7))) // 2
        grid = grid[:, pad : wide - pad]
    high, wide = grid.shape
    ratio = math.sqrt(high * wide / (most * n**2))
    if ratio > 1.1:
        high, wide = int(high // ratio), int(wide // ratio)
    return n * n + high * (wide + 1)


def plan(size: Size) -> anyres.Packing:
    return anyres.plan_packing(size, PINPOINTS, TILE, PATCHES, MOST)


def counted(high: np.ndarray, wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The processor's counts for arrays of sizes, and where truncating would cut another box.

    One number stands for a pinpoint's rank: most kept, then least area, then first listed.
    """
    across = [TILE * cols / wide for cols in range(1, 7)]
    down = [TILE * rows / high for rows in range(1, 7)]
    rank = np.full(high.shape, -np.inf)
    for rows in range(1, 7):
        for cols in range(1, 7):
            scale = np.minimum(across[cols - 1], down[rows - 1])
            kept = np.minimum(np.floor(wide * scale) * np.floor(high * scale), wide * high)
            np.maximum(rank, kept * 4096 - rows * cols * 64 - 8 * rows - cols, out=rank)
    listed = (-rank % 64).astype(np.int64)  # 8 * rows + cols
    rows, cols = listed // 8 * PATCHES, listed % 8 * PATCHES
    above = wide / high > cols / rows
    room = np.where(above, rows, cols)
    length = np.where(above, high * (cols / wide), wide * (rows / high))
    cut = (room - np.floor(length + 5e-8)) // 2 * 2  # round(length, 7) is whole above k - 5e-8
    rows, cols = np.where(above, rows - cut, rows), np.where(above, cols, cols - cut)
    ratio = np.sqrt(rows * cols / (MOST * PATCHES**2))
    thin = ratio > 1.1
    rows = np.where(thin, np.floor_divide(rows, ratio), rows)
    cols = np.where(thin, np.floor_divide(cols, ratio), cols)
    return PATCHES**2 + rows * cols + rows, cut != (room - np.floor(length)) // 2 * 2


def test_count_equals_packed_rows_for_every_size() -> None:
    """1x1 to 2400x2400: the processor's formula gives what the plan's box and shape pack to. Quick:
    every width of some heights, those at the edges of tiles among them.
    """
    side = 2400
    wide = np.arange(1, side + 1)
    heights = set(random.Random(0).sample(range(1, side + 1), cases(400, side)))
    heights |= {1, side} | {TILE * n + by for n in range(1, 7) for by in (-1, 0, 1)}
    nasty: list[Size] = []
    for row in sorted(heights):
        high = np.full(side, row)
        count, moved = counted(high, wide)
        many = anyres.plan_packings(high, wide, PINPOINTS, TILE, PATCHES, MOST)
        # What the model does with a plan: cut the box out of the stitched grid, interpolate it to
        # the shape if that is another, put a newline behind each row and the base in front.
        assert (many.start * 2 + many.kept == many.grid * PATCHES).all()
        assert many.start.min() >= 0 and many.shape.min() >= 1
        assert (many.shape <= many.kept).all()
        assert (PATCHES**2 + many.shape[:, 0] * (many.shape[:, 1] + 1) == count).all()
        nasty += [(row, int(col)) for col in wide[moved]]
    # Where int(H * (w / W)) without the rounding would cut another box.
    assert len(nasty) == 154 or (len(heights) < side and len(nasty) >= 15)
    for size in nasty:
        assert plan(size).tokens == scalar_count(size, PINPOINTS, TILE, PATCHES, MOST)
        assert plan(size).tokens == scalar_rows(size, PINPOINTS, TILE, PATCHES, MOST)


def test_one_image_is_planned_as_the_reference_does() -> None:
    """Four thousand sizes, up to long strips, in five models' geometries."""
    chance = random.Random(0)
    for _ in range(4000):
        tile, n, most = chance.choice([(384, 27, 9), (384, 27, 4), (56, 4, 9), (336, 24, 1)])
        side = chance.choice([1, 4, 6])
        pinpoints = tuple((tile * r, tile * c) for r in range(1, side + 1) for c in range(1, 7))
        size = (int(10 ** chance.uniform(0, 4.5)), int(10 ** chance.uniform(0, 4.5)))
        packing = anyres.plan_packing(size, pinpoints, tile, n, most)
        case = (size, pinpoints, tile, n, most)
        best = scalar_best(size, pinpoints)
        assert anyres.select_best_resolution(size, pinpoints) == best, case
        assert packing.grid == (best[0] // tile, best[1] // tile), case
        assert packing.tokens == scalar_count(*case) == scalar_rows(*case), case
        top, bottom, left, right = packing.box
        kept = (bottom - top, right - left)
        assert packing.interpolated == (math.sqrt(kept[0] * kept[1] / (most * n * n)) > 1.1)


@pytest.mark.parametrize(
    ("size", "grid", "shape", "tokens"),
    [
        ((384, 384), (1, 1), (27, 27), 1485),
        ((1, 1), (1, 1), (27, 27), 1485),
        ((100, 100), (1, 1), (27, 27), 1485),
        ((480, 640), (2, 2), (40, 54), 2929),
        ((768, 768), (2, 2), (54, 54), 3699),
        ((899, 1024), (3, 3), (71, 81), 6551),
        ((1152, 1152), (3, 3), (81, 81), 7371),
        ((1080, 1920), (3, 5), (60, 108), 7269),
        ((2304, 2304), (6, 6), (81, 81), 7371),
        ((4000, 3000), (6, 5), (93, 70), 7332),
        ((300, 1200), (1, 4), (27, 108), 3672),
        ((1, 5000), (1, 1), (1, 27), 757),
        ((5000, 1), (1, 1), (27, 1), 783),
        ((30, 500), (1, 2), (3, 54), 894),
    ],
)
def test_known_sizes(size: Size, grid: Size, shape: Size, tokens: int) -> None:
    packing = plan(size)
    assert (packing.grid, packing.shape, packing.tokens) == (grid, shape, tokens)
    assert packing.tiles == 1 + grid[0] * grid[1]


def test_ties_keep_the_pinpoint_listed_first() -> None:
    """Equal in what they keep and waste: the order of the list decides."""
    assert anyres.select_best_resolution((500, 500), ((384, 768), (768, 384))) == (384, 768)
    assert anyres.select_best_resolution((500, 500), ((768, 384), (384, 768))) == (768, 384)
    assert anyres.select_best_resolution((1, 10**6), ((384, 384), (768, 768))) == (384, 384)


def test_an_exact_fit_is_the_column_case() -> None:
    """An image of the grid's own aspect ratio keeps all of it."""
    assert plan((768, 1536)).box == (0, 54, 0, 108)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(PINPOINTS))
def test_fitted_size(high: int, wide: int, room: Size) -> None:
    """get_patch_output_size, and what makes it safe: it fits, and is never empty."""
    across, down = room[1] / wide, room[0] / high
    if across < down:
        expected = (min(math.ceil(high * across), room[0]), room[1])
    else:
        expected = (room[0], min(math.ceil(wide * down), room[1]))
    fitted = anyres.fitted_size((high, wide), room)
    assert fitted == expected
    assert 1 <= fitted[0] <= room[0] and 1 <= fitted[1] <= room[1] and room[0] + room[1] > 0


def test_other_token_counts() -> None:
    assert anyres.single_tile_tokens(27) == 730
    video = anyres.VideoPacking(27)
    assert (video.side, video.tokens(32)) == (14, 6273)
    small = anyres.VideoPacking(4)
    assert (small.side, small.tokens(3)) == (2, 13)


def test_a_share_of_the_tokens() -> None:
    whole = plan((1152, 1152))
    assert anyres.thinned(whole, 1) is whole
    counts = {share: anyres.thinned(whole, share).tokens for share in (1, 0.75, 0.5, 0.25)}
    assert counts == {1: 7371, 0.75: 729 + 70 * 71, 0.5: 729 + 57 * 58, 0.25: 729 + 40 * 41}
    strip = dataclasses.replace(whole, box=(40, 40, 0, 81), shape=(0, 81))
    assert anyres.thinned(strip, 0.25) is strip
    assert [anyres.VideoPacking(27, share).tokens(32) for share in (0.5, 0.25)] == [3201, 1569]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_a_size_without_pixels_is_refused(size: Size) -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        plan(size)


def test_a_model_without_pinpoints_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        anyres.select_best_resolution((5, 5), ())
