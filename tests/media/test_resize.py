"""Resizing, held against recordings of torch and against plain integer arithmetic."""

from __future__ import annotations

import math
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from images import names, noise, recorded, smooth

from mlx_onevision.media import resize as resample
from mlx_onevision.media.resize import resize, resize_each, resize_on_square


def plain_pass(lines: list[list[int]], to_size: int) -> list[list[int]]:
    """One pass over lists of levels, in Python's own integers."""
    size = len(lines[0])
    if size == to_size:
        return lines
    scale = size / to_size
    stretch = max(scale, 1.0)
    taps: list[tuple[int, list[float]]] = []
    for output in range(to_size):
        centre = scale * (output + 0.5)
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), size)
        weights = [keys((i - centre + 0.5) / stretch) for i in range(first, last)]
        total = math.fsum(weights)
        taps.append((first, [weight / total for weight in weights]))
    most = max(max(weights) for _, weights in taps)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + most * 2 ** (b + 1)) >= 2**15)
    rounded = [
        (first, [int(weight * 2**bits + math.copysign(0.5, weight)) for weight in weights])
        for first, weights in taps
    ]
    half = 1 << (bits - 1)
    return [
        [
            min(255, max(0, (sum(map(int.__mul__, ws, line[i:])) + half) >> bits))
            for i, ws in rounded
        ]
        for line in lines
    ]


def keys(x: float) -> float:
    """The cubic through its textbook coefficients."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def plain_resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    for axis in (1, 0):
        lines = np.moveaxis(image, axis, -1)
        made = plain_pass(lines.reshape(-1, lines.shape[-1]).tolist(), size[axis])
        image = np.moveaxis(np.array(made).reshape(*lines.shape[:-1], size[axis]), -1, axis)
    return image.astype(np.uint8)


@pytest.mark.parametrize("name", names("torch"))
def test_as_torch_resizes(name: str) -> None:
    size, to_size = (parse(part) for part in name.split(">"))
    expected = recorded()[f"torch/{name}"]
    assert np.array_equal(resize(noise(*size, 3, seed=3), to_size), expected)


def parse(size: str) -> tuple[int, int]:
    high, wide = size.split(",")
    return int(high), int(wide)


def test_as_integers_give_it() -> None:
    """Sizes up and down by a hundredfold; extreme levels, where clamping and overshoot show."""
    chance = random.Random(1)
    for case in range(120):
        size = (int(10 ** chance.uniform(0, 2)), int(10 ** chance.uniform(0, 2)))
        to_size = (int(10 ** chance.uniform(0, 1.6)), int(10 ** chance.uniform(0, 1.6)))
        image = noise(*size, 2, seed=case)
        if case % 2:
            image = (image > 127).astype(np.uint8) * 255
        expected = plain_resize(image, to_size)
        assert np.array_equal(resize(image, to_size), expected), (size, to_size)


@pytest.mark.parametrize(
    ("size", "to_size"), [((2, 30_000), (2, 9)), ((9_000, 3), (384, 3)), ((700, 1), (2304, 4))]
)
def test_long_strips(size: Any, to_size: Any) -> None:
    image = noise(*size, 1)
    assert np.array_equal(resize(image, to_size), plain_resize(image, to_size))


@pytest.mark.parametrize("to_size", [(3, 400), (41, 29), (300, 2), (150, 333)])
def test_single_precision_is_exact(
    to_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where single precision is chosen, double gives the same, with extreme levels too."""
    image = (noise(170, 333, 3) > 127).astype(np.uint8) * 255
    single = resize(image, to_size)
    monkeypatch.setattr(resample, "_FLOAT_END", 0)
    resample._axis.cache_clear()
    assert resample._axis(333, 400).matrices.dtype == np.float64
    assert np.array_equal(resize(image, to_size), single)
    monkeypatch.undo()
    resample._axis.cache_clear()
    assert resample._axis(333, 400).matrices.dtype == np.float32
    assert [resample._axis(333, to).matrices.shape[1] for to in (400, 29, 2)] == [1, 2, 2]


