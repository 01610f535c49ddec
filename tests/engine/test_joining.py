"""Answers that are asked for one by one, from any thread, and run together: each is what it would
have been alone.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write

from mlx_onevision.api import Model, load
from mlx_onevision.engine.generation import Stream
from mlx_onevision.engine.options import Options

PICTURE = np.random.default_rng(5).integers(0, 256, (150, 200, 3), dtype=np.uint8)

QUESTIONS: list[tuple[dict[str, Any], Options]] = [
    ({"prompt": "tell me a long story"}, {"max_tokens": 48}),
    ({"prompt": "what is it", "images": [PICTURE]}, {"max_tokens": 20}),
    ({"prompt": "one two three " * 90}, {"max_tokens": 30, "temperature": 2.0, "seed": 7}),
    ({"prompt": "and this", "images": [PICTURE[:40]]}, {"max_tokens": 9}),
    (
        {"prompt": "the last one"},
        {"max_tokens": 24, "temperature": 1.5, "seed": 8, "repetition_penalty": 1.4},
    ),
    (
        {"prompt": "again and again"},
        {"max_tokens": 24, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {5: 2}},
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = load(write(tmp_path_factory.mktemp("checkpoint"), tied=False))
    yield model
    model.close()


def begun(model: Model, question: dict[str, Any], options: Options) -> Stream:
    """An answer of which some has come already."""
    stream = model.stream(**question, **options)
    next(stream)
    return stream


@pytest.mark.parametrize("first", (0, 2, 4, 5))
def test_company_changes_no_answer(model: Model, first: int) -> None:
    order = QUESTIONS[first:] + QUESTIONS[:first]
    alone = [model.generate(**question, **options) for question, options in order]
    streams = [begun(model, *order[0])]
    streams += [model.stream(**question, **options) for question, options in order[1:]]
    for stream, expected in zip(streams, alone, strict=True):
        answer = stream.result()
        assert answer.tokens == expected.tokens and answer.text == expected.text
        assert answer.finish_reason == expected.finish_reason
        assert answer.usage.completion_tokens == len(answer.tokens)
        assert answer.usage.prefill_seconds > 0 and answer.usage.decode_seconds > 0


def test_they_run_together(model: Model) -> None:
    """Each newcomer is heard before the first, long answer has ended."""
    expected = model.generate("a long story", max_tokens=150).tokens
    long = begun(model, {"prompt": "a long story"}, {"max_tokens": 150})
    for name in ("second", "third"):
        assert model.generate(name, max_tokens=4).usage.completion_tokens == 4
        assert long._active is not None
        assert long._active.counters.completion_tokens < 150
    assert long.result().tokens == expected


def test_afterwards_a_conversation_is_kept_again(model: Model) -> None:
    first = begun(model, *QUESTIONS[0])
    assert model.generate("company", max_tokens=4).usage.completion_tokens == 4
    first.result()
    messages = [{"role": "user", "content": "so many words " * 40}]
    answer = model.generate(messages=messages, max_tokens=8)
    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "go on"},
    ]
    assert model.generate(messages=messages, max_tokens=8).usage.cached_tokens > 64


def test_other_work_takes_its_turn(model: Model) -> None:
    """What is asked for after a vector does not get in before it."""
    long = begun(model, {"prompt": "a long story"}, {"max_tokens": 150})
    engine = model._engine
    content = [{"type": "image", "image": PICTURE}]
    (picture,) = model.prepare([{"role": "user", "content": content}]).media
    vectors = engine.embed_tiles(picture.tiles, picture.normalization)
    after = model.generate("second", max_tokens=4)
    assert vectors.done() and after.usage.completion_tokens == 4
    assert long.result().finish_reason == "length"


def test_cancelling_one_leaves_the_others(model: Model) -> None:
    alone = [model.generate(**question, **options).tokens for question, options in QUESTIONS]
    first = begun(model, *QUESTIONS[0])
    others = [model.stream(**question, **options) for question, options in QUESTIONS[1:]]
    first.cancel()
    others[1].cancel()
    assert first.result().finish_reason == "cancelled"
    assert others[1].result().finish_reason == "cancelled"
    for number in (0, 2, 3):
        assert others[number].result().tokens == alone[number + 1]


def test_many_threads(model: Model) -> None:
    """What each thread is told is the answer to what it asked."""
    prompts = [f"question number {number} " * (1 + number % 7) for number in range(16)]
    expected = [
        model.generate(prompt, max_tokens=12, temperature=2.0, seed=n).tokens
        for n, prompt in enumerate(prompts)
    ]
    found: dict[int, tuple[int, ...]] = {}

    def ask(number: int) -> None:
        answer = model.generate(prompts[number], max_tokens=12, temperature=2.0, seed=number)
        found[number] = answer.tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(prompts))] == expected


def test_closing_ends_them_all(tmp_path: Path) -> None:
    model = load(write(tmp_path, tied=False))
    streams = [begun(model, *QUESTIONS[0])]
    streams += [model.stream(**question, **options) for question, options in QUESTIONS[1:]]
    model.close()
    for stream in streams:
        assert stream.result().finish_reason in ("cancelled", "length")
