"""Tiles of 384 pixels, as in the published checkpoints, and wider layers than the other small
checkpoints: how far float32 is from float64, here and in the reference.
"""

# pyright: reportMissingImports=false
import copy

import numpy as np
import pytest
import torch
from parity.cases import picture, said
from parity.checkpoints import Tiny
from parity.compare import difference
from parity.oracle import Oracle
from parity.pairs import Checkpoints
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

LARGE = Tiny(
    tile=384,
    v_hidden=288,
    v_inter=576,
    v_layers=6,
    hidden=448,
    heads=7,
    kv_heads=1,
    inter=1216,
    layers=6,
)


@pytest.fixture
def exact(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The reference in float64, whose RMSNorm would compute in float32 whatever its type."""

    def norm(module: Qwen2RMSNorm, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return module.weight * (x * torch.rsqrt(variance + module.variance_epsilon))

    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm)
    return copy.deepcopy(checkpoints.oracle(checkpoints.hub(LARGE)).model).double()


def logits(oracle: Oracle, messages: list[dict], model: torch.nn.Module) -> np.ndarray:
    inputs = oracle.prepare(messages)
    pixels = inputs["pixel_values"].to(next(model.parameters()).dtype)
    with torch.inference_mode():
        return model(**{**inputs, "pixel_values": pixels}).logits[0].numpy()


def test_the_distance_from_float64(checkpoints: Checkpoints, exact: torch.nn.Module) -> None:
    """The reference is a little nearer; both are nearer to it than they may be to each other."""
    ours, oracle = checkpoints.pair(LARGE)
    messages = [said("user", picture((384, 384)), "What is it?")]
    expected = logits(oracle, messages, exact)
    theirs = logits(oracle, messages, oracle.model)
    found = ours.model.logits(ours.model.prepare(messages))
    assert difference("from float64", found, expected) <= 5e-5
    assert difference("reference's", theirs, expected) <= 5e-5
    own, reference = (np.sqrt(np.mean((a - expected) ** 2)) for a in (found, theirs))
    assert own <= 2 * reference  # 2.9e-6 and 2.0e-6
