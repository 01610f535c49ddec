"""This package against what transformers computed once, stage by stage: needs no torch.

tests/reference/record_model.py recorded the results and says what each array is; ``make parity``
does the same live, on many more images and checkpoints.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parity.cases import recorded_conversations
from parity.ours import Ours

from mlx_onevision.prompt.processor import Inputs

FOLDER = Path(__file__).parent / "reference" / "model"
CONVERSATIONS = recorded_conversations()
WITH_IMAGES = [name for name in CONVERSATIONS if name != "text"]


@pytest.fixture(scope="module")
def ours() -> Iterator[Ours]:
    loaded = Ours(FOLDER)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "stages.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def prepared(ours: Ours) -> dict[str, Inputs]:
    return {name: ours.model.prepare(messages) for name, messages in CONVERSATIONS.items()}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    return float(np.abs(ours.astype(np.float64) - theirs).max())


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids(
    ours: Ours, recorded: dict[str, np.ndarray], prepared: dict[str, Inputs], name: str
) -> None:
    assert ours.model.render(CONVERSATIONS[name]) == str(recorded[f"{name}/prompt"])
    assert prepared[name].input_ids.tolist() == recorded[f"{name}/ids"].tolist()


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_pixels(recorded: dict[str, np.ndarray], prepared: dict[str, Inputs], name: str) -> None:
    media = prepared[name].media
    assert [medium.size for medium in media] == list(map(tuple, recorded[f"{name}/sizes"]))
    pixels = np.concatenate([medium.pixel_values for medium in media])
    assert pixels.dtype == np.float32
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    assert digest == str(recorded[f"{name}/pixels"])  # equal to the bit


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_features(
    ours: Ours, recorded: dict[str, np.ndarray], prepared: dict[str, Inputs], name: str
) -> None:
    vision = ours.vision(prepared[name])
    assert difference(vision.tower[[0, -1]], recorded[f"{name}/tower"]) <= 2e-5
    assert difference(vision.projected[[0, -1]], recorded[f"{name}/projected"]) <= 2e-5
    assert difference(np.concatenate(vision.packed), recorded[f"{name}/packed"]) <= 2e-5


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits(
    ours: Ours, recorded: dict[str, np.ndarray], prepared: dict[str, Inputs], name: str
) -> None:
    logits = ours.model.logits(prepared[name])
    theirs = recorded[f"{name}/logits"]
    rows = np.linspace(0, len(logits) - 1, len(theirs)).round().astype(int)
    assert difference(logits[rows], theirs) <= 5e-5


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_greedy_tokens(ours: Ours, recorded: dict[str, np.ndarray], name: str) -> None:
    """Every choice that was recorded led the next best logit by more than 1e-3."""
    tokens = ours.tokens(CONVERSATIONS[name], 32)
    assert tokens == recorded[f"{name}/tokens"].tolist()
