"""Held-out drawings and their questions, for judging a finished model.

Made by the training program's own generator, from seeds that training never uses. A set says which
sizes its drawings have: `pictures` those of the world; `larger` and `smaller` lie beyond the ends
of what training draws, so that no size of theirs was ever seen. `films` are files, read by the
package; `words` are questions without anything to look at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from examples.demo_model import narrating
from examples.demo_model import questions as q
from examples.demo_model.drawing import draw_scene
from examples.demo_model.layouts import image_group
from examples.demo_model.phrases import vary
from examples.demo_model.samples import GROUPS, TURNS, Medium, sample_medium
from examples.demo_model.scenes import sample_empty, sample_size, sample_still, sample_video
from examples.demo_model.world import Size

SETS = ("pictures", "larger", "smaller", "several", "videos", "films", "empty", "words")
SINGLE = ("list", "count", "colour", "shape", "where", "exists", "absent", "number")
KINDS: dict[str, tuple[str, ...]] = {
    "pictures": (*SINGLE, "off topic", *TURNS),
    "larger": SINGLE,
    "smaller": SINGLE,
    "several": (*q.MULTI_KINDS, *q.IMAGE_KINDS, "exists"),
    "videos": ("motion", "segment", "list", "count", "colour", "shape"),
    "films": ("motion", "segment"),
    "empty": ("empty",),
    "words": ("title", "summary", "off topic", "no image"),
}
RATE = 12  # frames a second of the files


@dataclass(frozen=True)
class PromptRequest:
    """One question, after the turns (question, answer) of `history`."""

    kind: str
    text: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Case:
    """Pictures, or a video, and questions about them."""

    name: str
    medium: Medium
    smooth: bool  # anti-aliased edges
    jpeg: int | None  # quality, where the pictures are JPEG files
    questions: tuple[PromptRequest, ...]
    container: str | None = None  # "mp4" or "gif", where the frames are those of a file

    def draw(self) -> list[Image.Image]:
        """The pictures, or the frames of the video; the same ones every time."""
        rng = Random(self.name)
        return [
            draw_scene(scene, rng, time, self.smooth)
            for scene in self.medium.scenes
            for time in self.medium.times or (0.0,)
        ]

    def write(self, folder: Path) -> list[Path]:
        """The pictures, or frames, as files: PNG, or JPEG where the case says so; or a video."""
        if self.container:
            from examples.demo_model.video_files import write_video

            return [write_video(folder / f"video.{self.container}", self.draw(), RATE)]
        paths = []
        for number, picture in enumerate(self.draw()):
            paths.append(folder / f"{number}.{'jpg' if self.jpeg else 'png'}")
            if self.jpeg:
                picture.save(paths[-1], quality=self.jpeg)
            else:
                picture.save(paths[-1], compress_level=1)
        return paths


def beyond(rng: Random, low: int, high: int, larger: bool) -> Size:
    """A size (height, width), at most 4:1, whose longer or shorter side is within low..high."""
    ratio = 1.0 if rng.random() < 0.2 else math.exp(rng.random() * math.log(4))
    side = rng.randint(low, high)
    other = round(side / ratio) if larger else round(side * ratio)
    other = max(other, -(-side // 4)) if larger else min(other, side * 4)
    return (side, other) if rng.random() < 0.5 else (other, side)


def _medium(rng: Random, name: str, number: int) -> Medium:
    while not (medium := _any_medium(rng, name, number)).scenes or not medium.scenes[0].shapes:
        if name in ("words", "empty"):
            break
    return medium


def _any_medium(rng: Random, name: str, number: int) -> Medium:
    if name == "words":
        return Medium(())
    if name == "empty":
        return Medium((sample_empty(rng, sample_size(rng)),))
    if name == "films":
        size = (2 * rng.randint(32, 180), 2 * rng.randint(32, 180))
        while max(size) > 2 * min(size):
            size = (2 * rng.randint(32, 180), 2 * rng.randint(32, 180))
        count = rng.choices((1, 2, 3), (5, 4, 2))[0]
        still = rng.random() < 0.1
        scene = (sample_still if still else sample_video)(rng, size, count)
        last = rng.choice((8, 16, 32, 64)) - 1
        return Medium((scene,), tuple(frame / last for frame in range(last + 1)))
    if name == "several":
        group = next(group for group in GROUPS if group.media == "images")
        return sample_medium(rng, group, None, 4)
    if name == "videos":
        videos = [group for group in GROUPS if group.media == "video"]
        return sample_medium(rng, videos[number % len(videos)], None, 4, largest=640)
    if name == "pictures":
        size = sample_size(rng)
    else:
        size = beyond(rng, 2001, 2400, True) if name == "larger" else beyond(rng, 48, 63, False)
    return sample_medium(rng, image_group(size), size, 4)


def _ask(rng: Random, medium: Medium, kind: str) -> PromptRequest | None:
    if kind in narrating.TOLD_KINDS:
        turn = narrating.ask_told(narrating.sample_story(rng), kind)
        return PromptRequest(*turn)
    if kind in ("off topic", "no image"):
        turn = q.ask_off_topic(rng) if kind == "off topic" else q.ask_no_image(rng)
        return PromptRequest(kind, vary(rng, turn[1]), turn[2])
    first, *others = medium.scenes
    if kind == "segment":
        turn = narrating.ask_segment(rng, first)
    elif kind == "empty":
        turn = q.ask_empty(rng, first)
    elif others:
        turn = q.ask_images(rng, medium.scenes, kind)
    else:
        turn = (q.ask_video if medium.video else q.ask_picture)(rng, first, kind)
    return PromptRequest(kind, vary(rng, turn[1]), turn[2]) if turn else None


def _later(rng: Random, found: list[PromptRequest], turns: int) -> PromptRequest | None:
    """One of the questions again, after others of them."""
    if len(found) < turns:
        return None
    *before, last = rng.sample(found, turns)
    kind = TURNS[turns - 2]
    return PromptRequest(kind, last.text, last.answer, tuple((b.text, b.answer) for b in before))


def make_cases(name: str, count: int, seed: int = 0) -> Iterator[Case]:
    """Cases of a set until each of its kinds has been asked `count` times."""
    asked: Counter[str] = Counter()
    number = 0
    while any(asked[kind] < count for kind in KINDS[name]):
        label = f"evaluation {seed} {name} {number}"
        rng = Random(label)
        medium = _medium(rng, name, number)
        turns = [_ask(rng, medium, kind) for kind in KINDS[name] if not kind.endswith(" turn")]
        found = [turn for turn in turns if turn]
        if name == "pictures":
            found += [turn for n in (2, 3, 4) if (turn := _later(rng, found, n))]
        wanted = tuple(turn for turn in found if asked[turn.kind] < count)
        smooth = name in ("larger", "smaller") or rng.random() < 0.5
        jpeg = rng.randint(60, 95) if name == "pictures" and rng.random() < 0.1 else None
        container = ("mp4", "gif")[number % 2] if name == "films" else None
        number += 1
        if wanted:
            asked.update(turn.kind for turn in wanted)
            yield Case(label, medium, smooth, jpeg, wanted, container)
