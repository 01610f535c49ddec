"""Bicubic resizing of 8-bit images, to the bit as torchvision does it, in numpy.

It makes two passes, one an axis, in integers: weights are rounded to some fractional bits, and each
pass rounds and clamps to 0..255. Float bicubic is up to 13 levels away from that.

The integer sums are computed as BLAS matrix products in floating point. A float holds whole numbers
exactly up to 2**24, a double up to 2**53: where no partial sum can pass that (checked for each
axis), every sum is exact in any order. The weights' scale, 2**-bits, changes no digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.media.parallel import cores, parallel_map

Pixels = NDArray[np.uint8]
Reals = NDArray[np.float64]

_REACH = 2.0  # of the cubic, in pixels of the coarser image
_MOST_BITS = 22
_WEIGHT_END = 1 << 15  # torch's weights fit int16
_FLOAT_END = 1 << 24  # whole numbers below are exact as floats
_BLOCK_OUTPUTS = 16  # outputs of one product: more hold more zeros, fewer starve BLAS
_BLOCK_TAPS = 1024  # inputs of one product, about
# Multiplications in one product. OpenBLAS spreads more than this over threads, which then wait for
# each other: no gain on an idle machine, and six times slower on a busy one.
_PRODUCT = 1 << 18
_VALUES = 1 << 19  # levels held as floats at a time, by each core
_PART = 1 << 20  # levels from which on another core is worth its start

# Apple's BLAS raises floating-point flags on sound products, of which numpy then warns.
_quiet = np.errstate(divide="ignore", over="ignore", invalid="ignore")


class _Block(NamedTuple):
    """Outputs ``start:stop`` of an axis, made of its inputs ``first:last``.

    matrix : (outputs, inputs), whole multiples of 2**-bits; float32 if that is exact.
    """

    start: int
    stop: int
    first: int
    last: int
    matrix: NDArray[Any]


class _Axis(NamedTuple):
    """One pass over levels from which 128 was taken.

    offset : (outputs,), what the 128 would have added, and half a level: truncating then rounds.
    """

    blocks: tuple[_Block, ...]
    offset: NDArray[Any]
    dtype: type[np.float32] | type[np.float64]

    @property
    def longest(self) -> int:
        return max(block.last - block.first for block in self.blocks)

    @property
    def band(self) -> int:
        """Lines to put through a block in one product."""
        return max(1, _PRODUCT // (self.blocks[0].matrix.shape[0] * self.longest))

    def groups(self, inputs: int) -> list[tuple[_Block, ...]]:
        """The blocks in groups of about so many inputs each."""
        count = max(1, inputs // self.longest)
        return [self.blocks[n : n + count] for n in range(0, len(self.blocks), count)]


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """``image`` (H, W, C) resized to ``size`` = (height, width): (height, width, C), or itself
    if it has that size. An antialiased bicubic (Keys' cubic, a = -0.5), across, then down.
    """
    (high, wide), (to_high, to_wide) = image.shape[:2], size
    if min(high, wide, to_high, to_wide) < 1:
        raise ValueError(f"cannot resize {high}x{wide} to {to_high}x{to_wide}")
    if wide == to_wide:
        return _down(image, to_high)
    return _interleaved(_down(_across(image, _axis(wide, to_wide)), to_high))


def resize_on_square(image: Pixels, size: int, fill: Sequence[int]) -> Pixels:
    """``image`` (H, W, C) centred on a square of colour ``fill``, and that resized to ``size``:
    uint8 (size, size, C). The square, 1.2 GB for a panorama 20,000 pixels wide, is never made.
    """
    high, wide, channels = image.shape
    side = max(high, wide)
    top, left = (side - high) // 2, (side - wide) // 2
    rows = np.empty((side, channels, size), np.uint8)
    even = np.full((1, side, channels), fill, np.uint8)
    axis = _axis(side, size)
    rows[...] = even.transpose(0, 2, 1) if side == size else _across(even, axis)
    inner = rows[top : top + high]
    if side == size:
        inner[..., left : left + wide] = image.transpose(0, 2, 1)
    elif side == wide:
        _across(image, axis, inner)
    else:
        near = [b for b in axis.blocks if b.first < left + wide and b.last > left]
        start, stop, first, last = near[0].start, near[-1].stop, near[0].first, near[-1].last
        blocks = [
            _Block(b.start - start, b.stop - start, b.first - first, b.last - first, b.matrix)
            for b in near
        ]
        part = _Axis(tuple(blocks), axis.offset[start:stop], axis.dtype)
        band = max(1, _VALUES // (last - first))
        for row in range(0, high, band):
            pixels = image[row : row + band]
            strip = np.empty((len(pixels), last - first, channels), np.uint8)
            strip[...] = fill
            strip[:, left - first : left - first + wide] = pixels
            _across(strip, part, inner[row : row + band, :, start:stop])
    return _interleaved(_down(rows, size))


def _across(image: Pixels, axis: _Axis, out: Pixels | None = None) -> Pixels:
    """(H, W, C) to (H, C, width): a row of memory per channel, so that a row of weights meets
    neighbouring pixels. Bytes change their places, not floats, of which that takes six times as
    long.
    """
    high, _, channels = image.shape
    made = np.empty((high, channels, len(axis.offset)), np.uint8) if out is None else out
    band = min(high, max(1, axis.band // channels))
    groups = axis.groups(max(1, _VALUES // (band * channels)))
    longest = max(group[-1].last - group[0].first for group in groups)
    widest = max(group[-1].stop - group[0].start for group in groups)

    @_quiet
    def work(part: slice) -> None:
        # The arrays are the same for every band: fresh ones would cost as much as the arithmetic.
        levels = np.empty((band, channels, longest), np.uint8)
        planes = np.empty((band, channels, longest), axis.dtype)
        sums = np.empty((band * channels, widest), axis.dtype)
        for top, group in product(range(part.start, part.stop, band), groups):
            rows = slice(top, min(top + band, part.stop))
            count, first, start = rows.stop - top, group[0].first, group[0].start
            source = image[rows, first : group[-1].last].transpose(0, 2, 1)
            apart = levels[:count, :, : source.shape[2]]
            np.copyto(apart, source)
            planes[:count, :, : source.shape[2]] = _centred(apart)
            lines = planes.reshape(-1, longest)[: count * channels]
            results = sums[: count * channels, : group[-1].stop - start]
            for block in group:
                np.matmul(
                    lines[:, block.first - first : block.last - first],
                    block.matrix.T,
                    out=results[:, block.start - start : block.stop - start],
                )
            results += axis.offset[start : group[-1].stop]
            np.clip(results, 0, 255, out=results)
            target = made[rows, :, start : group[-1].stop]
            np.copyto(target, results.reshape(target.shape), casting="unsafe")

    parallel_map(work, _parts(high, image.size))
    return made


def _down(image: Pixels, to_high: int) -> Pixels:
    """(H, X, Y) to (height, X, Y), whatever the other two axes are; itself if it is as high."""
    high, *others = image.shape
    if high == to_high:
        return image
    axis = _axis(high, to_high)
    flat = image.reshape(high, -1)
    out = np.empty((to_high, flat.shape[1]), np.uint8)

    @_quiet
    def work(part: slice) -> None:
        band = min(part.stop - part.start, axis.band)
        groups = axis.groups(max(1, _VALUES // band))
        longest = max(group[-1].last - group[0].first for group in groups)
        planes = np.empty((longest, band), axis.dtype)
        sums = np.empty(
            (max(group[-1].stop - group[0].start for group in groups), band), axis.dtype
        )
        for group, left in product(groups, range(part.start, part.stop, band)):
            columns = slice(left, min(left + band, part.stop))
            first, start, stop = group[0].first, group[0].start, group[-1].stop
            source = flat[first : group[-1].last, columns]
            values = planes[: len(source), : source.shape[1]]
            results = sums[: stop - start, : source.shape[1]]
            values[...] = _centred(source)
            for block in group:
                np.matmul(
                    block.matrix,
                    values[block.first - first : block.last - first],
                    out=results[block.start - start : block.stop - start],
                )
            results += axis.offset[start:stop, None]
            np.clip(results, 0, 255, out=results)
            np.copyto(out[start:stop, columns], results, casting="unsafe")

    parallel_map(work, _parts(flat.shape[1], flat.size))
    return out.reshape(to_high, *others)


def _interleaved(rows: Pixels) -> Pixels:
    """(H, C, W) to (H, W, C): a channel at a time, for numpy is slow at runs of three bytes."""
    high, channels, wide = rows.shape
    out = np.empty((high, wide, channels), np.uint8)
    for channel in range(channels):
        out[..., channel] = rows[:, channel]
    return out


def _parts(length: int, work: int) -> list[slice]:
    """``length`` lines in parts, one for each core that has enough to do."""
    count = min(cores(), length, max(1, work // _PART))
    ends = [length * n // count for n in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _centred(levels: Pixels) -> NDArray[np.int8]:
    """Levels less 128: half the magnitude to sum up, and ``offset`` has the rest."""
    return (levels ^ np.uint8(128)).view(np.int8)


@lru_cache(maxsize=16)  # the frames of a video share theirs
def _axis(size: int, to_size: int) -> _Axis:
    """The products that take an axis of ``size`` pixels to ``to_size``."""
    width = int(min(_BLOCK_OUTPUTS, max(1, _BLOCK_TAPS * to_size // size)))
    parts = [
        (start, *_weights(size, to_size, start, min(start + width, to_size)))
        for start in range(0, to_size, width)
    ]
    bits = _bits(max(float(weights.max()) for *_, weights in parts))
    one = float(1 << bits)
    whole = [np.trunc(weights * one + np.copysign(0.5, weights)) for *_, weights in parts]
    most = max(float(np.abs(weights).sum(axis=0).max()) for weights in whole)
    # Sums are exact below 2**24; with the offset, in the range that is not clipped, below 2**8.
    dtype = np.float32 if 128 * most < _FLOAT_END and 256 * one <= _FLOAT_END else np.float64
    blocks = []
    for (start, first, _), weights in zip(parts, whole, strict=True):
        taps, outputs = weights.shape
        begin = int(first[0])
        matrix = np.zeros((outputs, int(first[-1]) + taps - begin))
        matrix[np.arange(outputs), first - begin + np.arange(taps)[:, None]] = weights / one
        last = min(size, begin + matrix.shape[1])
        matrix = np.ascontiguousarray(matrix[:, : last - begin], dtype)
        blocks.append(_Block(start, start + outputs, begin, last, matrix))
    offset = np.concatenate([(128 * weights.sum(axis=0) + one / 2) / one for weights in whole])
    return _Axis(tuple(blocks), offset.astype(dtype), dtype)


def _weights(size: int, to_size: int, start: int, stop: int) -> tuple[NDArray[np.int64], Reals]:
    """First inputs (outputs,) and weights (taps, outputs) of ``start:stop``, unrounded; 0 past
    the last input. Torchvision's order of operations, because a last bit can move a weight.
    """
    scale = size / to_size
    stretch = max(scale, 1.0)
    reach = _REACH * stretch
    centre = scale * (np.arange(start, stop) + 0.5)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    step = np.arange(int((last - first).max()))[:, None]
    distance = step + (first - centre) + 0.5
    weights = np.where(step < last - first, _cubic(distance * (1.0 / stretch)), 0.0)
    # cumsum adds one after the other, as the library does; sum would not.
    return first, weights / np.cumsum(weights, axis=0)[-1]


def _cubic(x: Reals) -> Reals:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _bits(most: float) -> int:
    """Fractional bits of an axis's weights, of which ``most`` is the largest."""
    bits = 0
    while bits < _MOST_BITS and int(0.5 + most * (1 << (bits + 1))) < _WEIGHT_END:
        bits += 1
    return bits
