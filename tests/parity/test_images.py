"""Sixty images of hostile sizes, through every stage, tied and untied, both chat templates."""

import pytest
from parity.cases import SIZES, Size, ask, picture
from parity.checkpoints import Tiny
from parity.compare import assert_same
from parity.pairs import Checkpoints

KINDS = [
    Tiny(tied=tied, template=template)
    for tied in (True, False)
    for template in ("space", "newline")
]


def test_there_are_sixty_images() -> None:
    assert len(set(SIZES)) == 60


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.name)
def test_image(checkpoints: Checkpoints, tiny: Tiny, size: Size) -> None:
    ours, oracle = checkpoints.pair(tiny)
    assert_same(ours, oracle, ask(picture(size)), tokens=32)


@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.name)
def test_the_comparison_would_notice(checkpoints: Checkpoints, tiny: Tiny) -> None:
    """Another image of the same size moves the logits and the answer far beyond the tolerance."""
    _, oracle = checkpoints.pair(tiny)
    one, other = (oracle.run(ask(picture((337, 511), seed)), tokens=32) for seed in (0, 1))
    assert abs(one.logits[-1] - other.logits[-1]).max() > 1.0
    assert one.tokens != other.tokens
    assert len(set(one.tokens)) > 4
