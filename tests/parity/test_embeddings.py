"""Vectors of both spaces against transformers' hidden states."""

# pyright: reportMissingImports=false
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from parity.cases import CORE, Size, ask, picture
from parity.checkpoints import Tiny
from parity.compare import difference
from parity.oracle import Oracle
from parity.pairs import Checkpoints

from examples.demo_model.cases import make_cases
from mlx_onevision.api import Model, load
from mlx_onevision.checkpoint import hub

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
def mean_of_frames(oracle: Oracle, video: Any, **options: Any) -> np.ndarray:
    """The mean of the tower's selected hidden states over all frames that the processor takes."""
    block = {"type": "video", "video": video}
    inputs = oracle.prepare([{"role": "user", "content": [block]}], **options)
    tower = oracle.model.model.vision_tower
    states = tower(inputs["pixel_values_videos"][0], output_hidden_states=True).hidden_states
    chosen = oracle.model.config.vision_feature_layer
    layers = chosen if isinstance(chosen, list | tuple) else [chosen]
    features = torch.cat([states[layer] for layer in layers], dim=-1)
    return unit(features.mean(dim=(0, 1)).numpy())


@torch.inference_mode()
def last_state(oracle: Oracle, *content: dict[str, Any], **options: Any) -> np.ndarray:
    """The hidden state after the final norm, where the first word of the answer comes from."""
    inputs = oracle.prepare([{"role": "user", "content": list(content)}], **options)
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


VIDEOS = [(1, (337, 511)), (5, (61, 241)), (8, (56, 56)), (12, (97, 53))]


def footage(frames: int, size: Size, seed: int = 0) -> np.ndarray:
    """uint8 (frames, H, W, 3), each frame another picture."""
    return np.stack([np.asarray(picture(size, seed + n)) for n in range(frames)])


@pytest.mark.parametrize("options", [{}, {"num_frames": 4}], ids=["all frames", "four"])
@pytest.mark.parametrize("tiny", [*KINDS, SPLIT], ids=["tied", "untied", "two layers"])
def test_videos(checkpoints: Checkpoints, tiny: Tiny, options: dict[str, Any]) -> None:
    ours, oracle = checkpoints.pair(tiny)
    videos = [footage(*shape) for shape in VIDEOS if shape[0] >= options.get("num_frames", 1)]
    for video, vector in zip(videos, ours.model.embed(videos, **options).vectors, strict=True):
        assert difference("vision", vector, mean_of_frames(oracle, video, **options)) <= 2e-6
    # The reference takes several videos of one length only.
    two = (footage(5, (61, 241)), footage(5, (241, 61), 9))
    items: list[Any] = [*videos, [{"type": "video", "video": video} for video in two]]
    found = ours.model.embed(items, "joint", **options).vectors
    for item, vector in zip(items, found, strict=True):
        content = item if isinstance(item, list) else [{"type": "video", "video": item}]
        state = last_state(oracle, *content, text("Summary above video in one word:"), **options)
        assert difference("joint", vector, state) <= 5e-6


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Model, Oracle]]:
    model = load("demo", dtype="float32")
    yield model, Oracle(hub.EMBEDDED)
    model.close()


def test_the_demo_models_videos_and_pictures(demo: tuple[Model, Oracle]) -> None:
    """A trained network's vectors, in both spaces, of drawn videos, a picture and a text."""
    model, oracle = demo
    cases = islice(make_cases("videos", 1), 3)
    videos = [np.stack([np.asarray(frame) for frame in case.draw()]) for case in cases]
    still = {"type": "image", "image": videos[0][0]}
    vectors = model.embed([*videos, still]).vectors
    for video, vector in zip(videos, vectors[:-1], strict=True):
        assert difference("vision", vector, mean_of_frames(oracle, video)) <= 5e-6
    assert difference("vision", vectors[-1], base_view(oracle, videos[0][0])) <= 5e-6
    found = model.embed([*videos, still, text("a red circle")], "joint").vectors
    about = "Summary above {} in one word:"
    contents: list[list[dict[str, Any]]] = [
        *([{"type": "video", "video": v}, text(about.format("video"))] for v in videos),
        [still, text(about.format("image"))],
        [text("a red circle\n" + about.format("sentence"))],
    ]
    for content, vector in zip(contents, found, strict=True):
        assert difference("joint", vector, last_state(oracle, *content)) <= 2e-5


def test_the_comparison_would_notice(checkpoints: Checkpoints) -> None:
    """Other pictures, and other words, are far beyond the tolerances."""
    ours, _ = checkpoints.pair(KINDS[0])
    pictures = [picture((337, 511), seed) for seed in (0, 1)]
    for space in ("vision", "joint"):
        one, other = ours.model.embed(pictures, space).vectors
        assert np.abs(one - other).max() > 1e-2
    one, other = ours.model.embed([text("A red star."), text("A red circle.")], "joint").vectors
    assert np.abs(one - other).max() > 1e-2
