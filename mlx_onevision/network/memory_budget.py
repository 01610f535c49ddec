"""How much a model computes at once to stay within a memory limit, and which requests are admitted:
arithmetic only, so that it can be tested for other machines.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_onevision.errors import MemoryLimitError, OutOfMemoryError
from mlx_onevision.network.memory_sizes import (
    BACKENDS,
    CACHE_STEP,
    CHUNKS,
    DENSE_ROWS,
    INTERVALS,
    KV_BITS,
    KV_GROUPS,
    SMALLEST,
    TILE_GROUPS,
    Budget,
    Footprint,
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
    """Sizes of a model, and what fits into a memory limit. Limits are in bytes.

    others : the models of the other ranks, and their limits. All must stay within their own.
    """

    others: tuple[tuple["MemoryModel", int], ...] = ()

    def of_ranks(self, limit: int) -> list[tuple["MemoryModel", int]]:
        """The models and limits of all ranks, this one's first."""
        return [(self, limit), *self.others]

    def with_draft(self, draft: "MemoryModel") -> "MemoryModel":
        """This model together with a draft model."""
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
        """``budget``, or smaller steps where the requests would not fit into ``limit``."""
        scratch = MOST_SCRATCH
        while self.room(sizes, budget, limit) < 0 and scratch > MEGABYTE:
            smaller = self.plan(scratch)
            least = map(min, _values(budget), _values(smaller))
            budget = Budget(*least, dense_rows=self.dense_rows)
            scratch //= 2
        return budget

    def room(self, sizes: Sequence[RequestSize], budget: Budget, limit: int) -> int:
        """Bytes that requests leave free of ``limit``; with several ranks, the fewest of any."""
        return min(own - model.batch(sizes, budget).total for model, own in self.of_ranks(limit))

    def admit(self, size: RequestSize, limit: int, every: bool = False) -> None:
        """Raises MemoryLimitError for a request that cannot be answered within ``limit``, with what
        would fit instead. every : as for :meth:`request`.
        """
        for other, own in self.others:
            other.admit(size, own, every)
        needed = self.request(size, SMALLEST, every).total
        if needed <= limit:
            return
        media = f" and {len(size.media)} images and videos" if size.media else ""
        raise MemoryLimitError(
            f"a prompt of {size.prompt:,} tokens{media} with an answer of {size.answer:,} needs "
            f"{_gigabytes(needed)} of memory, but the limit is {_gigabytes(limit)}; "
            f"{self._alternatives(size, limit, every)}"
        )

    def longest(self, most: int, limit: int) -> int:
        """Tokens of the longest prompt of text, of at most ``most``, that can be answered within
        ``limit``.
        """
        return _largest(most, lambda n: self._fit(RequestSize(n, 1), limit))

    def answer(self, size: RequestSize, limit: int) -> int:
        """How many tokens of a request's answer fit into ``limit``."""
        return _largest(size.answer, lambda n: self._fit(size._replace(answer=n), limit))

    def _fit(self, size: RequestSize, limit: int) -> bool:
        return all(
            model.request(size, SMALLEST).total <= own for model, own in self.of_ranks(limit)
        )

    def _alternatives(self, size: RequestSize, limit: int, every: bool) -> str:
        """The end of an error's sentence: what would fit instead of a request."""

        def fits(model: MemoryModel = self, **changed: Any) -> bool:
            return model.request(size._replace(**changed), SMALLEST, every).total <= limit

        def some_media(count: int) -> bool:
            dropped = sum(medium.tokens for medium in size.media[count:])
            return fits(prompt=size.prompt - dropped, media=size.media[:count])

        found = ""
        if answer := _largest(size.answer, lambda n: fits(answer=n)):
            found = f"an answer of {answer:,} max_tokens would fit"
        elif media := _largest(len(size.media), some_media):
            found = f"the first {media} of them would fit"
        elif prompt := _largest(size.prompt, lambda n: fits(prompt=n, answer=1, media=())):
            found = f"a prompt of {prompt:,} tokens of text would fit"
            found += "; use fewer or smaller media or less text"
        fitting = ([name for name, model in step if fits(model)] for step in self._smaller())
        names = next(filter(None, fitting), None)
        settings = f"so would this with {' or with '.join(names)}" if names else ""
        if not found:
            return settings.replace("so would this", "it would fit") or (
                "no prompt fits; use a smaller model"
            )
        return f"{found}, and {settings}" if settings else found

    def _smaller(self) -> Iterator[list[tuple[str, "MemoryModel"]]]:
        """Settings with which the model takes less memory, and the model with them: step by step,
        those that change the least first.
        """
        caches: list[tuple[str, MemoryModel]] = []
        if self.kv_bits is None and self.config.text_config.head_dim % KV_GROUPS[-1] == 0:
            caches = [(f"kv_bits {bits}", replace(self, kv_bits=bits)) for bits in KV_BITS]
        weights = self.weights_in_4_bits()
        if weights is None:
            yield from ([cache] for cache in caches)
            return
        quantized = {"weights": weights, "dense_rows": DENSE_ROWS, "dense_tower": True}
        yield [*caches[:1], ("quantize 4", replace(self, **quantized))]
        for name, model in caches:
            yield [(f"quantize 4 and {name}", replace(model, **quantized))]

    def weights_in_4_bits(self) -> int | None:
        """Bytes of all weights with the language model's matrices in 4 bits, and those of tower and
        projector in 8, each with a scale and a bias for 64 values. None where that saves less than
        5 %, and for several ranks, which have a share each.
        """
        if self.others:
            return None
        text, vision = self.config.text_config, self.config.vision_config
        D, keys = text.hidden_size, text.num_key_value_heads * text.head_dim
        layer = 2 * D * (text.num_attention_heads * text.head_dim + keys)
        layer += 3 * D * text.intermediate_size
        tables = text.vocab_size * D * (1 if text.tie_word_embeddings else 2)
        language = text.num_hidden_layers * layer + tables
        width = vision.hidden_size
        tower = vision.num_hidden_layers * 2 * width * (2 * width + vision.intermediate_size)
        tower += D * (width * len(self.config.feature_layers) + D)
        plain = (language + tower) * self.itemsize
        found = self.weights - plain + (language * 4.5 + tower * 8.5) / 8
        return int(found) if found < 0.95 * self.weights and found > 0 else None

    @property
    def shortest(self) -> Footprint:
        """What a short request takes in the smallest steps."""
        return self.request(RequestSize(CACHE_STEP // 2, CACHE_STEP // 2), SMALLEST)

    def admit_model(self, limit: int) -> None:
        """Raises OutOfMemoryError where not even a short request fits into ``limit``."""
        for other, own in self.others:
            other.admit_model(own)
        needed = self.shortest.total
        if needed <= limit:
            return
        advice = "use a smaller model"
        if self.draft is not None and needed - self.draft.weights <= limit:
            advice = "leave its draft model out"
        elif (weights := self.weights_in_4_bits()) is not None:
            smaller = replace(self, weights=weights, dense_rows=DENSE_ROWS, dense_tower=True)
            total = smaller.shortest.total
            advice = f"quantized to 4 bits it would need {_gigabytes(total)}"
            advice += ", so load it with quantize 4" if total <= limit else "; use a smaller model"
        both = " and its draft model's" if self.draft is not None else ""
        raise OutOfMemoryError(
            f"the model needs {_gigabytes(needed)} of memory, {_gigabytes(self.weights)} for its "
            f"weights{both}, but the limit is {_gigabytes(limit)}; {advice}"
        )


def scratch_bytes(working_set: int, weights: int) -> int:
    """Bytes that a request's intermediate values may take: an eighth of what the weights leave free
    of the memory that the device should use, at least 192 and at most 768 MB.
    """
    return max(LEAST_SCRATCH, min((working_set - weights) // 8, MOST_SCRATCH))


def tail(chunk: int) -> int:
    """How many of its last prompt tokens a request may have prefilled together with other requests:
    so many that all of them, padded to the longest, are no more than a ``chunk``.
    """
    return min(CHUNKS[-1], chunk // MAX_PREFILL_BATCH_SIZE)


def _values(budget: Budget) -> tuple[int, int, int, int]:
    return budget.tile_group, budget.tower_interval, budget.chunk, budget.interval


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits, 0 for none; by halves."""
    low = most if fits(most) else 0  # as it is nearly always
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if fits(middle) else (low, middle - 1)
    return low


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
