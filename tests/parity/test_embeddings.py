"""Vectors of both spaces against transformers' hidden states."""

# pyright: reportMissingImports=false
from typing import Any

import numpy as np
import pytest
import torch
from parity.cases import CORE, ask, picture
from parity.checkpoints import Tiny
from parity.compare import difference
from parity.oracle import Oracle
from parity.pairs import Checkpoints

KINDS = [
    Tiny(template=template, tied=tied) for template, tied in (("space", True), ("newline", False))
]
SPLIT = Tiny(top={"vision_feature_layer": [-3, -1]})


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@torch.inference_mode()
def base_view(oracle: Oracle, image: Any) -> np.ndarray:
    """The mean of the tower's selected hidden states over the base tile, which is the first."""
    pixels = oracle.prepare(ask(image))["pixel_values"][0, :1]
    states = oracle.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = oracle.model.config.vision_feature_layer
    layers = chosen if isinstance(chosen, list | tuple) else [chosen]
    features = torch.cat([states[layer] for layer in layers], dim=-1)
    return unit(features[0].mean(dim=0).numpy())


@torch.inference_mode()
def last_state(oracle: Oracle, *content: dict[str, Any]) -> np.ndarray:
    """The hidden state after the final norm, where the first word of the answer comes from."""
    inputs = oracle.prepare([{"role": "user", "content": list(content)}])
    return unit(oracle.model.model(**inputs).last_hidden_state[0, -1].numpy())


@pytest.mark.parametrize("tiny", [*KINDS, SPLIT], ids=["tied", "untied", "two layers"])
def test_vision(checkpoints: Checkpoints, tiny: Tiny) -> None:
    ours, oracle = checkpoints.pair(tiny)
    pictures = [picture(size) for size in CORE]
    embeddings = ours.model.embed(pictures)
    for image, vector in zip(pictures, embeddings.vectors, strict=True):
        assert difference("vision space", vector, base_view(oracle, image)) <= 2e-6


@pytest.mark.parametrize("tiny", KINDS, ids=["tied", "untied"])
def test_joint(checkpoints: Checkpoints, tiny: Tiny) -> None:
    ours, oracle = checkpoints.pair(tiny)
    images = [{"type": "image", "image": picture(size)} for size in CORE]
    items: list[Any] = [*images, images[:2], images[3:6], text("A red circle, left of a star.")]
    embeddings = ours.model.embed(items, "joint")
    question = text("Summary above image in one word:")
    expected = [last_state(oracle, image, question) for image in images]
    expected += [last_state(oracle, *several, question) for several in (images[:2], images[3:6])]
    sentence = text("A red circle, left of a star.\nSummary above sentence in one word:")
    expected.append(last_state(oracle, sentence))
    for vector, state in zip(embeddings.vectors, expected, strict=True):
        assert difference("joint space", vector, state) <= 5e-6


def test_the_comparison_would_notice(checkpoints: Checkpoints) -> None:
    """Other pictures, and other words, are far beyond the tolerances."""
    ours, _ = checkpoints.pair(KINDS[0])
    pictures = [picture((337, 511), seed) for seed in (0, 1)]
    for space in ("vision", "joint"):
        one, other = ours.model.embed(pictures, space).vectors
        assert np.abs(one - other).max() > 1e-2
    one, other = ours.model.embed([text("A red star."), text("A red circle.")], "joint").vectors
    assert np.abs(one - other).max() > 1e-2
