"""The steps of a request that runs alone are mlx-lm's, and so is what is imported of it."""

import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_onevision.api import load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.decode import decode_steps
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
            logits_processors=sampling.logits_processors(vocab_size, prompt),
            prompt_cache=theirs,
            prefill_step_size=chunk,
        )
        steps = decode_steps(
            network,
            prompt,
            ours,
            sampling.sampler(),
            sampling.logits_processors(vocab_size, prompt),
            normalise=not sampling.is_greedy,
            chunk=chunk,
            check=lambda: None,
        )
        assert list(islice(steps, 12)) == [token for token, _ in expected]
        assert {layer.offset for layer in ours} == {layer.offset for layer in theirs}


def test_a_lone_request_imports_no_transformers(folder: Path) -> None:
    """It is most of a cold command's time; and mlx_lm is whole for whoever else imports it."""
    subprocess.run([sys.executable, "-c", ALONE, str(folder)], check=True, timeout=120)


def test_the_first_token_arrives_before_the_next_step_is_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(str(folder))
    call, built = OneVision.__call__, []

    def slow(self: OneVision, ids: mx.array, *args: Any, **options: Any) -> mx.array:
        if ids.size == 1:  # a decode step, built without ever leaving the interpreter lock
            start = time.perf_counter()
            while time.perf_counter() - start < 0.02:
                pass
            built.append(time.perf_counter())
        return call(self, ids, *args, **options)

    monkeypatch.setattr(OneVision, "__call__", slow)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    try:
        early = 0
        for _ in range(9):
            built.clear()
            stream = model.stream("g", max_tokens=3)  # each of the three tokens has a text
            next(iter(stream))
            early += not built or time.perf_counter() < built[0]
            stream.result()
    finally:
        sys.setswitchinterval(interval)
        model.close()
    assert early >= 5
