"""How much a model computes at once to stay within a limit, and which requests may begin at all:
arithmetic only, so that it can be tested for other machines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_onevision.errors import MemoryLimitError, OutOfMemoryError
from mlx_onevision.network.memory_sizes import (
    BACKENDS,
    CACHE_STEP,
    CHUNKS,
    INTERVALS,
    KV_GROUPS,
    SMALLEST,
    TILE_GROUPS,
    Budget,
    ModelSizes,
    RequestSize,
)

MEGABYTE = 1 << 20

# Requests of a batch that decode together, and that begin together. More would hardly be
# faster on the devices that this runs on, and every request waits for the longest.
MAX_BATCH_SIZE = 32
MAX_PREFILL_BATCH_SIZE = 8

LEAST_SCRATCH = 192 * MEGABYTE
MOST_SCRATCH = 768 * MEGABYTE  # larger steps are hardly faster


@dataclass(frozen=True)
class MemoryModel(ModelSizes):
    """Sizes of a model, and what they mean for a limit.

    others : of the other ranks, and the bytes that each may use. All must stay within theirs.
    """

    others: tuple[tuple["MemoryModel", int], ...] = ()

    def of_ranks(self, limit: int) -> list[tuple["MemoryModel", int]]:
        """This one and its limit, and those of the others."""
        return [(self, limit), *self.others]

    def with_draft(self, draft: "MemoryModel") -> "MemoryModel":
        return replace(self, weights=self.weights + draft.weights, draft=draft)

    def plan(self, scratch: int) -> Budget:
        """The largest steps whose intermediate values stay within ``scratch`` bytes."""

        def most(candidates: Sequence[int], cost: Callable[[int], int]) -> int:
            return next((n for n in candidates if cost(n) <= scratch), candidates[-1])

        intervals = INTERVALS[-1:] if BACKENDS[self.backend].window else INTERVALS
        group = most(TILE_GROUPS, lambda n: self.tower(n, SMALLEST))
        chunk = most(CHUNKS, self.layer)
        return Budget(
            tile_group=group,
            tower_interval=most(
                intervals, lambda n: self.tower(group, replace(SMALLEST, tower_interval=n))
            ),
            chunk=chunk,
            interval=most(intervals, lambda n: n * self.layer(chunk)),
            dense_rows=self.dense_rows,
        )

    def fitted(self, sizes: Sequence[RequestSize], budget: Budget, limit: int) -> Budget:
        """``budget``, or smaller steps where the requests would else take more than ``limit``."""
        scratch = MOST_SCRATCH
        while self.room(sizes, budget, limit) < 0 and scratch > MEGABYTE:
            smaller = self.plan(scratch)
            least = map(min, _values(budget), _values(smaller))
            budget = Budget(*least, dense_rows=self.dense_rows)
            scratch //= 2
        return budget

    def room(self, sizes: Sequence[RequestSize], budget: Budget, limit: int) -> int:
        """Bytes that requests leave free of ``limit``; of several ranks, where it is least."""
        return min(own - model.batch(sizes, budget).total for model, own in self.of_ranks(limit))

    def admit(self, size: RequestSize, limit: int, every: bool = False) -> None:
        """Raises MemoryLimitError where a request cannot be answered within ``limit`` bytes."""
        for other, own in self.others:
            other.admit(size, own, every)
        needed = self.request(size, SMALLEST, every).total
        if needed <= limit:
            return

        def fits(**changed: Any) -> bool:
            return self.request(size._replace(**changed), SMALLEST, every).total <= limit

        answer = _largest(size.answer, lambda n: fits(answer=n))
        prompt = _largest(size.prompt, lambda n: fits(prompt=n, answer=1, media=()))
        if answer:
            way = f"an answer of {answer:,} max_tokens would fit"
        elif prompt:
            way = (
                f"a prompt of {prompt:,} tokens would fit; use fewer or smaller media or less text"
            )
        else:
            way = "no prompt fits; use a quantized model"
        quantized = replace(self, kv_bits=8)
        groups = self.kv_bits is None and self.config.text_config.head_dim % KV_GROUPS[-1] == 0
        if groups and quantized.request(size, SMALLEST, every).total <= limit:
            way += ", and so would this with kv_bits 8"
        media = f" and {len(size.media)} images and videos" if size.media else ""
        raise MemoryLimitError(
            f"a prompt of {size.prompt:,} tokens{media} with an answer of {size.answer:,} needs "
            f"{_gigabytes(needed)} of memory, but the limit is {_gigabytes(limit)}; {way}"
        )

    def admit_model(self, limit: int) -> None:
        """OutOfMemoryError where not even a short prompt can be answered within ``limit``."""
        for other, own in self.others:
            other.admit_model(own)
        needed = self.request(RequestSize(CACHE_STEP // 2, CACHE_STEP // 2), SMALLEST).total
        if needed > limit:
            raise OutOfMemoryError(
                f"the model needs {_gigabytes(needed)} of memory, {_gigabytes(self.weights)} for "
                f"its weights, but the limit is {_gigabytes(limit)}; use a smaller model, or "
                "--quantize 4"
            )


def scratch_bytes(working_set: int, weights: int) -> int:
    """What a request's intermediate values may take: an eighth of what the weights leave free of
    the memory that the device should use, within 192 and 768 MB.
    """
    return max(LEAST_SCRATCH, min((working_set - weights) // 8, MOST_SCRATCH))


def tail(chunk: int) -> int:
    """How many of its last prompt tokens a batch's request may have prefilled together with those
    of others: of all, padded to the longest, no more than a ``chunk``.
    """
    return min(CHUNKS[-1], chunk // MAX_PREFILL_BATCH_SIZE)


def _values(budget: Budget) -> tuple[int, int, int, int]:
    return budget.tile_group, budget.tower_interval, budget.chunk, budget.interval


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits, 0 for none; by halves."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if fits(middle) else (low, middle - 1)
    return low


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
