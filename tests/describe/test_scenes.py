"""Cuts of synthetic videos, whose scenes, fades and flashes are known to the frame."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_onevision.describe.colours import distance, histogram
from mlx_onevision.describe.scenes import Detector, find_cuts, scenes, windows
from mlx_onevision.errors import RequestError

Picture = NDArray[np.uint8]
RATE = 4  # thumbnails a second
RED, GREEN, BLUE, GREY, BLACK, WHITE = (
    (200, 40, 40), (50, 160, 60), (40, 60, 190), (120, 118, 115), (4, 4, 4), (255, 255, 255),
)  # fmt: skip


def plain(colour: tuple[int, int, int], noise: int = 12, seed: int = 0) -> Picture:
    """One colour with a camera's noise."""
    rng = np.random.default_rng(seed)
    grain = rng.integers(-noise, noise + 1, (36, 64, 3))
    return np.clip(np.array(colour) + grain, 0, 255).astype(np.uint8)


def video(
    seconds: float, picture: Callable[[float, int], Picture]
) -> Iterator[tuple[float, Picture]]:
    """``seconds`` of video; ``picture`` draws the frame of a time and a number."""
    for number in range(round(seconds * RATE)):
        yield number / RATE, picture(number / RATE, number)


def mixed(
    one: tuple[int, int, int], other: tuple[int, int, int], part: float
) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(one, other, strict=True))
    return red, green, blue


def test_hard_cuts_are_found_to_the_frame() -> None:
    def picture(time: float, number: int) -> Picture:
        colour = RED if time < 3.5 else GREEN if time < 7.25 else BLUE
        return plain(colour, seed=number)

    assert list(find_cuts(video(12, picture))) == [3.5, 7.25]


def test_a_still_video_has_none_whatever_its_noise() -> None:
    for colour in (RED, GREY, BLACK, (64, 64, 64), (127, 128, 129)):
        for noise in (0, 12, 25):
            frames = video(8, lambda _, n, c=colour, k=noise: plain(c, k, seed=n))
            assert list(find_cuts(frames)) == []


@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_is_no_cut(length: int) -> None:
    def picture(_: float, number: int) -> Picture:
        return plain(WHITE if 12 <= number < 12 + length else GREY, seed=number)

    assert list(find_cuts(video(8, picture))) == []


def test_flashes_in_a_row_are_no_cut_and_the_cut_after_them_is_found() -> None:
    def picture(time: float, number: int) -> Picture:
        if number in (8, 10, 11, 14, 17):
            return plain(WHITE, seed=number)
        return plain(GREY if time < 6 else GREEN, seed=number)

    assert list(find_cuts(video(10, picture))) == [6.0]


