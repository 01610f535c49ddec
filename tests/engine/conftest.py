"""What tests of batches share."""

from dataclasses import replace
from pathlib import Path

import pytest
from engine.batches import ROWS, TOKENS

from mlx_onevision.api import Model
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.runner import Runner
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[int, ...]]:
    """The greedy answer to each row, asked by itself."""
    return [model.generate(messages=row, max_tokens=TOKENS).tokens for row in ROWS]


@pytest.fixture(scope="module")
def inputs(folder: Path) -> list[Inputs]:
    processor = Processor.from_folder(folder, load_checkpoint(folder).config)
    return [processor.prepare(normalise_messages(messages=row)) for row in ROWS]


@pytest.fixture
def runner(folder: Path) -> Runner:
    runner = Runner(load_checkpoint(folder))
    runner.model.budget = replace(runner.model.budget, chunk=2048)
    return runner
