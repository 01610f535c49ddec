"""The library as a program meets it: names, errors, asyncio, notebooks."""

import asyncio
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write

import mlx_onevision
from mlx_onevision import errors
from mlx_onevision.api import Model, load
from mlx_onevision.errors import MediaError, OneVisionError, RequestError

ROOT = Path(__file__).parents[1]
PAGE = ROOT.joinpath("docs/python.md").read_text(encoding="utf-8")
PICTURE = np.zeros((40, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with load(write(tmp_path_factory.mktemp("checkpoint"))) as model:
        yield model


# Names and errors.


def test_the_errors_are_exported_and_documented() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, OneVisionError)
    }
    assert defined <= set(mlx_onevision.__all__)
    assert defined - {"OneVisionError"} == set(re.findall(r"`(\w+Error)`(?=[,\w` ]*\|)", PAGE))
    assert mlx_onevision.MediaError is MediaError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "generate and stream have no argument 'temprature'; it may be temper"),
        ({"zzz": 1}, "no argument 'zzz'; see mlx_onevision.Options"),
        ({"temperature": "hot"}, "temperature must be 0 or more, not 'hot'"),
        ({"visual_tokens": "half"}, "visual_tokens must be above 0 and at most 1, not 'half'"),
        ({"stop": 3}, "stop is a int; give a text, or a list of texts"),
        ({"check": 3}, "check is a int; give a function"),
    ],
)
def test_wrong_names_and_types_are_said(model: Model, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate("hello", **given)
    with pytest.raises(RequestError, match=message):
        model.stream(batch=["hello"], **given)[0].result()


@pytest.mark.parametrize("given", [{"memory_limit": "8"}, {"visual_tokens": "half"}])
def test_so_are_those_of_loading(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(given))} must be "):
        load("demo", **given)


def test_a_model_says_what_it_is_and_closes_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    with load(folder, dtype="float16") as model:
        assert repr(model) == f"<Model {folder}, float16>"
        assert model.generate("hello", max_tokens=1, stop=None).tokens
    with pytest.raises(OneVisionError, match="has been closed"):
        model.generate("hello")


# asyncio.


def test_asynchronous_calls_give_what_the_others_give(model: Model) -> None:
    asked: dict[str, Any] = {"images": [PICTURE], "max_tokens": 6, "temperature": 0}
    expected = model.generate("hello", **asked)

    async def answers() -> None:
        one, other = await asyncio.gather(
            model.agenerate("hello", **asked), model.agenerate("hello", **asked)
        )
        assert one.text == other.text == expected.text  # pyright: ignore
        pieces = [piece async for piece in model.astream("hello", **asked)]
        assert "".join(pieces) == expected.text
        batch = await model.agenerate(batch=["hello", "there"], max_tokens=3)
        assert [len(answer.tokens) for answer in batch] == [3, 3]  # pyright: ignore
        vectors = await model.aembed([PICTURE])
        assert np.array_equal(vectors.vectors, model.embed([PICTURE]).vectors)
        with pytest.raises(RequestError, match="no argument 'temprature'"):
            await model.agenerate("hello", temprature=1)
        with pytest.raises(MediaError):
            async for _ in model.astream("hello", images=["missing.png"]):
                pass

    asyncio.run(answers())


def test_a_cancelled_task_cancels_its_request(model: Model) -> None:
    begun, ended = threading.Event(), threading.Event()

    def check() -> None:
        begun.set()

    async def waiting() -> None:
        task = asyncio.create_task(model.agenerate("hello", max_tokens=30_000))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = model.astream("hello", max_tokens=30_000)
        await anext(stream)
        await stream.aclose()
        pictures = [np.full((40, 50, 3), n % 256, np.uint8) for n in range(30_000)]
        task = asyncio.create_task(model.aembed(pictures, check=check))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ended.set()

    asyncio.run(waiting())
    assert ended.is_set()
    # Nobody is being answered any more.
    assert model.generate("hello", max_tokens=2).usage.completion_tokens == 2


# Notebooks, and the page.


def test_an_answer_and_vectors_show_well(model: Model) -> None:
    answer = model.generate("hello", max_tokens=3)
    shown = type(answer)("<b>&", (1,), "stop", answer.usage, ("a note <",))._repr_html_()
    assert "&lt;b&gt;&amp;" in shown and "a note &lt;" in shown and "<b>" not in shown
    vectors = model.embed([PICTURE] * 2)
    assert repr(vectors).startswith("<Embeddings: 2 of 64 values, vision space of ")
    assert len(repr(vectors)) < 200
    assert "2 vectors of 64 values" in vectors._repr_html_()


def test_the_page_s_program_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks, one after another, with the demo model."""
    monkeypatch.chdir(ROOT)
    program = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(program) == 9
    names: dict[str, object] = {"__name__": "__main__"}
    for block in program:
        exec(compile(block, "python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "The circle moves" in printed
    assert "unsupported_media" in printed and "missing.png" in printed
    assert "A red circle, a blue star and an orange triangle." in printed
