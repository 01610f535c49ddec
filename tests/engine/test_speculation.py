"""Speculative decoding: the same greedy answers in fewer steps."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write

from mlx_onevision.api import load
from mlx_onevision.errors import RequestError
from mlx_onevision.network.onevision import OneVision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tied=False)


def test_prompt_lookup_answers_the_same(folder: Path) -> None:
    model = load(folder)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    words = ["one", "two", "three", "red", "blue", "where is", "hello"]
    for number in range(12):
        prompt = " ".join(rng.choice(words, 3)) * int(rng.integers(1, 8))
        images = [image] if number % 3 == 0 else []
        plain = model.generate(prompt, images=images, max_tokens=24)
        for most in (1, 4, 16):
            found = model.generate(prompt, images=images, max_tokens=24, prompt_lookup=most)
            assert (found.tokens, found.finish_reason) == (plain.tokens, plain.finish_reason)
    follow_up = [
        {"role": "user", "content": "one two three " * 9 + "and what else is there to be seen?"}
    ]
    first = model.generate(messages=follow_up, max_tokens=24, prompt_lookup=8)
    follow_up += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "why"}]
    cold = load(folder).generate(messages=follow_up, max_tokens=24)
    warm = model.generate(messages=follow_up, max_tokens=24, prompt_lookup=8)
    assert warm.tokens == cold.tokens and warm.usage.cached_tokens > 0
    model.close()


def test_prompt_lookup_takes_fewer_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    steps = []
    called = OneVision.__call__

    def counting(self: OneVision, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
        steps.append(inputs.shape[1])
        return called(self, inputs, *args, **options)

    monkeypatch.setattr(OneVision, "__call__", counting)
    answer = model.generate("hello", max_tokens=60)
    repeated = f"{answer.text} {answer.text}"
    counts = []
    for most in (0, 8):
        steps.clear()
        found = model.generate(repeated, max_tokens=60, prompt_lookup=most)
        counts.append((found.tokens, len(steps)))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] < counts[0][1]
    model.close()


@pytest.mark.parametrize(
    "other", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {"logprobs": 1}]
)
def test_prompt_lookup_is_for_greedy_answers(folder: Path, other: dict[str, Any]) -> None:
    model = load(folder)
    with pytest.raises(RequestError, match=f"prompt_lookup .* {next(iter(other))}"):
        model.generate("hello", prompt_lookup=4, **other)
    with pytest.raises(RequestError, match="prompt_lookup must be"):
        model.generate("hello", prompt_lookup=65)
    model.close()
