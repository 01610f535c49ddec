"""What the tests look at in a loaded checkpoint, and how they spoil one."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.errors import CheckpointError
from mlx_onevision.network.onevision import OneVision

IDS = [[1, 7, 200, 319, 5, 90, 2, 33]]


def logits(model: OneVision) -> np.ndarray:
    return np.array(model(mx.array(IDS)))


def features(model: OneVision, edge: int = 28) -> np.ndarray:
    """The projected features of a fixed tile: they depend on every vision weight."""
    pixels = mx.arange(edge * edge * 3).reshape(1, edge, edge, 3) % 255 / 127.5 - 1
    return np.array(model.multi_modal_projector(model.vision_features(pixels)).astype(mx.float32))


def dtypes(model: OneVision) -> set[mx.Dtype]:
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {value.dtype for value in parameters.values()}


def edit(folder: Path, file: str = "config.json", **values: Any) -> Path:
    """Changes fields of a JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refusal(folder: Path, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as refused:
        load_checkpoint(folder)
    message = str(refused.value)
    assert len(message) < 400 and "\n" not in message
    return message