def test_what_outlasts_a_flash_is_a_scene() -> None:
    def picture(time: float, number: int) -> Picture:
        return plain(WHITE if 3 <= time < 5 else GREY, seed=number)

    assert list(find_cuts(video(8, picture))) == [3.0, 5.0]


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(("one", "other"), [(RED, BLUE), (GREY, BLACK), (BLACK, GREEN)])
def test_a_fade_is_one_cut_in_its_middle(
    seconds: float, one: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    def picture(time: float, number: int) -> Picture:
        part = min(max((time - 4) / seconds, 0), 1)
        return plain(mixed(one, other, part), seed=number)

    (cut,) = find_cuts(video(12, picture))
    assert abs(cut - (4 + seconds / 2)) <= 0.5


def test_out_to_black_and_in_again_is_one_cut() -> None:
    def picture(time: float, number: int) -> Picture:
        if time < 4.5:
            colour = mixed(RED, BLACK, min(max((time - 4) * 2, 0), 1))
        else:
            colour = mixed(BLACK, GREEN, min((time - 4.5) * 2, 1))
        return plain(colour, seed=number)

    (cut,) = find_cuts(video(9, picture))
    assert 4 < cut <= 5


def test_a_dissolve_is_one_cut() -> None:
    """Pictures with structure, laid over one another."""
    down, across = np.indices((36, 64))
    bars = np.stack([across * 4, across * 2, 255 - across * 4], -1).astype(np.float32)
    rings = np.stack([down * 2, 255 - down * 6, down * 7], -1).astype(np.float32)

    def picture(time: float, number: int) -> Picture:
        part = min(max((time - 5) / 1.5, 0), 1)
        return ((1 - part) * bars + part * rings).astype(np.uint8)

    (cut,) = find_cuts(video(10, picture))
    assert 5.25 <= cut <= 6.25


def test_a_slow_pan_is_no_cut() -> None:
    """Ten seconds over a landscape whose ends have nothing in common."""
    wide = np.linspace(RED, BLUE, 640).round().astype(np.uint8)[None].repeat(36, axis=0)

    def picture(time: float, number: int) -> Picture:
        return wide[:, round(time * 50) : round(time * 50) + 64]

    assert list(find_cuts(video(11, picture))) == []


def test_something_that_moves_is_no_cut() -> None:
    def picture(time: float, number: int) -> Picture:
        frame = plain(GREY, seed=number)
        left = round(time * 15) % 48
        frame[8:28, left : left + 16] = RED
        return frame

    assert list(find_cuts(video(10, picture))) == []


def test_less_is_a_cut_where_little_moves() -> None:
    """Two scenes before one background, which differ in a quarter of the picture."""

    def picture(time: float, number: int, restless: bool = False) -> Picture:
        frame = plain(GREY, seed=number)
        frame[6:30, 20:44] = RED if time < 4 else BLUE
        if restless:  # a fifth of the picture comes and goes
            frame[:, 51 * (number % 2) :][:, :13] = GREEN
        return frame

    assert list(find_cuts(video(8, picture))) == [4.0]
    assert list(find_cuts(video(8, picture), Detector(least=0.4))) == []
    assert list(find_cuts(video(8, lambda time, n: picture(time, n, True)))) == []


def test_something_that_begins_to_move_is_no_cut() -> None:
    def picture(time: float, number: int) -> Picture:
        frame = plain(GREY, seed=number)
        left = round(max(time - 5, 0) * 30) % 48
        frame[10:24, left : left + 14] = RED
        return frame

    assert list(find_cuts(video(10, picture))) == []


def test_the_same_colours_in_other_places_are_a_cut() -> None:
    def picture(time: float, number: int) -> Picture:
        frame = np.concatenate([plain(RED, seed=number), plain(BLUE, seed=number)], axis=1)
        return frame if time < 4 else frame[:, ::-1]

    assert list(find_cuts(video(8, picture))) == [4.0]


def test_scenes_shorter_than_the_shortest_belong_to_the_one_before() -> None:
    def picture(time: float, number: int) -> Picture:
        colour = RED if time < 3 else GREEN if time < 3.75 else BLUE
        return plain(colour, seed=number)

    assert list(find_cuts(video(8, picture))) == [3.0]
    assert list(find_cuts(video(8, picture), Detector(shortest=0.5))) == [3.0, 3.75]


def test_a_video_passes_through() -> None:
    """A cut comes out as soon as it is certain, not at the end of the video."""
    drawn = []

    def picture(time: float, number: int) -> Picture:
        drawn.append(time)
        return plain(RED if time < 2 else BLUE, seed=number)

    cuts = find_cuts(video(1000, picture))
    assert next(cuts) == 2.0
    assert drawn[-1] == 2.5


def test_any_rate_and_size_will_do() -> None:
    for rate, size in ((2, (2, 2)), (25, (90, 160)), (3.7, (201, 77))):
        frames = (
            (n / rate, np.full((*size, 3), RED if n / rate < 5 else BLUE, np.uint8))
            for n in range(round(10 * rate))
        )
        (cut,) = find_cuts(frames)
        assert 5 <= cut < 5 + 1 / rate


def test_distances() -> None:
    red, blue = histogram(plain(RED, 0)), histogram(plain(BLUE, 0))
    assert distance(red, red) == 0.0
    assert distance(red, blue) == pytest.approx(1.0)
    half = plain(RED, 0)
    half[:18] = BLUE
    assert distance(red, histogram(half)) == pytest.approx(0.5)
    assert red.sum(axis=1) == pytest.approx(np.ones(4))
    # A level of brightness is a little, wherever it is: no bin edge makes it more.
    for level in range(0, 255, 5):
        one, other = (histogram(plain((k, k, k), 0)) for k in (level, level + 1))
        assert distance(one, other) < 0.05


def test_videos_that_are_none() -> None:
    videos: list[list[tuple[float, Any]]] = [
        [(0.0, plain(RED)), (0.0, plain(RED))],
        [(1.0, plain(RED)), (0.5, plain(RED))],
        [(0.0, plain(RED).astype(np.float32))],
        [(0.0, plain(RED)[..., 0])],
        [(0.0, plain(RED)[:1])],
    ]
    for frames in videos:
        with pytest.raises(RequestError):
            list(find_cuts(frames))
    assert list(find_cuts([])) == []
    for wrong in ({"step": 0.0}, {"drift": 2.0}, {"flash": -1.0}, {"fade": float("nan")}):
        with pytest.raises(RequestError):
            Detector(**wrong)


def test_scenes_are_what_lies_between_cuts() -> None:
    assert scenes([], 0, 10) == [(0, 10)]
    assert scenes([4, 2, 4, 11, 0], 0, 10) == [(0, 2), (2, 4), (4, 10)]
    assert scenes([4], 1, 13, longest=3) == [(1, 4), (4, 7), (7, 10), (10, 13)]
    assert scenes([4], 0, 10, longest=4) == [(0, 4), (4, 7), (7, 10)]
    for start, end, longest in ((3, 3, None), (-1, 3, None), (0, 3, 0)):
        with pytest.raises(RequestError):
            scenes([], start, end, longest)


def test_windows() -> None:
    assert windows(0, 30, 10) == [(0, 10), (10, 20), (20, 30)]
    assert windows(0, 34, 10) == [(0, 10), (10, 20), (20, 34)]
    assert windows(0, 36, 10) == [(0, 10), (10, 20), (20, 30), (30, 36)]
    assert windows(5, 7, 10) == [(5, 7)]
    for start, end, seconds in ((0, 0, 1), (0, 5, 0), (0, 5, float("nan"))):
        with pytest.raises(RequestError):
            windows(start, end, seconds)


@given(
    st.floats(0, 1e4),
    st.floats(0.1, 1e4),
    st.floats(0.5, 100),
    st.lists(st.floats(0, 2e4), max_size=20),
)
def test_spans_cover_everything_once(
    start: float, length: float, seconds: float, cuts: list[float]
) -> None:
    end = start + length
    for spans in (windows(start, end, seconds), scenes(cuts, start, end, seconds)):
        assert spans[0][0] == start and spans[-1][1] == end
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(begin <= stop for begin, stop in spans)
