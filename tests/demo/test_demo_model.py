"""The model inside the package: that it is right about drawings, small, and made by its program."""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open

from examples.demo_model.answering import conversation
from examples.demo_model.cases import SINGLE, Case, PromptRequest, make_cases
from examples.demo_model.evaluate import table
from examples.demo_model.files import json_files
from examples.demo_model.samples import TURNS
from examples.demo_model.words import build_tokenizer, special_ids
from mlx_onevision import Model, load

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mlx_onevision" / "demo"
SHAPES = ROOT / "examples" / "shapes.png"


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    loaded = load("demo")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def drawings() -> list[tuple[Case, PromptRequest]]:
    """Three drawings for each kind of question: sizes of 64 to 2000 pixels, one to four shapes."""
    cases = make_cases("pictures", 40, seed=1)
    found = []
    for kind in SINGLE * 3:
        case = next(case for case in cases if any(q.kind == kind for q in case.questions))
        found.append((case, next(q for q in case.questions if q.kind == kind)))
    return found


@pytest.mark.parametrize("number", range(24))
def test_fixed_drawings(
    model: Model, drawings: list[tuple[Case, PromptRequest]], number: int, tmp_path: Path
) -> None:
    case, question = drawings[number]
    images = [{"type": "image", "path": str(path)} for path in case.write(tmp_path)]
    assert model.generate(messages=conversation(question, images)).text == question.answer


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is in the image?", "A red circle, a blue star and an orange triangle."),
        ("How many shapes are there?", "There are three shapes."),
        ("What color is the star?", "The star is blue."),
        ("Which shape is red?", "The red shape is a circle."),
        ("Where is the triangle?", "The triangle is on the right."),
        ("Is there a star?", "Yes, there is a star."),
        ("Where is the square?", "There is no square."),
    ],
)
def test_the_picture_of_the_readme(model: Model, question: str, answer: str) -> None:
    assert model.generate(question, images=[SHAPES]).text == answer


def test_several_images_and_none(model: Model) -> None:
    drawn = {}
    for case in make_cases("several", 4, seed=1):
        for question in case.questions:
            drawn.setdefault(question.kind, (case, question))
    for case, question in drawn.values():
        answer = model.generate(question.text, images=case.draw()).text
        assert answer == question.answer
    assert model.generate("What is in the image?").text == "There is no image."


@pytest.mark.parametrize(
    ("name", "kinds", "count", "seed"),
    [
        ("words", ("title", "summary", "off topic", "no image"), 4, 1),
        ("empty", ("empty",), 3, 5),  # whose textures, which take long to draw, are small
        ("pictures", ("off topic", *TURNS), 2, 1),
    ],
)
def test_what_it_was_taught_last(
    model: Model, name: str, kinds: tuple[str, ...], count: int, seed: int, tmp_path: Path
) -> None:
    """At most one question in ten is answered otherwise than with the one right sentence."""
    asked = [
        (case, question)
        for kind in kinds
        for case, question in islice(
            (
                (case, question)
                for case in make_cases(name, count, seed)
                for question in case.questions
                if question.kind == kind
            ),
            count,
        )
    ]
    wrong = []
    for number, (case, question) in enumerate(asked):
        (folder := tmp_path / str(number)).mkdir()
        images = [{"type": "image", "path": str(path)} for path in case.write(folder)]
        answer = model.generate(messages=conversation(question, images)).text
        if answer != question.answer:
            wrong.append((case.name, question, answer))
    assert len(asked) == len(kinds) * count
    assert len(wrong) <= len(asked) / 10, wrong


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 6_000_000


def test_the_files_are_what_the_program_writes() -> None:
    tokenizer = build_tokenizer()
    kept = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    made = json.loads(tokenizer.to_str())
    for part in ("vocab", "merges"):
        assert made["model"][part] == kept["model"][part]
    written = json_files(special_ids(tokenizer), "bfloat16")
    for name, content in written.items():
        assert json.loads((DEMO / name).read_text(encoding="utf-8")) == content, name
    there = {path.name for path in DEMO.iterdir() if not path.name.startswith(".")}
    assert there == {*written, "tokenizer.json", "model.safetensors", "README.md"}


def test_the_weights_are_of_one_type_and_as_many_as_the_card_says() -> None:
    with safe_open(DEMO / "model.safetensors", "numpy") as file:
        slices = [file.get_slice(name) for name in file.keys()]
        assert {part.get_dtype() for part in slices} == {"BF16"}
        count = sum(math.prod(part.get_shape()) for part in slices)
    assert f"{count:,} parameters" in (DEMO / "README.md").read_text(encoding="utf-8")


def test_the_card_has_the_measured_figures() -> None:
    measured = json.loads((ROOT / "examples" / "demo_model" / "results.json").read_text())
    assert table(measured["sets"]) in (DEMO / "README.md").read_text(encoding="utf-8")
