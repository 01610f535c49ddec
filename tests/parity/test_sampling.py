"""What tokens are drawn from, against transformers' own chain of logits processors."""

# pyright: reportMissingImports=false
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from parity.cases import footage, picture, said
from parity.checkpoints import Tiny
from parity.oracle import Oracle
from parity.pairs import Checkpoints
from transformers import GenerationConfig

from mlx_onevision.sampling.sampler import Sampling

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 0.3, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
]


def processors(oracle: Oracle, prompt: torch.Tensor, **settings: Any) -> Any:
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    return oracle.model._get_logits_processor(config, prompt.shape[1], prompt, None, [])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ties", [False, True], ids=["spread", "ties"])
def test_distribution(checkpoints: Checkpoints, settings: dict[str, Any], ties: bool) -> None:
    """The same tokens are left, with the same probabilities."""
    oracle = checkpoints.oracle(checkpoints.hub(Tiny()))
    logits = np.random.default_rng(5).normal(0, 3, (4, 5000)).astype(np.float32)
    logits = np.round(logits * 8) / 8 if ties else logits  # as logits in bfloat16 are
    prompt = torch.zeros((4, 1), dtype=torch.long)
    scores = processors(oracle, prompt, **settings)(prompt, torch.tensor(logits))
    expected = scores.double().softmax(-1).numpy()
    logprobs = mx.array(logits)
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    found = mx.softmax(Sampling(**settings).filtered(logprobs), axis=-1)
    if ties and "top_p" in settings:
        # Of tokens that tie at top_p's border, the reference leaves as many as its sort has put
        # first, and this package all: up to those, everything is the same.
        border = np.where(expected > 0, logits, np.inf).min(axis=-1, keepdims=True)
        assert ((np.array(found) > 0) == (logits >= border)).all()
    else:
        np.testing.assert_allclose(np.array(found), expected, atol=1e-6)
        assert ((np.array(found) > 0) == (expected > 0)).all()


CONVERSATIONS = {
    "video": [said("user", footage(5, (61, 241)), "What happens?")],
    "image and video": [said("user", picture((337, 511)), footage(3, (97, 53)), "Is it there?")],
    "image": [said("user", picture((337, 511)), "What is it?")],
    "text": [said("user", "What is a star?")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_repetition_penalty(checkpoints: Checkpoints, name: str) -> None:
    """So strong that the placeholders' own logits decide, too, whatever the prompt holds."""
    ours, oracle = checkpoints.pair(Tiny())
    messages, penalty = CONVERSATIONS[name], 20.0
    inputs = oracle.prepare(messages)
    output = oracle.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, repetition_penalty=penalty
    )
    theirs = output[0, inputs["input_ids"].shape[1] :].tolist()
    answer = ours.model.generate(messages=messages, max_tokens=12, repetition_penalty=penalty)
    assert list(answer.tokens) == theirs
