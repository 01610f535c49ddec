"""Teaches the demo model a fifth shape, the heart, from 400 drawings.

python examples/train_demo.py FOLDER

Writes drawings and rows into FOLDER, an adapter into FOLDER/adapter and the fused model into
FOLDER/fused, and prints how many of 200 hearts and 200 old shapes, drawn anew, are named right.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

from mlx_onevision import load
from mlx_onevision.convert.conversion import convert
from mlx_onevision.train.loop import Settings
from mlx_onevision.train.parts import Trained
from mlx_onevision.train.train import Task, prepare, train

COLOURS = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (37, 99, 235),
    "yellow": (250, 220, 30),
    "orange": (249, 115, 22),
    "purple": (147, 51, 234),
    "black": (20, 20, 20),
}
OLD = ["circle", "square", "triangle", "star"]
CORNERS = {"square": (4, math.sqrt(0.5)), "triangle": (3, 0.5), "star": (5, 0.4)}
QUESTION = "What is in the image?"
EDGE, FINE = 56, 8  # pixels of a drawing; samples a pixel and axis


def outline(kind: str, angle: float) -> list[tuple[float, float]]:
    """Corners within a circle of radius 1."""
    if kind == "heart":
        steps = [n * math.tau / 60 for n in range(60)]
        points = [
            (
                16 * math.sin(t) ** 3 / 17,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 17,
            )
            for t in steps
        ]
    else:
        count, inner = CORNERS.get(kind, (60, 1.0))  # a circle is a polygon of many corners
        points = []
        for n in range(2 * count):
            length = inner if n % 2 else 1.0
            turn = n * math.pi / count + (math.pi / 4 if kind == "square" else 0)
            points.append((length * math.sin(turn), -length * math.cos(turn)))
    sin, cos = math.sin(angle), math.cos(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def draw(kind: str, rng: random.Random) -> tuple[Image.Image, str]:
    """A drawing of one shape, and the right answer."""
    colour = rng.choice(list(COLOURS))
    level = rng.randint(235, 255)
    image = Image.new("RGB", (EDGE * FINE, EDGE * FINE), (level, level, level))
    radius = rng.uniform(0.2, 0.4) * EDGE * FINE
    x, y = (rng.uniform(radius, EDGE * FINE - radius) for _ in "xy")
    points = [(x + radius * u, y + radius * v) for u, v in outline(kind, rng.gauss(0, 0.12))]
    ImageDraw.Draw(image).polygon(points, COLOURS[colour])
    article = "An" if colour == "orange" else "A"
    return image.reduce(FINE), f"{article} {colour} {kind}."


def write_rows(folder: Path, kinds: list[str], rng: random.Random) -> Path:
    """One row a drawing, in a file beside them."""
    rows = []
    for number, kind in enumerate(kinds):
        image, answer = draw(kind, rng)
        image.save(folder / f"{number}.png")
        turns = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": answer},
        ]
        rows.append(json.dumps({"messages": turns, "images": [f"{number}.png"]}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


def answers(kinds: list[str], model: Path | str, adapter: Path | None = None) -> list[str]:
    """What a model says of drawings that it was not trained on."""
    rng = random.Random(1)
    asked = []
    for kind in kinds:
        blocks = [
            {"type": "image", "image": draw(kind, rng)[0]},
            {"type": "text", "text": QUESTION},
        ]
        asked.append([{"role": "user", "content": blocks}])
    loaded = load(model, adapter=adapter, dtype="float32")
    found = []
    for first in range(0, len(asked), 50):
        found += loaded.generate(batch=asked[first : first + 50], max_tokens=16)
    loaded.close()
    return [answer.text for answer in found]


def count(found: list[str], wanted: list[str]) -> str:
    equal = sum(one == other for one, other in zip(found, wanted, strict=True))
    return f"{equal} of {len(wanted)}"


def main(given: str, drawings: str = "400", held: str = "200", epochs: str = "6") -> None:
    folder, number = Path(given), int(drawings)
    folder.mkdir(parents=True, exist_ok=True)
    old = [OLD[n % 4] for n in range(number // 2)]
    data = write_rows(folder, old + ["heart"] * (number - len(old)), random.Random(0))
    task = Task(
        model="demo",
        data=data,
        output=folder / "adapter",
        cache=folder / "features",
        dtype="float32",
        settings=Settings(
            trained=Trained(parts=("language", "projector"), rank=16),
            steps=max(1, int(epochs) * number // 8),
            batch=8,
            learning_rate=3e-3,
            warmup=5,
        ),
    )
    started = time.perf_counter()
    prepared = prepare(task, print)
    train(task, prepared, print, lambda line: print(f"step {line['step']}: {line['loss']:.4f}"))
    print(f"trained in {time.perf_counter() - started:.0f} s")
    fused = convert("demo", folder / "fused", adapter=task.output, dtype="float32").target
    for name, kinds in (("hearts", ["heart"]), ("old shapes", OLD)):
        tested = (kinds * int(held))[: int(held)]
        rng = random.Random(1)
        wanted = [draw(kind, rng)[1] for kind in tested]
        before, after = (answers(tested, "demo", adapter) for adapter in (None, task.output))
        print(f"{name}: {count(before, wanted)} right before, {count(after, wanted)} after")
        print(f"{name}: the fused model says the same of {count(answers(tested, fused), after)}")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
