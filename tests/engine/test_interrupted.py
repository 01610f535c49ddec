"""A prompt that nobody waits for any more is not read to its end, and what was read is right."""

import gc
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write

from mlx_onevision.api import load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine import jobs, pooling
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.request import ActiveRequest, PromptRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor
from mlx_onevision.sampling.sampler import Sampling

TEXTS = ("one two three four five six seven eight nine ten " * 12, "ten nine eight seven " * 35)
TOKENS = 8


class Patient(ActiveRequest):
    """Is content so many times that it is asked, and then wants nothing any more."""

    def __init__(self, prompt: Inputs, times: int = 1 << 30) -> None:
        request = PromptRequest(prompt, Sampling(), TOKENS)
        super().__init__(request, NoText(), TOKENS, (), threading.Event())
        self.times = times
        self.asked = 0
        self.tokens: list[int] = []

    def check(self, *_: object) -> None:
        self.asked += 1
        if self.asked > self.times:
            raise CancelledError("the request was cancelled")

    def accept(self, token: int) -> None:
        super().accept(token)
        self.tokens.append(token)


class NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    runner = Runner(load_checkpoint(write(tmp_path_factory.mktemp("checkpoint"), tied=False)))
    # Each prompt is one chunk, and every layer of it is evaluated by itself.
    runner.chunk = 8192
    runner.model.budget = replace(runner.model.budget, chunk=8192, interval=1, tower_interval=1)
    return runner


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Inputs]:
    folder = write(tmp_path_factory.mktemp("processor"), tied=False)
    processor = Processor.from_folder(Path(folder), load_checkpoint(folder).config)
    return [processor.prepare(normalise_messages(text)) for text in TEXTS]


def answered(runner: Runner, prompts: Sequence[Inputs], patience: Sequence[int]) -> list[Patient]:
    requests = [Patient(*pair) for pair in zip(prompts, patience, strict=True)]
    serve(runner, deque(requests))
    for request in requests:
        assert len(list(request)) == len(request.tokens)  # it has ended, without an error
    return requests


def test_alone(runner: Runner, prompts: list[Inputs]) -> None:
    runner.prefix.clear()
    (whole,) = answered(runner, prompts[:1], [1 << 30])
    layers = len(runner.model.layers)
    assert len(whole.tokens) == TOKENS and layers >= 2
    looks = whole.asked - TOKENS  # those before the first token
    assert looks > layers, "it was not asked between layers"
    for times in range(looks):
        runner.prefix.clear()
        (gone,) = answered(runner, prompts[:1], [times])
        assert gone.tokens == [] and gone.asked == times + 1
        # What it left in the cache, and what it did not, makes the same answer.
        (again,) = answered(runner, prompts[:1], [1 << 30])
        assert again.tokens == whole.tokens


def test_together(runner: Runner, prompts: list[Inputs]) -> None:
    whole = [request.tokens for request in answered(runner, prompts, [1 << 30] * 2)]
    # Both go in the midst of the step that reads their prompts.
    for times in range(4, 4 + len(runner.model.layers) - 1):
        runner.prefix.clear()
        gone, first = answered(runner, prompts, [times, 0])
        assert gone.tokens == first.tokens == [] and gone.asked == times + 1
    # One that stays is answered, whenever the other goes.
    for times in range(8):
        runner.prefix.clear()
        gone, kept = answered(runner, prompts, [times, 1 << 30])
        assert kept.tokens == whole[1] and gone.tokens == whole[0][: len(gone.tokens)]
    after = answered(runner, prompts, [1 << 30] * 2)
    assert [request.tokens for request in after] == whole


def test_vectors(runner: Runner, prompts: list[Inputs]) -> None:
    """And logits: between layers, of the prompts as well as of the tower."""
    asked, most = 0, 1 << 30

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > most:
            raise CancelledError("the request was cancelled")

    def tiles() -> np.ndarray:
        size = runner.model.config.vision_config.image_size
        pixels = np.arange(3 * size * size * 3, dtype=np.uint8).reshape(3, size, size, 3)
        return pooling.tile_vectors(runner, pixels, np.zeros((256, 3), np.float32), check)

    for compute, layers in (
        (lambda: pooling.prompt_vectors(runner, prompts, check), len(runner.model.layers)),
        (tiles, max(runner.model.config.feature_layers)),
        (lambda: jobs.prompt_logits(runner, check, prompts[0], 1), len(runner.model.layers)),
    ):
        asked, most = 0, 1 << 30
        whole = compute()
        looks = asked
        assert looks > layers >= 2, "it was not asked between layers"
        for most in range(looks):
            asked = 0
            with pytest.raises(CancelledError):
                compute()
            assert asked == most + 1
        asked, most = 0, 1 << 30
        assert np.array_equal(compute(), whole)


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_nobody_has_any_more(tmp_path: Path, begun: bool) -> None:
    """Ends its answer at once, without a look for garbage, and before it was ever asked as well."""
    with load(write(tmp_path, tied=False)) as model:
        gc.disable()
        try:
            stream = model.stream("a long story", max_tokens=2000)
            active = stream._active
            assert active is not None
            if begun:
                next(stream)
            del stream
            assert active.is_cancelled
        finally:
            gc.enable()
        assert active.produced < 2000 and model.generate("hello", max_tokens=2).tokens
