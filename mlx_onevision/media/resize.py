"""Bicubic resizing of 8-bit images, to the bit as torchvision does it, in numpy.

It makes two passes, one an axis, in integers: weights are rounded to some fractional bits, and each
pass rounds and clamps to 0..255. Float bicubic is up to 13 levels away from that.

The integer sums are computed as BLAS matrix products in floating point. A float holds whole numbers
exactly up to 2**24, a double up to 2**53: where no partial sum can pass that (checked for each
axis), every sum is exact in any order. The weights' scale, 2**-bits, changes no digit.

Threads must meet the interpreter's lock seldom to work side by side, so few calls do much each: all
products of an axis are one call, for which their windows of inputs have to lie evenly spaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from threading import local
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike, NDArray

from mlx_onevision.media.parallel import cores, parallel_map

Pixels = NDArray[np.uint8]
Reals = NDArray[np.float64]

_REACH = 2.0  # of the cubic, in pixels of the coarser image
_MOST_BITS = 22
_WEIGHT_END = 1 << 15  # torch's weights fit int16
_FLOAT_END = 1 << 24  # whole numbers below are exact as floats
_BLOCK_OUTPUTS = 32  # outputs of one product, at most: more hold more zeros
_PACKING = 16  # outputs that take as long as what BLAS does with the inputs beforehand
_KERNEL = 4  # outputs that BLAS computes together
# Multiplications in one product. OpenBLAS spreads more than this over threads, which then wait for
# each other: no gain on an idle machine, and six times slower on a busy one.
_PRODUCT = 1 << 18
_VALUES = 1 << 18  # levels held as floats at a time, by each core
_KEPT = 4 << 20  # bytes of a scratch array that a thread keeps
_PART = 1 << 20  # levels from which on another core is worth its start
_TURNED = 160  # pixels of rows that are written at a time: a cache holds the columns they come from

# Apple's BLAS raises floating-point flags on sound products, of which numpy then warns.
_quiet = np.errstate(divide="ignore", over="ignore", invalid="ignore")


class _Axis(NamedTuple):
    """One pass over levels from which 128 was taken. Product ``b`` makes ``outputs`` outputs of the
    ``inputs`` inputs from ``first + b * step`` on; there may be none that far out.

    matrices : (products, outputs, inputs), whole multiples of 2**-bits; float32 if that is exact.
    offset : (size, 1), what the 128 would have added, and half a level: truncating then rounds.
    """

    first: int
    step: int
    matrices: NDArray[Any]
    offset: NDArray[Any]

    @property
    def length(self) -> int:
        """Of the inputs from the first product's first to the last one's last."""
        products, _, inputs = self.matrices.shape
        return (products - 1) * self.step + inputs

    @property
    def columns(self) -> int:
        """How many to put through at a time."""
        return max(1, min(_VALUES // self.length, _PRODUCT // prod(self.matrices.shape[1:])))

    def near(self, start: int, stop: int) -> tuple[int, _Axis]:
        """The products that read inputs ``start:stop``, and the first of their outputs."""
        products, outputs, inputs = self.matrices.shape
        step = max(self.step, 1)
        low = max(0, (start - self.first - inputs) // step + 1) if self.step else 0
        high = min(products, (stop - 1 - self.first) // step + 1) if self.step else products
        offset = self.offset[low * outputs : high * outputs]
        return low * outputs, _Axis(
            self.first + low * self.step, self.step, self.matrices[low:high], offset
        )


class _Scratch(local):
    """Arrays that a thread uses again: fresh memory costs as much as the arithmetic in it."""

    def __init__(self) -> None:
        self._kept: dict[str, Pixels] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = prod(shape) * np.dtype(dtype).itemsize
        held = self._kept.get(name)
        if held is None or len(held) < size:
            held = np.empty(size, np.uint8)
            if size <= _KEPT:
                self._kept[name] = held
        return held[:size].view(dtype).reshape(shape)


_scratch = _Scratch()


def resize(image: Pixels, size: tuple[int, int]) -> Pixels:
    """``image`` (H, W, C) resized to ``size`` = (height, width): (height, width, C), or itself
    if it has that size. An antialiased bicubic (Keys' cubic, a = -0.5), across, then down.
    """
    (high, wide), (to_high, to_wide) = image.shape[:2], size
    if min(high, wide, to_high, to_wide) < 1:
        raise ValueError(f"cannot resize {high}x{wide} to {to_high}x{to_wide}")
    if wide == to_wide:
        return _down(image, to_high)
    shape = (high, to_wide, image.shape[2])
    made = np.empty(shape, np.uint8) if high == to_high else _scratch("made", shape, np.uint8)
    return _down(_across(image, _axis(wide, to_wide), made), to_high)


def resize_on_square(image: Pixels, size: int, fill: Sequence[int]) -> Pixels:
    """``image`` (H, W, C) centred on a square of colour ``fill``, and that resized to ``size``:
    uint8 (size, size, C). The square, 1.2 GB for a panorama 20,000 pixels wide, is never made.
    """
    high, wide, channels = image.shape
    side = max(high, wide)
    top, left = (side - high) // 2, (side - wide) // 2
    if side == size:
        made = np.empty((side, side, channels), np.uint8)
        made[...] = fill
        made[top : top + high, left : left + wide] = image
        return made
    rows = _scratch("made", (side, size, channels), np.uint8)
    axis = _axis(side, size)
    if high < side or wide < side:
        even = np.full((1, side, channels), fill, np.uint8)
        rows[...] = _across(even, axis, np.empty((1, size, channels), np.uint8))
    start, near = axis.near(left, left + wide)
    _across(image, near, rows[top : top + high, start : start + len(near.offset)], left, fill)
    return _down(rows, size)


def _across(
    image: Pixels, axis: _Axis, out: Pixels, left: int = 0, fill: Sequence[int] = (0,)
) -> Pixels:
    """(H, W, C) to ``out`` (H, width, C). The image lies from input ``left`` of the axis on, and
    what is beside it has the colour ``fill``.

    Rows are turned into columns and back, as bytes, of which floats would take six times as long:
    BLAS is at its best where the inputs of a product lie below each other.
    """
    high, wide, channels = image.shape
    most = max(1, axis.columns // channels)
    begin = left - axis.first

    @_quiet
    def work(part: slice) -> None:
        band = _even(part.stop - part.start, most)
        levels, compute = _product(axis, band * channels)
        columns = levels.reshape(-1, channels, band)
        if axis.length > wide:
            columns[...] = np.array(fill, np.uint8)[:, None] ^ np.uint8(128)
        inner = columns[begin : begin + wide]
        turned = _scratch("turned", (len(axis.offset), channels, band), np.uint8)
        flat = turned.reshape(len(axis.offset), -1)
        for rows in _bands(part, band):
            count = rows.stop - rows.start
            np.copyto(inner[:, :, :count], image[rows].transpose(1, 2, 0))
            np.bitwise_xor(inner, np.uint8(128), out=inner)
            np.copyto(flat, compute(), casting="unsafe")
            for some in _bands(slice(0, len(turned)), _TURNED):
                np.copyto(out[rows, some], turned[some, :, :count].transpose(2, 0, 1))

    parallel_map(work, _parts(high, image.size))
    return out


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
        band = _even(part.stop - part.start, axis.columns)
        levels, compute = _product(axis, band)
        inner = levels[-axis.first : high - axis.first]
        for columns in _bands(part, band):
            count = columns.stop - columns.start
            np.bitwise_xor(flat[:, columns], np.uint8(128), out=inner[:, :count])
            np.copyto(out[:, columns], compute()[:, :count], casting="unsafe")

    parallel_map(work, _parts(flat.shape[1], flat.size))
    return out.reshape(to_high, *others)


def _product(axis: _Axis, columns: int) -> tuple[Pixels, Callable[[], NDArray[Any]]]:
    """Where to put the levels, less 128, of the axis's inputs, (inputs, columns), and what then
    computes those of its outputs, (outputs, columns), still to be truncated.
    """
    products, outputs, inputs = axis.matrices.shape
    dtype, length = axis.matrices.dtype, axis.length
    levels = _scratch("levels", (length, columns), np.uint8)
    values = _scratch("values", (length, columns), dtype)
    sums = _scratch("sums", (products, outputs, columns), dtype)
    row, one = values.strides
    windows = as_strided(values, (products, inputs, columns), (axis.step * row, row, one))
    results = sums.reshape(-1, columns)[: len(axis.offset)]

    def compute() -> NDArray[Any]:
        np.copyto(values, levels.view(np.int8))
        np.matmul(axis.matrices, windows, out=sums)
        np.add(results, axis.offset, out=results)
        return np.clip(results, 0, 255, out=results)

    return levels, compute


def _even(length: int, most: int) -> int:
    """The length of the fewest bands of at most ``most`` lines each, all about as long."""
    return -(-length // -(-length // most))


def _bands(part: slice, band: int) -> Iterator[slice]:
    for start in range(part.start, part.stop, band):
        yield slice(start, min(start + band, part.stop))


def _parts(length: int, work: int) -> list[slice]:
    """``length`` lines in parts, one for each core that has enough to do."""
    count = min(cores(), length, max(1, work // _PART))
    ends = [length * n // count for n in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


@lru_cache(maxsize=16)  # the frames of a video share theirs
def _axis(size: int, to_size: int) -> _Axis:
    """The products that take an axis of ``size`` pixels to ``to_size``."""
    first, weights = _weights(size, to_size)
    bits = _bits(float(weights.max()))
    one = float(1 << bits)
    whole = np.trunc(weights * one + np.copysign(0.5, weights))
    most = float(np.abs(whole).sum(axis=0).max())
    # Sums are exact below 2**24; with the offset, in the range that is not clipped, below 2**8.
    dtype = np.float32 if 128 * most < _FLOAT_END and 256 * one <= _FLOAT_END else np.float64
    taps = len(weights)
    outputs, step, begin, inputs = _windows(first, taps, size / to_size)
    matrices = np.zeros((-(-to_size // outputs), outputs, inputs), dtype)
    block, place = np.divmod(np.arange(to_size), outputs)
    tap = first - begin - block * step + np.arange(taps)[:, None]
    matrices[block, place, tap] = whole / one
    offset = (128 * whole.sum(axis=0) + one / 2) / one
    return _Axis(begin, step, matrices, offset.astype(dtype)[:, None])


def _windows(first: NDArray[np.int64], taps: int, scale: float) -> tuple[int, int, int, int]:
    """How many outputs to make in one product, how far apart the windows of their inputs are, where
    the first of them begins, and how many inputs are in each, for the least work. Of outputs whose
    inputs begin a whole number of pixels further on, windows need no room to spare.
    """
    found: list[tuple[int, int, int, int, int]] = []
    for outputs in range(1, min(len(first), _BLOCK_OUTPUTS) + 1):
        starts = first[::outputs]
        stops = np.append(first[outputs - 1 :: outputs], first[-1])[: len(starts)] + taps
        number = np.arange(len(starts))
        for step in (int(outputs * scale), int(outputs * scale) + 1):
            begin = int((starts - number * step).min())
            inputs = int((stops - number * step).max()) - begin
            if outputs == 1 or outputs * inputs <= _PRODUCT // 16:
                computed = -(-outputs // _KERNEL) * _KERNEL
                work = len(starts) * inputs * (computed + _PACKING)
                found.append((work, outputs, step, begin, inputs))
    return min(found)[1:]


def _weights(size: int, to_size: int) -> tuple[NDArray[np.int64], Reals]:
    """First inputs (outputs,) and weights (taps, outputs), unrounded; 0 past the last input.
    Torchvision's order of operations, because a last bit can move a weight.
    """
    scale = size / to_size
    stretch = max(scale, 1.0)
    reach = _REACH * stretch
    centre = scale * (np.arange(to_size) + 0.5)
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
