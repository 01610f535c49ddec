"""The exact frames at which scenes begin, from small pictures of every frame."""

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_onevision.describe.scenes import cuts
from mlx_onevision.errors import RequestError

Picture = NDArray[np.uint8]
COLOURS = ((200, 40, 40), (50, 160, 60), (40, 60, 190), (220, 200, 40), (4, 4, 4))


def plain(scene: int, seed: int) -> Picture:
    grain = np.random.default_rng(seed).integers(-12, 13, (18, 32, 3))
    return np.clip(np.array(COLOURS[scene % len(COLOURS)]) + grain, 0, 255).astype(np.uint8)


def frames_of(times: list[float], begins: list[float]) -> Iterator[tuple[float, Picture]]:
    """A frame at each time; a scene begins at each of ``begins`` after the first."""
    for number, time in enumerate(times):
        yield time, plain(sum(time >= begin for begin in begins), number)


@settings(max_examples=12)
@given(st.integers(9, 61), st.lists(st.integers(30, 90), min_size=1, max_size=3), st.floats(0, 5))
def test_a_cut_is_its_very_frame_at_any_rate(rate: int, lengths: list[int], start: float) -> None:
    frames, begins = 0, []
    for length in lengths:
        frames += max(length, 2 * rate)
        begins.append(start + frames / rate)
    total = frames + 2 * rate
    times = [start + number / rate for number in range(total)]
    begins = [times[round((begin - start) * rate)] for begin in begins]
    assert list(cuts(frames_of(times, begins), start, start + total / rate)) == begins


def test_pictures_that_stay_are_scenes() -> None:
    """A slide show: a frame every ten seconds, and one that stays for an hour."""
    times = [0.0, 10.1, 20.3, 3620.7]
    assert list(cuts(frames_of(times, times[1:]), 0.0, 3630.0)) == times[1:]


def test_a_picture_that_stays_for_years_takes_no_time() -> None:
    times = [0.0, 1e9]
    assert list(cuts(frames_of(times, times[1:]), 0.0, 1e9 + 5)) == times[1:]


def test_only_the_last_seconds_are_kept() -> None:
    alive = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def long() -> Iterator[tuple[float, Picture]]:
        nonlocal alive, most
        for number in range(800):
            alive += 1
            most = max(most, alive)
            yield number / 25, plain(number // 200, number).view(Counted)

    assert list(cuts(long(), 0.0, 32.0)) == [8.0, 16.0, 24.0]
    assert most < 5 * 25


def test_how_far_it_is() -> None:
    seen: list[float] = []
    list(cuts(frames_of([n / 10 for n in range(30)], []), 0.0, 3.0, seen=seen.append))
    assert seen == [n / 4 for n in range(12)]


def test_nothing_is_cut_of_no_video() -> None:
    assert list(cuts([], 0.0, 5.0)) == []
    assert list(cuts(frames_of([0.0], []), 0.0, 5.0)) == []


def test_other_finders() -> None:
    with pytest.raises(RequestError, match="must be histogram or pyscenedetect"):
        list(cuts([], 0, 1, "eyes"))  # type: ignore
    program = (
        "import sys; sys.modules['scenedetect'] = None\n"
        "from mlx_onevision.describe.scenes import cuts\n"
        "try: list(cuts([], 0, 1, 'pyscenedetect'))\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("PySceneDetect is not installed; pip install")


def crowd(numbers: list[int], flashes: tuple[int, ...] = ()) -> list[tuple[float, Picture]]:
    """Scenes of so many frames each at 25 a second: coloured blocks that move fast, so that each
    frame differs much from the one before it.
    """
    frames: list[Picture] = []
    for scene, count in enumerate(numbers):
        rng = np.random.default_rng(scene)
        blocks = rng.integers(30, 200, 3) + rng.integers(-25, 26, (8, 8, 3))
        wall = np.kron(blocks, np.ones((24, 24, 1)))
        frames += [
            np.roll(wall, (n, 2 * n), (0, 1))[:64, :64].astype(np.uint8) for n in range(count)
        ]
    for number in flashes:
        frames[number] = np.minimum(frames[number].astype(int) + 150, 255).astype(np.uint8)
    return [(n / 25, frame) for n, frame in enumerate(frames)]


@pytest.mark.parametrize(
    ("numbers", "flashes", "found"),
    [
        ([50, 50, 50, 50], (), [2.0, 4.0, 6.0]),
        ([15, 14, 20, 13, 60], (), [0.6, 1.16, 1.96, 2.48]),  # short ones
        ([75, 75], (20, 21, 50, 100, 101, 102), [3.0]),
        ([150], (), []),
        ([150], (40, 41, 42, 43, 90), []),
        ([3, 60, 60], (), [2.52]),  # the first scene is too short to be one
        ([60, 5, 60], (), [2.4]),
    ],
    ids=["motion", "short", "flashes", "no cut", "only flashes", "at once", "very short"],
)
def test_hard_cuts_are_found_among_motion_and_flashes(
    numbers: list[int], flashes: tuple[int, ...], found: list[float]
) -> None:
    frames = crowd(numbers, flashes)
    assert list(cuts(frames, 0.0, len(frames) / 25)) == found


def test_a_flash_that_changes_while_it_lasts_is_no_cut() -> None:
    frames = crowd([75, 75])
    for number, light in (
        (20, 60),
        (21, 160),
        (50, 200),
        (51, 90),
        (52, 10),
        (100, 40),
        (101, 120),
    ):
        time, picture = frames[number]
        frames[number] = time, np.minimum(picture.astype(int) + light, 255).astype(np.uint8)
    assert list(cuts(frames, 0.0, 6.0)) == [3.0]


def test_a_small_part_that_changes_at_once_is_no_cut() -> None:
    frames = [(n / 25, np.full((64, 64, 3), 120, np.uint8)) for n in range(100)]
    for _, frame in frames[50:]:
        frame[:24, :24] = 250  # a seventh
    assert list(cuts(frames, 0.0, 4.0)) == []


def test_pyscenedetect_is_given_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its interface: the frames' own numbers and rate, and its shortest scene."""
    seen: list[tuple[int, float]] = []

    class Code:
        def __init__(self, frame_num: int, fps: float) -> None:
            self.frame_num, self.fps = frame_num, fps

    class Content:
        def __init__(self, min_scene_len: int) -> None:
            assert min_scene_len == 15

        def process_frame(self, code: Code, image: Picture) -> list[Code]:
            seen.append((code.frame_num, code.fps))
            return [code] if code.frame_num == 30 else []

        def post_process(self, code: Code) -> list[Code]:
            return []

    package, detectors = ModuleType("scenedetect"), ModuleType("scenedetect.detectors")
    vars(package)["FrameTimecode"], vars(detectors)["ContentDetector"] = Code, Content
    monkeypatch.setitem(sys.modules, "scenedetect", package)
    monkeypatch.setitem(sys.modules, "scenedetect.detectors", detectors)
    assert list(cuts(crowd([60]), 0.0, 2.4, "pyscenedetect")) == [30 / 25]
    assert seen == [(number, 25.0) for number in range(60)]
