"""Speculative decoding: cheap proposals, of which the model takes what it would have chosen."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_onevision.engine.decode import CLEAR_EVERY
from mlx_onevision.network.onevision import OneVision


class PromptLookup:
    """Proposes what followed when the last tokens stood together before, in prompt or answer.

    Prompt lookup decoding: speculative decoding whose draft is the text itself
    (github.com/apoorvumang/prompt-lookup-decoding). It pays where an answer repeats a passage.

    ids : of the prompt. most : how many tokens are proposed at once.
    vocab_size : ids at or above it are of media, and never proposed.
    """

    LENGTHS = (3, 2)  # of what must have stood there before, the longer one first

    def __init__(self, ids: Sequence[int], most: int, vocab_size: int) -> None:
        self._most, self._vocab_size = most, vocab_size
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where each run of ids ended last
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        for token in ids:
            for length in self.LENGTHS:
                run = tuple(self._ids[-length:])
                if len(run) == length:
                    self._ends[run] = len(self._ids)
            self._ids.append(token)

    def propose(self) -> list[int]:
        for length in self.LENGTHS:
            end = self._ends.get(tuple(self._ids[-length:]))
            if end is not None:
                found = self._ids[end : end + self._most]
                media = (place for place, token in enumerate(found) if token >= self._vocab_size)
                return found[: next(media, len(found))]
        return []


def speculative_steps(
    model: OneVision,
    cache: list[Any],
    first: int,
    draft: PromptLookup,
    *,
    check: Callable[[], None],
) -> Iterator[int]:
    """The tokens of a greedy answer from its ``first`` one on, which is not in the cache yet.

    What ``draft`` proposes goes through the model in one step, and is taken as far as it is what
    the model would have chosen: the answer is the same, up to the rounding of half precision.
    """
    from mlx_lm.models.cache import trim_prompt_cache

    token, produced = first, 0
    draft.extend([token])
    yield token
    while True:
        proposed = draft.propose()
        inputs = mx.array([[token, *proposed]], mx.int32)
        with model.decoding() if not proposed else nullcontext():
            chosen = mx.argmax(model(inputs, cache, last=1 + len(proposed))[0], axis=-1)
        found = np.array(chosen).tolist()
        pairs = zip(proposed, found, strict=False)
        agreed = next((n for n, (one, other) in enumerate(pairs) if one != other), len(proposed))
        trim_prompt_cache(cache, len(proposed) - agreed)
        draft.extend(found[: agreed + 1])
        for token in found[: agreed + 1]:
            yield token
            produced += 1
            if produced % CLEAR_EVERY == 0:
                mx.clear_cache()
        check()
