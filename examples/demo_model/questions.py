"""Questions about scenes, each with its one right answer; nothing ambiguous is ever asked.

A question is (kind, question, answer). Kinds are what accuracy is reported by. Phrasings vary
(`phrases.py`); an answer has one form only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random

from examples.demo_model.offtopic import ANSWER, off_topic
from examples.demo_model.phrases import (
    COLOUR,
    COUNT,
    EACH,
    EXISTS,
    IMAGES,
    LIST,
    MOTION,
    NUMBER,
    SHAPE,
    WHERE,
    WHICH_IMAGE,
)
from examples.demo_model.world import COLOURS, KINDS, ORDER_GAP, Scene, Shape, region

Turn = tuple[str, str, str]

IMAGE_KINDS = ("list", "count", "colour", "shape", "where")
EXTRA_KINDS = ("exists", "absent", "number", "no image", "empty", "off topic")
MULTI_KINDS = ("which image", "images", "each image")
VIDEO_KINDS = ("motion", "segment")
NO_SHAPES = "There are no shapes."

NUMBERS = ("no", "one", "two", "three", "four")
ORDINALS = ("first", "second", "third", "fourth")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(shapes: Sequence[Shape]) -> str:
    """ "a red circle, a blue star and a green square"."""
    return listed([article(shape.name) for shape in shapes])


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def there_are(number: int, noun: str) -> str:
    if number == 1:
        return f"There is one {noun}."
    return f"There are {NUMBERS[number]} {noun}s."


def nouns(scene: Scene, shape: Shape) -> list[str]:
    """The ways to name one shape that fit no other of the scene."""
    found = [shape.name]
    if sum(other.kind == shape.kind for other in scene.shapes) == 1:
        found += [shape.kind, shape.kind]
    if sum(other.colour == shape.colour for other in scene.shapes) == 1:
        found.append(f"{shape.colour} shape")
    return found


def ask_list(rng: Random, scene: Scene) -> Turn | None:
    return "list", rng.choice(LIST), sentence(listing(scene.shapes))


def ask_count(rng: Random, scene: Scene) -> Turn | None:
    return "count", rng.choice(COUNT), there_are(len(scene.shapes), "shape")


def ask_colour(rng: Random, scene: Scene) -> Turn | None:
    kinds = [shape.kind for shape in scene.shapes]
    single = [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]
    if not single:
        return None
    shape = rng.choice(single)
    return "colour", rng.choice(COLOUR).format(k=shape.kind), f"The {shape.kind} is {shape.colour}."


def ask_shape(rng: Random, scene: Scene) -> Turn | None:
    colours = [shape.colour for shape in scene.shapes]
    single = [shape for shape in scene.shapes if colours.count(shape.colour) == 1]
    if not single:
        return None
    shape = rng.choice(single)
    answer = f"The {shape.colour} shape is {article(shape.kind)}."
    return "shape", rng.choice(SHAPE).format(c=shape.colour), answer


def ask_where(rng: Random, scene: Scene) -> Turn | None:
    clear = [shape for shape in scene.shapes if region(shape.x, shape.y)]
    if not clear:
        return None
    shape = rng.choice(clear)
    noun = rng.choice(nouns(scene, shape))
    place = PLACES[region(shape.x, shape.y) or ""]
    return "where", rng.choice(WHERE).format(n=noun), f"The {noun} is {place}."


def _stranger(rng: Random, scenes: Sequence[Scene]) -> str | None:
    """A noun that fits no shape of the scenes."""
    shapes = [shape for scene in scenes for shape in scene.shapes]
    for _ in range(6):
        kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
        noun = rng.choice((kind, f"{colour} {kind}", f"{colour} shape"))
        if not any(noun in (s.kind, s.name, f"{s.colour} shape") for s in shapes):
            return noun
    return None


def ask_exists(rng: Random, scene: Scene) -> Turn | None:
    if rng.random() < 0.5:
        noun = rng.choice(nouns(scene, rng.choice(scene.shapes)))
        answer = f"Yes, there is {article(noun)}."
    else:
        found = _stranger(rng, (scene,))
        if found is None:
            return None
        noun, answer = found, f"No, there is no {found}."
    return "exists", rng.choice(EXISTS).format(a=article(noun)), answer


def ask_absent(rng: Random, scene: Scene) -> Turn | None:
    noun = _stranger(rng, (scene,))
    if noun is None:
        return None
    if noun.endswith(" shape") and rng.random() < 0.6:
        question = rng.choice(SHAPE).format(c=noun.removesuffix(" shape"))
    elif noun in KINDS and rng.random() < 0.6:
        question = rng.choice(COLOUR).format(k=noun)
    else:
        question = rng.choice(WHERE).format(n=noun)
    return "absent", question, f"There is no {noun}."


def ask_number(rng: Random, scene: Scene) -> Turn | None:
    shape = rng.choice(scene.shapes)
    if rng.random() < 0.25:
        noun = _stranger(rng, (scene,))
        if noun is None:
            return None
    else:
        noun = rng.choice((shape.kind, shape.kind, f"{shape.colour} shape", shape.name))
    number = sum(noun in (s.kind, s.name, f"{s.colour} shape") for s in scene.shapes)
    return "number", rng.choice(NUMBER).format(p=noun + "s"), there_are(number, noun)


Asker = Callable[[Random, Scene], Turn | None]
ASKERS: dict[str, Asker] = {
    "list": ask_list,
    "count": ask_count,
    "colour": ask_colour,
    "shape": ask_shape,
    "where": ask_where,
    "exists": ask_exists,
    "absent": ask_absent,
    "number": ask_number,
}


def ask_picture(rng: Random, scene: Scene, kind: str) -> Turn | None:
    """A question of one kind about one picture, or None where the picture allows none."""
    return ASKERS[kind](rng, scene)


def ask_no_image(rng: Random) -> Turn:
    """Any question, without a picture to look at."""
    kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
    noun = rng.choice((kind, kind, f"{colour} {kind}", f"{colour} shape"))
    asked = rng.choice((LIST, LIST, COUNT, WHERE, COLOUR, SHAPE, EXISTS, NUMBER, MOTION))
    words = {"k": kind, "c": colour, "n": noun, "a": article(noun), "p": noun + "s"}
    return "no image", rng.choice(asked).format(**words), "There is no image."


def ask_empty(rng: Random, scene: Scene) -> Turn | None:
    """A question about a picture without a shape."""
    kind = rng.choice(("list", "list", "count", "exists", "absent", "number"))
    if kind == "list":
        return "empty", rng.choice(LIST), NO_SHAPES
    if kind == "number":
        noun = _stranger(rng, (scene,)) or ""
        return "empty", rng.choice(NUMBER).format(p=noun + "s"), there_are(0, noun)
    if kind == "exists":
        noun = _stranger(rng, (scene,)) or ""
        return "empty", rng.choice(EXISTS).format(a=article(noun)), f"No, there is no {noun}."
    turn = ASKERS[kind](rng, scene)
    return ("empty", *turn[1:]) if turn else None


def ask_off_topic(rng: Random) -> Turn:
    return "off topic", off_topic(rng), ANSWER


def ask_images(rng: Random, scenes: Sequence[Scene], kind: str) -> Turn | None:
    """A question about two to four pictures; kinds of one picture ask about one of them."""
    if kind == "images":
        return "images", rng.choice(IMAGES), there_are(len(scenes), "image")
    if kind == "each image":
        parts = [f"{ORDINALS[i]}, {listing(scene.shapes)}" for i, scene in enumerate(scenes)]
        return "each image", rng.choice(EACH), sentence("; ".join(parts))
    index = rng.randrange(len(scenes))
    if kind == "which image":
        noun = rng.choice(nouns(scenes[index], rng.choice(scenes[index].shapes)))
        shapes = [shape for scene in scenes for shape in scene.shapes]
        if sum(noun in (s.kind, s.name, f"{s.colour} shape") for s in shapes) != 1:
            return None
        question = rng.choice(WHICH_IMAGE).format(n=noun)
        return kind, question, f"The {ORDINALS[index]} image has the {noun}."
    turn = ask_picture(rng, scenes[index], kind)
    if turn is None:
        return None
    return turn[0], _about(rng, turn[1], ORDINALS[index]), turn[2]


def _about(rng: Random, question: str, ordinal: str) -> str:
    """The question with "in the second image" in its place."""
    for here in (" in this image", " in the image", " in this picture", " in the picture"):
        question = question.replace(here, "")
    picture = "image" if rng.random() < 0.8 else "picture"
    for whole in ("this image", "the image", "this picture", "the picture"):
        if whole in question:
            return question.replace(whole, f"the {ordinal} {picture}")
    return f"{question[:-1]} in the {ordinal} {picture}{question[-1]}"


def ask_motion(rng: Random, scene: Scene) -> Turn | None:
    moving = [shape for shape in scene.shapes if shape.motion]
    still = [shape for shape in scene.shapes if not shape.motion]
    shape = rng.choice(still if still and (not moving or rng.random() < 0.2) else moving)
    noun = rng.choice(nouns(scene, shape))
    motion = shape.motion or ""
    if " to " in motion:
        answer = f"The {noun} moves from {motion}."
    elif motion in ("up", "down"):
        answer = f"The {noun} moves {motion}."
    elif not motion:
        answer = f"The {noun} stays still."
    else:
        answer = f"The {noun} {motion}."
    return "motion", rng.choice(MOTION).format(n=noun), answer


def ask_video(rng: Random, scene: Scene, kind: str) -> Turn | None:
    """A question about a video: how something moves, or a still question that time leaves alone."""
    if kind == "motion":
        return ask_motion(rng, scene)
    if kind == "where":
        return None
    if kind == "list":
        ends = [shape.at(1.0)[0] for shape in scene.shapes]
        starts = [shape.x for shape in scene.shapes]
        for xs in (starts, ends):
            if any(b - a < ORDER_GAP for a, b in pairwise(xs)):
                return None
    turn = ask_picture(rng, scene, kind)
    if turn is None:
        return None
    return turn[0], of_video(turn[1]), turn[2]


def of_video(question: str) -> str:
    """The question about a picture, asked about a video."""
    return question.replace("image", "video").replace("picture", "video")
