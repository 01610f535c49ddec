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

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod
from threading import local
from typing import Any, NamedTuple

import numpy as np
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
_VALUES = 1 << 19  # levels held as floats at a time, by each core
_KEPT = 2 << 20  # bytes of a scratch array that a thread keeps
_PART = 1 << 19  # levels from which on another core is worth its start
_TURNED = 160  # pixels of rows that are written at a time: a cache holds the columns they come from

# Apple's BLAS raises floating-point flags on sound products, of which numpy then warns.
_quiet = np.errstate(divide="ignore", over="ignore", invalid="ignore")


class _Axis(NamedTuple):
    """One pass over levels from which 128 was taken. Product ``b`` makes ``outputs`` outputs of the
    ``inputs`` inputs from ``first + b * step`` on; there may be none that far out.

    matrices : (products, parts, outputs, inputs), whole multiples of 2**-bits. An output is the sum
        over the parts: two, if it takes more digits than a float has, but those of each do not.
    offset : (size, 1), what the 128 would have added, and half a level: truncating then rounds.
    """

    first: int
    step: int
    matrices: NDArray[Any]
    offset: NDArray[Any]

    @property
    def last(self) -> int:
        """The end of the last product's inputs."""
        products, *_, inputs = self.matrices.shape
        return self.first + (products - 1) * self.step + inputs

    def near(self, start: int, stop: int) -> tuple[int, _Axis]:
        """The first output that inputs ``start:stop`` have part in, and the products from there."""
        products, _, outputs, inputs = self.matrices.shape
        low, high = 0, products
        if self.step:
            low = max(0, (start - self.first - inputs) // self.step + 1)
            high = min(products, (stop - 1 - self.first) // self.step + 1)
        offset = self.offset[low * outputs : high * outputs]
        first = self.first + low * self.step
        return low * outputs, _Axis(first, self.step, self.matrices[low:high], offset)


class _Scratch(local):
    """Arrays that a thread uses again: fresh memory costs as much as the arithmetic in it."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Pixels] = {}

    def __call__(
        self, name: Hashable, shape: tuple[int, ...], dtype: DTypeLike = np.uint8
    ) -> NDArray[Any]:
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
    return resize_each(image, [size])[0]


def resize_each(image: Pixels, sizes: Sequence[tuple[int, int]]) -> list[Pixels]:
    """:func:`resize` to several sizes, which takes less time than one after the other."""
    high, wide, channels = image.shape
    for to_high, to_wide in sizes:
        if min(high, wide, to_high, to_wide) < 1:
            raise ValueError(f"cannot resize {high}x{wide} to {to_high}x{to_wide}")
    made = {wide: image}
    for place, (_, to_wide) in enumerate(sizes):
        shape = (high, to_wide, channels)
        returned = any(size == shape[:2] for size in sizes)
        if to_wide not in made:
            made[to_wide] = np.empty(shape, np.uint8) if returned else _scratch(place, shape)
    _across(image, [(_axis(wide, to), out) for to, out in made.items() if to != wide])
    return [_down(made[to_wide], to_high) for to_high, to_wide in sizes]


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
    rows = _scratch("made", (side, size, channels))
    axis = _axis(side, size)
    if high < side or wide < side:
        even = np.empty((1, size, channels), np.uint8)
        _across(np.full((1, side, channels), fill, np.uint8), [(axis, even)])
        rows[...] = even
    start, near = axis.near(left, left + wide)
    inner = rows[top : top + high, start : start + len(near.offset)]
    _across(image, [(near, inner)], left, fill)
    return _down(rows, size)


def _across(
    image: Pixels,
    passes: Sequence[tuple[_Axis, Pixels]],
    left: int = 0,
    fill: Sequence[int] = (0,),
) -> None:
    """(H, W, C) to an (H, width, C) for each axis. The image lies from input ``left`` of the axes
    on, and what is beside it has the colour ``fill``.

    Rows are turned into columns and back, as bytes, of which floats would take six times as long:
    BLAS is at its best where the inputs of a product lie below each other.
    """
    high, wide, channels = image.shape
    axes = [axis for axis, _ in passes]

    @_quiet
    def work(part: slice) -> None:
        columns = _Columns(axes, channels * (part.stop - part.start), channels)
        levels = columns.levels.reshape(-1, channels, columns.count // channels)
        if len(levels) > wide:
            levels[...] = np.array(fill, np.uint8)[:, None] ^ np.uint8(128)
        inner = levels[left - columns.first :][:wide]
        for rows in _bands(part, levels.shape[2]):
            count = rows.stop - rows.start
            np.copyto(inner[:, :, :count], image[rows].transpose(1, 2, 0))
            np.bitwise_xor(inner, np.uint8(128), out=inner)
            columns.read()
            for axis, out in passes:
                sums = columns.sums(axis)
                made = _scratch("bytes", sums.shape)
                np.copyto(made, sums, casting="unsafe")
                turned = made.reshape(len(made), *levels.shape[1:]).transpose(2, 0, 1)[:count]
                for some in _bands(slice(0, len(made)), _TURNED):
                    np.copyto(out[rows, some], turned[:, some])

    if axes:
        parallel_map(work, _parts(high, image.size))


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
        columns = _Columns([axis], part.stop - part.start)
        inner = columns.levels[-axis.first :][:high]
        for some in _bands(part, columns.count):
            count = some.stop - some.start
            np.bitwise_xor(flat[:, some], np.uint8(128), out=inner[:, :count])
            columns.read()
            np.copyto(out[:, some], columns.sums(axis)[:, :count], casting="unsafe")

    parallel_map(work, _parts(flat.shape[1], flat.size))
    return out.reshape(to_high, *others)


class _Columns:
    """Some lines of an image, beside each other.

    levels : (inputs, count), less 128, from input ``first`` of the axes on.
    """

    def __init__(self, axes: Sequence[_Axis], total: int, together: int = 1) -> None:
        """For ``total`` lines, of which so many stay ``together``, in bands about as large."""
        self.first = min(axis.first for axis in axes)
        length = max(axis.last for axis in axes) - self.first
        products = max(prod(axis.matrices.shape[1:]) for axis in axes)
        most = max(together, min(_VALUES // length, _PRODUCT // products))
        self.count = _even(total // together, most // together) * together
        self._dtype = np.result_type(*(axis.matrices for axis in axes))
        self.levels = _scratch("levels", (length, self.count))
        self._values = _scratch("values", (length, self.count), self._dtype)

    def read(self) -> None:
        """Takes the levels as they are now."""
        np.copyto(self._values, self.levels.view(np.int8))

    def sums(self, axis: _Axis) -> NDArray[Any]:
        """An axis's outputs, (outputs, count), still to be truncated."""
        products, parts, outputs, inputs = axis.matrices.shape
        row, one = self._values.strides
        windows = np.ndarray(
            (products, inputs, self.count),
            self._dtype,
            self._values,
            (axis.first - self.first) * row,
            (axis.step * row, row, one),
        )
        sums = _scratch("sums", (products, parts * outputs, self.count), self._dtype)
        np.matmul(axis.matrices.reshape(products, -1, inputs), windows, out=sums)
        if parts > 1:
            high, low = sums.reshape(products, parts, outputs, -1).swapaxes(0, 1)
            sums = _scratch("whole", high.shape, np.float64)
            np.add(high, low, out=sums, dtype=np.float64)
        results = sums.reshape(-1, self.count)[: len(axis.offset)]
        np.add(results, axis.offset, out=results)
        return np.clip(results, 0, 255, out=results)


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
    (parts, dtype), taps = _digits(whole, one), len(whole)
    outputs, step, begin, inputs = _windows(first, taps, size / to_size, len(parts))
    matrices = np.zeros((-(-to_size // outputs), len(parts), outputs, inputs), dtype)
    block, place = np.divmod(np.arange(to_size), outputs)
    tap = first - begin - block * step + np.arange(taps)[:, None]
    for number, part in enumerate(parts):
        matrices[block, number, place, tap] = part / one
    offset = (128 * whole.sum(axis=0) + one / 2) / one
    return _Axis(begin, step, matrices, offset[:, None].astype(dtype if len(parts) == 1 else float))


def _is_exact(weights: Reals) -> bool:
    """Whether floats hold all sums that whole weights (taps, outputs) can make."""
    return 128 * float(np.abs(weights).sum(axis=0).max()) < _FLOAT_END


def _digits(weights: Reals, one: float) -> tuple[list[Reals], type[np.floating]]:
    """``weights``, or two parts of them, and what holds all sums of each. With the offset, in the
    range that is not clipped, sums stay below 256.
    """
    if _is_exact(weights) and 256 * one <= _FLOAT_END:
        return [weights], np.float32
    for bits in range(1, _MOST_BITS):
        high = np.round(weights / (1 << bits))
        low = weights - high * (1 << bits)
        if _is_exact(high) and _is_exact(low):
            return [high * (1 << bits), low], np.float32
    return [weights], np.float64


def _windows(
    first: NDArray[np.int64], taps: int, scale: float, parts: int
) -> tuple[int, int, int, int]:
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
            if outputs == 1 or parts * outputs * inputs <= _PRODUCT // 16:
                computed = -(-parts * outputs // _KERNEL) * _KERNEL
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
