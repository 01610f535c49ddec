# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Speculative decoding: tokens that something cheap proposes go through the model in one step, and
are taken as far as they are what the model would have chosen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.engine.decode import CLEAR_EVERY, clear_between_chunks
from mlx_onevision.errors import RequestError
from mlx_onevision.network.onevision import OneVision


class Draft(Protocol):
    """What proposes tokens. It is given those of the answer with ``extend`` as they are chosen."""

    def extend(self, ids: Sequence[int]) -> None: ...

    def is_ready(self) -> bool:
        """Whether :meth:`propose` has something, found out at no cost."""
        ...

    def propose(self, most: int) -> list[int]:
        """What may come next, ``most`` tokens or fewer."""
        ...


class PromptLookup:
    """Proposes what followed when the last tokens stood together before, in prompt or answer.

    Prompt lookup decoding: speculative decoding whose draft is the text itself
    (github.com/apoorvumang/prompt-lookup-decoding). It pays where an answer repeats a passage.

    ids : of the prompt. vocab_size : ids at or above it are of media, and never proposed.
    """

    LENGTHS = (3, 2)  # of what must have stood there before, the longer one first

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self._vocab_size = vocab_size
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

    def is_ready(self) -> bool:
        return bool(self.propose(1))

    def propose(self, most: int) -> list[int]:
        for length in self.LENGTHS:
            end = self._ends.get(tuple(self._ids[-length:]))
            if end is not None:
                found = self._ids[end : end + most]
                # If fewer than `most` tokens follow the match, the text is periodic: repeat them.
                found *= -(-most // len(found))
                return _text(found[:most], self._vocab_size)
        return []


class ModelDraft:
    """Proposes what a smaller model would answer.

    cache : a KV cache of that model, which holds the first of ``ids``, of the prompt as it sees it.
    vocab_size : of the larger model, for which proposals are.
    chunk : tokens that are prefilled at once. ``check`` : called between two chunks.
    """

    def __init__(
        self,
        model: OneVision,
        cache: list[Any],
        ids: Sequence[int],
        vocab_size: int,
        *,
        chunk: int,
        check: Callable[[], None],
    ) -> None:
        self._model, self._cache, self._vocab_size = model, cache, vocab_size
        self.ids = list(ids)
        self._proposed: list[int] = []
        while len(pending := self._pending) > 1:
            check()
            model(mx.array([pending[:chunk]], mx.int32), cache, last=1)
            mx.eval([layer.state for layer in cache])
            clear_between_chunks()

    @property
    def _pending(self) -> list[int]:
        """The ids that are not in its cache yet."""
        return self.ids[self._cache[0].offset :]

    def extend(self, ids: Sequence[int]) -> None:
        """Takes back what it proposed beyond ``ids``. Its own table may have fewer rows than the
        larger model's, where both have more than the tokenizer has tokens.
        """
        from mlx_lm.models.cache import trim_prompt_cache

        right = len(self.ids) + _agreed(self._proposed, ids)
        trim_prompt_cache(self._cache, max(0, self._cache[0].offset - right))
        rows = self._model.config.text_config.vocab_size
        self.ids += [token if token < rows else 0 for token in ids]
        self._proposed = []

    def is_ready(self) -> bool:
        return True

    def propose(self, most: int) -> list[int]:
        inputs = mx.array(self._pending, mx.int32)
        found: list[mx.array] = []
        with self._model.decoding():
            for _ in range(most):
                logits = self._model(inputs[None], self._cache, last=1)[:, -1]
                inputs = mx.argmax(logits, axis=-1).astype(mx.int32)
                mx.async_eval(inputs)
                found.append(inputs)
            self._proposed = np.array(mx.concatenate(found)).tolist()
        return _text(self._proposed, self._vocab_size)


class ProposalLength:
    """How many tokens are proposed at once: about as many as were taken of the last proposals, and
    none for a while where hardly any were, so that a poor draft costs little.
    """

    LEAST = 0.5  # taken of a proposal, for the next one to be worth its cost
    PAUSES = (8, 128)  # tokens without proposals, doubled from the first to the second

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, min(4.0, most)
        self._pause, self._left = self.PAUSES[0], 0

    @property
    def tokens(self) -> int:
        """0 during a pause."""
        return 0 if self._left else min(self._most, math.ceil(self._taken))

    def skip(self) -> None:
        """A token has come without a proposal."""
        self._left = max(0, self._left - 1)

    def record(self, proposed: int, agreed: int) -> None:
        # Where all were taken, more would have been.
        self._taken += ((2 * agreed if agreed == proposed else agreed) - self._taken) / 3
        self._taken = min(self._taken, 2.0 * self._most)
        if agreed:
            self._pause = self.PAUSES[0]
        if self._taken < self.LEAST:
            self._taken, self._left = 1.0, self._pause
            self._pause = min(2 * self._pause, self.PAUSES[1])


def speculative_steps(
    model: OneVision, cache: list[Any], first: int, draft: Draft, most: int
) -> Iterator[int]:
    """The tokens of a greedy answer after its ``first`` one, which is not in the cache yet: those
    of :func:`decode.decode_steps`, up to the rounding of half precision.

    most : tokens that are proposed at once. Where none are, a token's step is sent to the device
    before the token before it is read, as there.
    """
    from mlx_lm.models.cache import trim_prompt_cache

    def step(token: mx.array) -> mx.array:
        with model.decoding():
            following = mx.argmax(model(token[None], cache, last=1)[:, -1], axis=-1)
        mx.async_eval(following)
        return following.astype(mx.int32)

    length, token, produced = ProposalLength(most), first, 0
    ahead: mx.array | None = None  # the token after ``token``, on its way
    draft.extend([token])
    while True:
        tries = length.tokens > 0 and draft.is_ready()
        if tries and ahead is None:
            proposed = draft.propose(length.tokens)
            inputs = mx.array([[token, *proposed]], mx.int32)
            chosen = mx.argmax(model(inputs, cache, last=1 + len(proposed))[0], axis=-1)
            found = np.array(chosen).tolist()
            agreed = _agreed(proposed, found)
            trim_prompt_cache(cache, len(proposed) - agreed)
            length.record(len(proposed), agreed)
            found = found[: agreed + 1]
        else:
            current = step(mx.array([token], mx.int32)) if ahead is None else ahead
            ahead = None if tries else step(current)
            found = np.array(current).tolist()
            length.skip()
        draft.extend(found)
        for token in found:
            yield token
            produced += 1
            if produced % CLEAR_EVERY == 0:
                mx.clear_cache()


def check_draft(checkpoint: Checkpoint, draft: Checkpoint) -> None:
    """Checks that two models make the same tiles and numbers of embeddings of a medium.

    Raises:
        RequestError: where they do not.
    """
    kinds = {
        (config.vision_config.image_size, config.tokens_per_tile, config.has_newline)
        for config in (checkpoint.config, draft.config)
    }
    if len(kinds) > 1:
        raise RequestError(
            f"{draft.path} cuts images into other tiles than {checkpoint.path}, or has no newlines "
            "where that has, so it cannot be its draft model; use a smaller one of the same family"
        )


def _agreed(proposed: Sequence[int], chosen: Sequence[int]) -> int:
    """How many of the proposed tokens were chosen."""
    pairs = zip(proposed, chosen, strict=False)
    unlike = (n for n, (one, other) in enumerate(pairs) if one != other)
    return next(unlike, min(len(proposed), len(chosen)))


def _text(ids: list[int], vocab_size: int) -> list[int]:
    """Up to the first one that is no id of text."""
    return ids[: next((n for n, token in enumerate(ids) if token >= vocab_size), len(ids))]
