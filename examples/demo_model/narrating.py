"""What happens in a clip, and what the captions of a video come to: a summary, a title.

The questions are the package's own (`describe.narration`); the answers follow rules that are
short enough to be learnt. A caption tells of what moves, from left to right, then of what stays
still: "A red circle moves right, and a blue star stays still." A summary takes the first thing of
each caption, leaves out what it has just said, and of more than three keeps the first two and the
last. A title names one thing and what it does, or the first thing and the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from examples.demo_model.questions import NO_SHAPES, Turn, article, listed, sentence
from examples.demo_model.world import COLOURS, KINDS, MOTIONS, ORDER_GAP, Scene
from mlx_onevision.describe.outline import SEGMENT, summary_question, title_question

SEGMENTS = (
    *(SEGMENT,) * 12,
    "What happens in this video?",
    "What happens in the video?",
    "What happens?",
    "What is happening in this video?",
    "Describe what happens in this video.",
    "Describe what happens.",
)
TOLD_KINDS = ("title", "summary")
CAPTIONS = 14  # at most; as many as there is room for
_LATEST = 0.3  # of a motion may have passed at the first frame
_DOES = {
    "left to right": ("moves right", "moving right"),
    "right to left": ("moves left", "moving left"),
    "up": ("moves up", "moving up"),
    "down": ("moves down", "moving down"),
    "grows": ("gets bigger", "getting bigger"),
    "shrinks": ("gets smaller", "getting smaller"),
    "": ("stays still", "staying still"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing and its motion, or everything that stays still; no names where there is nothing."""

    names: tuple[str, ...]
    motion: str = ""

    @property
    def clause(self) -> str:
        """ "a red circle moves right"."""
        if not self.names:
            return "there are no shapes"
        what = listed([article(name) for name in self.names])
        return f"{what} {_DOES[self.motion][0] if len(self.names) == 1 else 'stay still'}"

    @property
    def subject(self) -> str:
        return self.names[0] if self.names else "no shapes"


Caption = tuple[Event, ...]


def caption_text(caption: Caption) -> str:
    """ "A red circle moves right, and a blue star stays still."."""
    *others, last = [event.clause for event in caption]
    return sentence(", ".join([*others, f"and {last}"]) if others else last)


def scene_caption(scene: Scene) -> Caption | None:
    """What happens in a video; None where it is not clear which of two is on the left."""
    moving = [shape for shape in scene.shapes if shape.motion]
    for time in (0.0, _LATEST):
        xs = [shape.at(time)[0] for shape in moving]
        if any(b - a < ORDER_GAP for a, b in pairwise(xs)):
            return None
    found = [Event((shape.name,), shape.motion or "") for shape in moving]
    still = tuple(shape.name for shape in scene.shapes if not shape.motion)
    return (*found, Event(still)) if still or not found else tuple(found)


def ask_segment(rng: Random, scene: Scene) -> Turn | None:
    caption = scene_caption(scene)
    return ("segment", rng.choice(SEGMENTS), caption_text(caption)) if caption else None


def sample_caption(rng: Random) -> Caption:
    """A caption as videos have them, without one."""
    count = rng.choices((0, 1, 2, 3), (1, 8, 6, 3))[0]
    names: list[str] = []
    while len(names) < count:
        name = f"{rng.choice(tuple(COLOURS))} {rng.choice(KINDS)}"
        if name not in names:
            names.append(name)
    moving = 0 if not count or rng.random() < 0.15 else rng.randint(1, count)
    found = [Event((name,), rng.choice(MOTIONS)) for name in names[:moving]]
    still = tuple(names[moving:])
    return (*found, Event(still)) if still or not found else tuple(found)


def sample_story(rng: Random) -> list[Caption]:
    """Captions of the segments of a video, in order; some scenes go on for more than one."""
    count = rng.choices((1, 2, 3, rng.randint(4, 8), rng.randint(9, CAPTIONS)), (4, 5, 4, 7, 3))[0]
    again = rng.choice((0.0, 0.0, 0.1, 0.3, 0.6))
    story: list[Caption] = []
    while len(story) < count:
        fresh = not story or rng.random() >= again
        story.append(sample_caption(rng) if fresh else story[-1])
    return story


def summary(story: Sequence[Caption]) -> str:
    """ "A red circle moves right, then a green square gets smaller."."""
    clauses: list[str] = []
    for first, *_ in story:
        if clauses[-1:] != [first.clause]:
            clauses.append(first.clause)
    if len(clauses) <= 3:
        return sentence(", then ".join(clauses))
    return sentence(f"{clauses[0]}, then {clauses[1]}, and at the end {clauses[-1]}")


def title(story: Sequence[Caption]) -> str:
    """ "Red circle moving right", "Red circle, then blue star"; as titles are, without a stop."""
    first, last = story[0][0], story[-1][0]
    if first.subject != last.subject:
        text = f"{first.subject}, then {last.subject}"
    else:
        text = f"{first.subject} {_DOES[first.motion][1]}" if first.names else first.subject
    return text[0].upper() + text[1:]


def ask_told(story: Sequence[Caption], kind: str) -> Turn:
    """A question about captions, as the package words it."""
    captions = [caption_text(caption) for caption in story]
    if kind == "title":
        return kind, title_question(captions), title(story)
    return kind, summary_question(captions), summary(story)


def ask_empty(rng: Random) -> Turn:
    """What happens in a video of nothing."""
    return "empty", rng.choice(SEGMENTS), NO_SHAPES
