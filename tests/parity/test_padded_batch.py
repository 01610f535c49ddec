"""Rows of a batch, against transformers' own, which it pads on their left to one length."""

import pytest
from parity.cases import ask, footage, picture, said
from parity.checkpoints import Tiny
from parity.compare import assert_same_media, assert_same_tokens
from parity.pairs import Checkpoints

KINDS = [
    Tiny(template=template, tied=tied) for template, tied in (("space", True), ("newline", False))
]
BATCHES = {
    "text, tiled, several images, turns": [
        ask(text="How many words are in this sentence?"),
        ask(picture((337, 511))),
        ask(*(picture(size) for size in ((480, 640), (1, 37), (900, 30)))),
        [
            said("user", picture((127, 509)), "What is this?"),
            said("assistant", "A blue square."),
            said("user", "And where is it in the picture?"),
        ],
    ],
    "images, videos, both, text": [
        [said("user", footage(5, (97, 53)), "What happens?")],
        [said("user", picture((61, 241)), footage(5, (45, 67), 7), "Is it there?")],
        ask(picture((30, 900))),
        [said("system", "Be brief."), said("user", "What is a circle?")],
    ],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.name)
def test_four_rows(checkpoints: Checkpoints, tiny: Tiny, name: str) -> None:
    ours, oracle = checkpoints.pair(tiny)
    batch = BATCHES[name]
    answers = ours.model.generate(batch=batch, max_tokens=32)
    rows = oracle.run_batch(batch, 32)
    assert len({len(row.ids) for row in rows}) == 4  # three of them are padded
    for messages, theirs, answer in zip(batch, rows, answers, strict=True):
        assert_same_media(ours, theirs, messages)
        assert_same_tokens(list(answer.tokens), theirs)
        assert len(theirs.tokens) == 32
