"""One conversation through both implementations, compared stage by stage.

Each assert has its own tolerance, absolute, for float32. A stage whose inputs already differ makes
the later ones differ too, so the first assert that fails names the culprit.
"""

from collections import defaultdict
from typing import Any

import numpy as np
from parity.oracle import Media, Messages, Oracle, Stages
from parity.ours import Ours

# The largest difference seen at each stage, for the summary at the end of the run.
worst: dict[str, float] = defaultdict(float)
counts: dict[str, int] = defaultdict(int)


def difference(stage: str, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference, which goes into the summary too."""
    assert ours.shape == theirs.shape, f"{stage}: {ours.shape}, the reference has {theirs.shape}"
    assert np.isfinite(ours).all(), f"{stage}: not finite"
    largest = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0))
    worst[stage] = max(worst[stage], largest)
    counts[stage] += 1
    return largest


def assert_same(ours: Ours, oracle: Oracle, messages: Messages, tokens: int = 32) -> Stages:
    """Every stage of one conversation; returns the reference's."""
    theirs = oracle.run(messages, tokens)
    assert ours.model.render(messages) == oracle.render(messages)
    assert_same_stages(ours, theirs, messages, tokens)
    return theirs


def assert_same_stages(
    ours: Ours, theirs: Stages, messages: Messages, tokens: int, **options: Any
) -> None:
    """``options`` : how this package is to see the images, ``tiling`` and ``order``."""
    inputs = ours.model.prepare(messages, **options)
    assert inputs.input_ids.tolist() == theirs.ids.tolist()

    if theirs.sizes:
        pixels = np.concatenate([medium.pixel_values for medium in inputs.media])
        assert [medium.size for medium in inputs.media] == theirs.sizes
        assert difference("pixels", pixels, theirs.tiles) == 0.0
        vision = ours.vision(inputs)
        assert difference("tower", vision.tower, theirs.tower) <= 2e-5
        assert difference("projector", vision.projected, theirs.projected) <= 2e-5
        for rows, expected in zip(vision.packed, theirs.packed, strict=True):
            assert difference("packing", rows, expected) <= 2e-5

    logits = ours.model.logits(inputs)
    assert logits.dtype == np.float32
    assert difference("logits", logits, theirs.logits) <= 5e-5
    if tokens:
        assert_same_tokens(ours.tokens(messages, tokens, **options), theirs)


def assert_same_media(ours: Ours, theirs: Media, messages: Messages, **options: Any) -> None:
    """Ids, pixels and packed rows of every image and video, logits; all but the answer."""
    inputs = ours.model.prepare(messages, **options)
    assert inputs.input_ids.tolist() == theirs.ids.tolist()
    for kind in ("image", "video"):
        media = [medium for medium in inputs.media if medium.kind == kind]
        assert len(media) == len(theirs.pixels[kind]) == len(theirs.rows[kind])
        for medium, pixels, rows in zip(media, theirs.pixels[kind], theirs.rows[kind], strict=True):
            assert difference("pixels", medium.pixel_values, pixels) == 0.0
            assert difference(f"{kind} rows", ours.rows(medium), rows) <= 2e-5
    assert difference("logits", ours.model.logits(inputs), theirs.logits) <= 5e-5


def assert_same_tokens(tokens: list[int], theirs: Stages | Media) -> None:
    """Greedy tokens, with what a failure needs: where they part, and how close the choice was."""
    parted = [
        f"token {i} is {ours}, the reference's {expected} (it led by {margin:.1e})"
        for i, (ours, expected, margin) in enumerate(
            zip(tokens, theirs.tokens, theirs.margins, strict=False)
        )
        if ours != expected
    ]
    assert not parted, parted[0]
    assert len(tokens) == len(theirs.tokens)
    counts["greedy tokens"] += len(tokens)
