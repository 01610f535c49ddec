"""The steps of a request that runs alone are mlx-lm's, and so is what is imported of it."""

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write

from mlx_onevision.api import load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.decode import decode_steps
from mlx_onevision.errors import RequestError
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.sampling.sampler import Sampling

PROMPTS = [[5], [5, 6], list(range(5, 40)), [7, 9] * 40]

ALONE = """
import sys
from mlx_onevision.api import load
with_penalty = {"repetition_penalty": 1.1, "temperature": 0.5, "top_p": 0.9, "top_k": 5}
model = load(sys.argv[1])
model.generate("hello", max_tokens=3, seed=1, **with_penalty)
assert "transformers" not in sys.modules, "transformers was imported"
import mlx_lm.generate
from mlx_lm import *
assert callable(generate) and callable(load)
import mlx_lm
assert callable(mlx_lm.generate) and mlx_lm.__version__ and mlx_lm.models.cache and mlx_lm.utils
assert "transformers" in sys.modules
assert len(model.generate(batch=["hello", "there"], max_tokens=3)) == 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tied=False)


@pytest.fixture(scope="module")
def network(folder: Path) -> OneVision:
    return load_checkpoint(folder).model


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.5, seed=3),
        Sampling(temperature=1.5, seed=3, top_p=0.9, top_k=20, repetition_penalty=1.1),
    ],
)
@pytest.mark.parametrize("chunk", [8, 256])
def test_tokens_and_cache_are_those_of_mlx_lm(
    network: OneVision, sampling: Sampling, chunk: int
) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    vocab_size = network.config.text_config.vocab_size
    for prompt in PROMPTS:
        theirs, ours = make_prompt_cache(network), make_prompt_cache(network)
        expected = generate_step(
            mx.array(prompt, mx.int32),
            network,
            max_tokens=12,
            sampler=sampling.sampler(),
            logits_processors=sampling.logits_processors(vocab_size, 4),
            prompt_cache=theirs,
            prefill_step_size=chunk,
        )
        steps = decode_steps(
            network,
            prompt,
            ours,
            sampling.sampler(),
            sampling.logits_processors(vocab_size, 4),
            normalise=not sampling.is_greedy,
            chunk=chunk,
            check=lambda: None,
        )
        assert list(islice(steps, 12)) == [token for token, _ in expected]
        assert {layer.offset for layer in ours} == {layer.offset for layer in theirs}


def test_a_lone_request_imports_no_transformers(folder: Path) -> None:
    """It is most of a cold command's time; and mlx_lm is whole for whoever else imports it."""
    subprocess.run([sys.executable, "-c", ALONE, str(folder)], check=True, timeout=120)


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
