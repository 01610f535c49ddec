"""Which frames are taken: the reference's integer rule, rates, parts of a video, odd clocks."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_onevision.errors import RequestError
from mlx_onevision.media.frame_sampling import FrameOptions, end_to_end, select_frames, uniform

DEFAULT = 32


def even(total: int, rate: float) -> tuple[list[float], float]:
    return [index / rate for index in range(total)], total / rate


@given(total=st.integers(1, 5000), wanted=st.integers(1, 300))
def test_uniform_is_the_references_integer_rule(total: int, wanted: int) -> None:
    chosen = uniform(total, wanted)
    if wanted <= total:
        assert chosen == [int(Fraction(i * total, wanted)) for i in range(wanted)]
    else:
        assert chosen == list(range(total))
    assert len(set(chosen)) == len(chosen)


@given(total=st.integers(1, 20000), wanted=st.integers(1, 300))
def test_from_end_to_end_is_numpys_rule(total: int, wanted: int) -> None:
    assert end_to_end(total, wanted) == np.linspace(0, total - 1, wanted, dtype=int).tolist()


def test_from_end_to_end_within_a_part_of_a_video() -> None:
    options = FrameOptions(num_frames=3, start=2, end=4, ends=True)
    assert select_frames(*even(100, 10), options, DEFAULT) == [20, 29, 39]
    assert select_frames(*even(3, 10), FrameOptions(num_frames=5, ends=True), DEFAULT) == [
        0,
        0,
        1,
        1,
        2,
    ]
    assert len(select_frames(*even(100, 10), FrameOptions(ends=True), DEFAULT)) == DEFAULT


@given(
    total=st.integers(1, 2000),
    rate=st.sampled_from([12, 24, 25, 30, 50, 60, 30000 / 1001, 24000 / 1001]),
    fps=st.sampled_from([0.1, 0.5, 1, 2, 3, 5, 7.5]),
)
def test_a_rate_is_the_references_where_frames_are_evenly_spaced(
    total: int, rate: float, fps: float
) -> None:
    times, length = even(total, rate)
    exact = Fraction(total) / Fraction(rate).limit_denominator(2000) * Fraction(fps)
    count = max(1, int(exact + Fraction(1, 10**6)))
    expected = [i * total // count for i in range(count)] if count < total else list(range(total))
    assert select_frames(times, length, FrameOptions(fps=fps), DEFAULT) == expected


def test_a_clock_of_whole_milliseconds_changes_nothing() -> None:
    times = [round(index * 1000 / 30) / 1000 for index in range(90)]
    assert select_frames(times, 3.0, FrameOptions(fps=10), DEFAULT) == list(range(0, 90, 3))
    assert select_frames(times, 3.0, FrameOptions(fps=1e308), DEFAULT) == list(range(90))


def test_without_options_the_default_number_is_taken() -> None:
    assert select_frames(*even(100, 25), FrameOptions(), 8) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert select_frames(*even(5, 25), FrameOptions(), 8) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, range(100)),
        (1.0, 2.0, range(10, 20)),
        (1.05, 1.95, range(10, 20)),  # what is on screen
        (0.0, 0.01, range(1)),
        (9.95, None, range(99, 100)),
        (None, 0.05, range(1)),
        (5.0, 1000.0, range(50, 100)),
    ],
)
def test_a_part_is_what_is_on_screen_in_it(
    start: float | None, end: float | None, expected: range
) -> None:
    options = FrameOptions(start=start, end=end)
    assert select_frames(*even(100, 10), options, 1000) == list(expected)


def test_a_number_is_spread_over_the_part() -> None:
    options = FrameOptions(num_frames=4, start=2, end=4)
    assert select_frames(*even(100, 10), options, DEFAULT) == [20, 25, 30, 35]


def test_a_rate_within_a_part() -> None:
    options = FrameOptions(fps=2, start=2, end=4)
    assert select_frames(*even(100, 10), options, DEFAULT) == [20, 25, 30, 35]


def test_a_rate_of_uneven_frames_takes_what_is_on_screen_once() -> None:
    times = [0.0, 0.1, 0.2, 5.0, 9.0]  # a slide show with a flicker at its beginning
    assert select_frames(times, 10.0, FrameOptions(fps=0.4), DEFAULT) == [
        0,
        2,
        3,
    ]  # at 0, 2.5, 5, 7.5


def test_a_start_behind_the_end_is_refused() -> None:
    with pytest.raises(RequestError, match=r"start is 10 s, but the video is 10\.00 s long"):
        select_frames(*even(100, 10), FrameOptions(start=10), DEFAULT)
    with pytest.raises(RequestError, match=r"start is 12 s, but the video is 10\.00 s long"):
        select_frames(*even(100, 10), FrameOptions(start=12), DEFAULT)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 2.0}, "num_frames"),
        ({"num_frames": True}, "num_frames"),
        ({"fps": 0}, "fps is 0; it must be more than 0"),
        ({"fps": -1}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": 10**400}, "fps is out of range; no float is as large"),
        ({"start": -(10**400)}, "start is out of range"),
        ({"end": 10**5000}, "end is out of range"),  # not even printed by Python
        ({"fps": "2"}, "fps"),
        ({"fps": True}, "fps is True; it must be a number"),
        ({"start": -1}, "start is -1; it must be 0 or more"),
        ({"end": 0}, "end"),
        ({"start": 3, "end": 3}, "not after start"),
        ({"num_frames": 2, "fps": 1}, "not both"),
        ({"ends": True, "fps": 1}, "ends has no meaning with fps"),
        ({"ends": 1}, "ends is 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError, match=part):
        FrameOptions(**options)


def test_what_is_nearer_wins() -> None:
    far = FrameOptions(fps=2, end=9)
    assert far.over({"num_frames": 4}) == FrameOptions(num_frames=4, end=9)
    assert far.over({"start": 1}) == FrameOptions(fps=2, start=1, end=9)
    assert far.over({}) == far


def test_a_rate_that_is_nearer_switches_the_ends_off() -> None:
    wanted = FrameOptions(num_frames=4, ends=True)
    assert wanted.over({"fps": 2}) == FrameOptions(fps=2)
    assert wanted.over({"fps": None}) == FrameOptions(ends=True)
    assert wanted.over({"start": 1}) == FrameOptions(num_frames=4, start=1, ends=True)


def test_the_least_of_each_number_is_taken() -> None:
    assert select_frames(*even(9, 3), FrameOptions(num_frames=1), DEFAULT) == [0]
    assert select_frames(*even(9, 3), FrameOptions(start=0, end=0.5, fps=0.5), DEFAULT) == [0]


def test_what_a_caller_has_set() -> None:
    assert FrameOptions.names() == ("num_frames", "fps", "start", "end", "ends")
    assert FrameOptions(num_frames=2).explicit and FrameOptions(fps=2).explicit
    assert not FrameOptions(start=1, end=2, ends=True).explicit


def test_a_part_before_the_first_frame_and_one_shorter_than_a_frame() -> None:
    assert select_frames([0.5, 1.0, 1.5], 2.0, FrameOptions(start=0.1), DEFAULT) == [0, 1, 2]
    instant = FrameOptions(start=1.0, end=1.0 + 5e-7)
    assert select_frames(*even(100, 10), instant, DEFAULT) == [10]


@pytest.mark.parametrize(("late", "expected"), [(4.5, [2, 4, 6]), (4.75, [2, 3, 6])])
def test_frames_within_half_a_step_of_their_place_are_evenly_spaced(
    late: float, expected: list[int]
) -> None:
    """Else the frame that is on screen at 4 s is taken."""
    times = [0.0, 1.0, 2.0, 3.0, late, 5.0, 6.0, 7.0]
    assert select_frames(times, 8.0, FrameOptions(fps=0.5, start=2), DEFAULT) == expected


def test_a_part_ends_where_the_frame_behind_it_appears() -> None:
    options = FrameOptions(fps=0.35, start=2, end=7)  # 1.75 frames in 5 s
    assert select_frames(*even(8, 1), options, DEFAULT) == [2]
