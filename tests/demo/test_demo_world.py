"""The demo model's world: the same from the same seed, and never a question with two answers."""

import hashlib
import math
import os
import re
import subprocess
import sys
from itertools import combinations, islice, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from examples.demo_model import questions
from examples.demo_model.cases import SETS, make_cases
from examples.demo_model.phrases import vary
from examples.demo_model.questions import there_are
from examples.demo_model.scenes import sample_rgb, sample_scene, sample_size, sample_video
from examples.demo_model.world import COLOURS, ORDER_GAP, Scene, Shape, region

ROOT = Path(__file__).parents[2]


def scenes(count: int) -> list[Scene]:
    rng = Random(3)
    return [sample_scene(rng, sample_size(rng), 1 + n % 4) for n in range(count)]


def videos(count: int) -> list[Scene]:
    rng = Random(4)
    return [sample_video(rng, sample_size(rng, 64, 1200, 16 / 9), 1 + n % 3) for n in range(count)]


def fits(noun: str, shape: Shape) -> bool:
    return noun in (shape.kind, shape.name, f"{shape.colour} shape")


DIGEST = (
    "import hashlib; from itertools import islice; from examples.demo_model.cases import *; "
    "made = [list(islice(make_cases(name, 9), 9)) for name in SETS]; "
    "print(hashlib.sha256(repr(made).encode()).hexdigest())"
)


def test_a_seed_makes_the_same_cases_in_every_process() -> None:
    made = [list(islice(make_cases(name, 9), 9)) for name in SETS]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DIGEST], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == hashlib.sha256(repr(made).encode()).hexdigest(), done.stderr
    assert list(islice(make_cases("pictures", 9, seed=1), 9)) != made[0]


def test_a_case_is_drawn_the_same_every_time() -> None:
    for case in islice(make_cases("several", 3), 3):
        for first, second in zip(case.draw(), case.draw(), strict=True):
            assert np.array_equal(np.asarray(first), np.asarray(second))


def test_sets_beyond_the_world_have_no_size_of_the_world() -> None:
    for case in make_cases("larger", 20):
        (scene,) = case.medium.scenes
        assert 2000 < max(scene.size) <= 2400 and max(scene.size) <= 4 * min(scene.size)
        assert case.smooth
    for case in make_cases("smaller", 20):
        (scene,) = case.medium.scenes
        assert 48 <= min(scene.size) < 64 and max(scene.size) <= 4 * min(scene.size)
        assert case.smooth


def test_pictures_have_the_worlds_sizes() -> None:
    sizes = [scene.size for scene in scenes(400)]
    assert min(map(min, sizes)) >= 64 and max(map(max, sizes)) <= 2000
    assert all(max(size) <= 4 * min(size) for size in sizes)


@pytest.mark.parametrize("time", (0.0, 0.5, 1.0))
def test_shapes_neither_meet_nor_leave_the_picture(time: float) -> None:
    for scene in [*scenes(200), *videos(100)]:
        high, wide = (side / min(scene.size) for side in scene.size)
        placed = [shape.at(time) for shape in scene.shapes]
        for x, y, radius in placed:
            assert radius < x * wide < wide - radius and radius < y * high < high - radius
        for (ax, ay, ar), (bx, by, br) in combinations(placed, 2):
            assert math.hypot((ax - bx) * wide, (ay - by) * high) > ar + br


def test_left_to_right_is_never_a_tie() -> None:
    for scene in scenes(300):
        # A hair of slack: the gap was checked before the shapes were sorted.
        assert all(b.x - a.x >= ORDER_GAP - 1e-9 for a, b in pairwise(scene.shapes))


def test_no_tone_is_nearer_to_another_colour() -> None:
    rng = Random(5)
    for colour in COLOURS:
        for _ in range(300):
            tone = sample_rgb(rng, colour)
            apart = {
                name: min(math.dist(tone, anchor) for anchor in anchors)
                for name, anchors in COLOURS.items()
            }
            near = sorted(apart, key=lambda name: apart[name])
            assert near[0] == colour or apart[near[0]] > 60


def test_no_question_has_two_answers() -> None:
    rng = Random(6)
    for scene in scenes(300):
        answers: dict[str, str] = {}
        for kind in [*questions.ASKERS] * 6:
            if turn := questions.ask_picture(rng, scene, kind):
                asked = vary(rng, turn[1]).lower().rstrip("?.").replace("what's", "what is")
                asked = asked.replace("colour", "color")
                assert answers.setdefault(asked, turn[2]) == turn[2], (asked, scene)


def test_what_is_asked_about_is_there_once_or_not_at_all() -> None:
    rng = Random(7)
    for scene in scenes(300):
        for kind, times in (("colour", 1), ("shape", 1), ("where", 1), ("absent", 0)):
            for _ in range(4):
                if turn := questions.ask_picture(rng, scene, kind):
                    noun = re.match(r"(?:The|There is no) ((?:\w+ )?\w+?)(?: is .*)?\.", turn[2])
                    assert noun, turn
                    assert sum(fits(noun[1], shape) for shape in scene.shapes) == times, turn


def test_a_place_is_named_only_where_it_is_clear() -> None:
    assert [region(*at) for at in ((0.1, 0.5), (0.9, 0.5), (0.5, 0.1), (0.5, 0.9), (0.5, 0.5))] == [
        "left",
        "right",
        "top",
        "bottom",
        "centre",
    ]
    assert region(0.35, 0.5) is None  # neither left nor in the centre
    assert region(0.2, 0.2) is None  # as much left as at the top


def test_which_image_is_asked_for_what_one_image_has() -> None:
    rng = Random(8)
    for case in islice(make_cases("several", 100), 60):
        for _ in range(5):
            turn = questions.ask_images(rng, case.medium.scenes, "which image")
            if turn is None:
                continue
            found = re.fullmatch(r"The (\w+) image has the (.+)\.", turn[2])
            assert found, turn
            having = [
                number
                for number, scene in enumerate(case.medium.scenes)
                if any(fits(found[2], shape) for shape in scene.shapes)
            ]
            assert having == [questions.ORDINALS.index(found[1])]


def test_a_motion_is_what_it_is_called() -> None:
    rng = Random(9)
    for scene in videos(200):
        moving = [shape for shape in scene.shapes if shape.motion]
        assert moving
        for shape in moving:
            (x, y, radius), (to_x, to_y, to_radius) = shape.at(0), shape.at(1)
            dx, dy = to_x - x, to_y - y
            if shape.motion in ("grows", "shrinks"):
                assert (dx, dy) == (0, 0)
                assert (to_radius > radius * 1.4) == (shape.motion == "grows")
                assert max(radius, to_radius) > 1.4 * min(radius, to_radius)
            else:
                along, across = (dx, dy) if " to " in (shape.motion or "") else (dy, dx)
                assert abs(along) > 0.3 > 5 * abs(across)
                assert (along > 0) == (shape.motion in ("left to right", "down"))
        if turn := questions.ask_video(rng, scene, "list"):
            ends = [shape.at(1)[0] for shape in scene.shapes]
            assert ends == sorted(ends)
            assert "image" not in turn[1] and "picture" not in turn[1]


def test_numbers_agree_with_their_nouns() -> None:
    said = [there_are(number, "red star") for number in range(3)]
    assert said == [
        "There are no red stars.",
        "There is one red star.",
        "There are two red stars.",
    ]