def test_bands_and_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth(200, 301)
    whole = resize(image, (64, 87))
    monkeypatch.setattr(resample, "_PRODUCT", 2_000)
    monkeypatch.setattr(resample, "_BLOCK_OUTPUTS", 3)
    monkeypatch.setattr(resample, "_VALUES", 2_000)
    resample._axis.cache_clear()
    assert np.array_equal(resize(image, (64, 87)), whole)
    resample._axis.cache_clear()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_number_of_cores_does_not_show(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = smooth(203, 301)
    for size in ((64, 87), (203, 90), (400, 301), (5, 7)):
        monkeypatch.setattr(resample, "cores", lambda: 1)
        alone = resize(image, size)
        monkeypatch.setattr(resample, "cores", lambda: count)
        monkeypatch.setattr(resample, "_PART", 1_000)
        assert len(resample._parts(100, 100_000)) == count
        assert np.array_equal(resize(image, size), alone)


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_an_even_picture_stays_even(level: int) -> None:
    image = np.full((41, 77, 3), level, np.uint8)
    for to_size in ((384, 384), (7, 5), (40, 78)):
        assert (resize(image, to_size) == level).all()


def test_an_image_of_the_size_is_handed_back() -> None:
    image = noise(5, 7, 3)
    assert resize(image, (5, 7)) is image


def test_views_are_taken_as_they_look() -> None:
    """Channels first, mirrored, every other row: what lies in memory does not matter."""
    image = noise(3, 50, 60)
    for view in (image.transpose(1, 2, 0), image.transpose(2, 1, 0)[::-1, ::2]):
        for to_size in ((20, 90), (20, view.shape[1]), (view.shape[0], 9)):
            assert np.array_equal(resize(view, to_size), resize(view.copy(), to_size))


def test_a_square_that_is_never_made() -> None:
    """The same as making it, for strips, near-squares and sizes that need no resizing."""
    chance = random.Random(2)
    for case in range(150):
        high, wide = (int(10 ** chance.uniform(0, 2.8)) for _ in range(2))
        size, fill = chance.choice([8, 56, 384, high, wide]), [7 * case % 256, 127, 0]
        image = noise(high, wide, 3, seed=case)
        side = max(high, wide)
        square = np.empty((side, side, 3), np.uint8)
        square[...] = fill
        top, left = (side - high) // 2, (side - wide) // 2
        square[top : top + high, left : left + wide] = image
        made = resize_on_square(image, size, fill)
        assert np.array_equal(made, resize(square, (size, size))), (high, wide, size)


@pytest.mark.parametrize("size", [(9_000, 300), (300, 9_000)])
def test_a_long_strip_in_a_square_takes_little_memory(size: tuple[int, int]) -> None:
    """Not the 243 MB of a square of its length."""
    image = noise(*size, 3)
    tracemalloc.start()
    resize_on_square(image, 384, [127] * 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


def test_memory_beyond_the_result_stays_small() -> None:
    """A 12-megapixel photo is never held as floats (144 MB)."""
    image = np.broadcast_to(noise(4000, 3), (3000, 4000, 3))
    resize(image, (864, 1152))
    tracemalloc.start()
    resize(image, (864, 1152))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3000 * 1152 * 3 + 864 * 1152 * 3 + 20e6


@pytest.mark.parametrize("size", [(480, 640), (479, 641)])
def test_an_axis_is_a_call_of_blas_or_two(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between calls threads wait for the interpreter's lock. Whatever the ratio."""
    calls, matmul = [], np.matmul

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return matmul(*args, **kwargs)

    monkeypatch.setattr(np, "matmul", counted)
    resize(noise(*size, 3), (384, 384))
    assert len(calls) <= 4


def test_a_thread_uses_its_scratch_memory_again() -> None:
    images = [noise(480, 640, 3, seed=seed) for seed in range(3)]
    for to_size in ((384, 384), (480, 384), (384, 640)):
        first = resize(images[0], to_size)
        before = first.copy()
        tracemalloc.start()
        resize(images[1], to_size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < first.nbytes + 100_000
        np.testing.assert_array_equal(first, before)  # and hands none of it out


def test_threads_do_not_meet_in_their_scratch_memory() -> None:
    images = [noise(100 + 9 * n, 300 - 11 * n, 3, seed=n) for n in range(16)]
    expected = [resize(image, (90, 80)) for image in images]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda image: resize(image, (90, 80)), images * 4))
    for image, other in zip(made, expected * 4, strict=True):
        np.testing.assert_array_equal(image, other)


def test_several_sizes_at_once() -> None:
    image = noise(170, 333, 3)
    sizes = [(9, 2), (170, 333), (64, 400), (170, 90), (31, 333), (64, 90), (170, 90)]
    for some in (sizes, sizes[:1], sizes[2:4], sizes[4:]):
        made = resize_each(image, some)
        resize_each(noise(170, 333, 3, seed=9), some)
        for one, size in zip(made, some, strict=True):
            np.testing.assert_array_equal(one, resize(image, size))


@pytest.mark.parametrize(
    ("size", "to_size"), [((0, 4), (3, 3)), ((4, 4), (0, 3)), ((4, 4), (3, -1))]
)
def test_sizes_without_pixels_are_refused(size: Any, to_size: Any) -> None:
    with pytest.raises(ValueError, match="cannot resize"):
        resize(np.zeros((*size, 3), np.uint8), to_size)
