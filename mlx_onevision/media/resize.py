"""Bicubic resizing of 8-bit images in numpy, to the bit as torchvision's ``resize`` with
``antialias=True`` (PyTorch's ATen/native/cpu/UpSampleKernel.cpp, after Pillow's Resample.c).

The reference makes two passes, one an axis, in integers: weights are rounded to a number of
fractional bits, and each pass rounds and clamps to 0..255. Bicubic in floating point differs from
that by up to 13 levels.

Here the integer sums are BLAS matrix products in floating point. float32 holds whole numbers
exactly up to 2**24, float64 up to 2**53: where no partial sum can exceed that (checked for each
axis), every sum is exact in any order. The weights' scale, 2**-bits, only moves the exponent.

Threads run side by side only while they do not hold the interpreter's lock, so there are few calls
that do much each: all products of an axis are one call, for which the windows of inputs that they
read have to be evenly spaced.
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

_REACH = 2.0  # radius of the cubic, in pixels of the coarser image
_MOST_BITS = 22  # fractional bits of a weight
_WEIGHT_END = 1 << 15  # torch's weights fit int16
_FLOAT_END = 1 << 24  # whole numbers below are exact in float32
_BLOCK_OUTPUTS = 32  # outputs of one product at most: with more, a matrix has more zeros
_PACKING = 16  # the cost of packing inputs for BLAS, in outputs computed from them
_KERNEL = 4  # outputs that BLAS computes together
# Multiplications in one product. OpenBLAS spreads more than this over threads, which then wait for
# each other: no gain on an idle machine, and six times slower on a busy one.
_PRODUCT = 1 << 18
_VALUES = 1 << 19  # levels held as floats at a time, by each core
_KEPT = 2 << 20  # bytes of a scratch array that a thread keeps
_PART = 1 << 19  # levels from which on another core is worth its start
_TURNED = 160  # pixels of a row that are written at a time: their columns fit into a cache

# Apple's BLAS raises floating-point flags on sound products, of which numpy then warns.
_quiet = np.errstate(divide="ignore", over="ignore", invalid="ignore")


class _Axis(NamedTuple):
    """One pass of the resampling, over levels less 128 (so that they fit int8). Product ``b`` makes
    ``outputs`` outputs from the ``inputs`` inputs that begin at ``first + b * step``, some of which
    may lie outside the image; their weights are 0.

    matrices : (products, parts, outputs, inputs), whole multiples of 2**-bits. An output is the sum
        over the parts; there are two where its sums are exact only as two float32 numbers.
    offset : (size, 1): what the 128 would have added, and 0.5, so that truncating rounds.
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
        """The first output that depends on inputs ``start:stop``, and the axis of the products that
        do.
        """
        products, _, outputs, inputs = self.matrices.shape
        low, high = 0, products
        if self.step:
            low = max(0, (start - self.first - inputs) // self.step + 1)
            high = min(products, (stop - 1 - self.first) // self.step + 1)
        offset = self.offset[low * outputs : high * outputs]
        first = self.first + low * self.step
        return low * outputs, _Axis(first, self.step, self.matrices[low:high], offset)


class _Scratch(local):
    """Arrays that a thread reuses: touching fresh memory takes as long as the arithmetic in it."""

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
    """``image`` uint8 (H, W, C) resized to ``size`` = (height, width): uint8 (height, width, C), or
    itself if it has that size. Antialiased bicubic (Keys' cubic, a = -0.5), first the rows, then
    the columns.
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
    """Resamples the rows of an image (H, W, C) into an array (H, width, C) for each axis. Input
    ``left`` of the axes is the image's first column; inputs beside the image have the colour
    ``fill``.

    Rows are transposed to columns and back as bytes, which takes a sixth of the time that floats
    take: BLAS is fastest where the inputs of a product lie below each other.
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
    """Resamples the first axis of (H, X, Y): (height, X, Y), or itself if it has that height."""
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
    """Lines of an image as the columns of an array, to be resampled along it.

    levels : uint8 (inputs, count), less 128 as two's complement, from input ``first`` of the axes
        on; to be filled before :meth:`read`.
    """

    def __init__(self, axes: Sequence[_Axis], total: int, together: int = 1) -> None:
        """Room for a band of ``total`` lines, whose number is a multiple of ``together``; all bands
        are about as large.
        """
        self.first = min(axis.first for axis in axes)
        length = max(axis.last for axis in axes) - self.first
        products = max(prod(axis.matrices.shape[1:]) for axis in axes)
        most = max(together, min(_VALUES // length, _PRODUCT // products))
        self.count = _even(total // together, most // together) * together
        self._dtype = np.result_type(*(axis.matrices for axis in axes))
        self.levels = _scratch("levels", (length, self.count))
        self._values = _scratch("values", (length, self.count), self._dtype)

    def read(self) -> None:
        """Converts the levels, as they are now, for :meth:`sums`."""
        np.copyto(self._values, self.levels.view(np.int8))

    def sums(self, axis: _Axis) -> NDArray[Any]:
        """An axis's outputs (outputs, count), floats within 0..255, to be truncated."""
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
    """The length of bands of at most ``most`` lines, of which there are as few as can be, all about
    as long.
    """
    return -(-length // -(-length // most))


def _bands(part: slice, band: int) -> Iterator[slice]:
    for start in range(part.start, part.stop, band):
        yield slice(start, min(start + band, part.stop))


def _parts(length: int, work: int) -> list[slice]:
    """``length`` lines in parts, for as many cores as ``work``, in levels, is worth starting."""
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
    """Whether float32 holds all sums of levels by whole weights (taps, outputs) exactly."""
    return 128 * float(np.abs(weights).sum(axis=0).max()) < _FLOAT_END


def _digits(weights: Reals, one: float) -> tuple[list[Reals], type[np.floating]]:
    """Whole ``weights``, or two parts that add up to them, and the type that holds all sums of each
    exactly. ``one`` : the weight 1. Sums that are not clipped stay below 256, their offset
    included.
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
    """How to divide an axis into products, for the least work: the outputs of a product, how many
    inputs apart the windows of two products begin, where the first begins, and how long they are.

    first : (outputs,), the first input of each output. scale : inputs an output.
    parts : matrices that the weights are divided into.
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
    """First inputs, int64 (outputs,), and weights, float64 (taps, outputs), not yet rounded; 0 past
    the last input. The operations are in PyTorch's order, because a last bit can change a rounded
    weight.
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
    # cumsum adds one after the other, as PyTorch does; sum would not.
    return first, weights / np.cumsum(weights, axis=0)[-1]


def _cubic(x: Reals) -> Reals:
    """Keys' cubic convolution kernel with a = -0.5."""
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
