"""The key-value caches of the last conversations, so that the next turn of each prefills only what
is new.

A conversation that goes on trims its own cache in place, without a copy. Virtual ids name media by
content, so a match on ids is a match on content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_onevision.network.onevision import OneVision

# Every prompt shares its first few template tokens: not worth trimming a cache for.
LEAST_MATCH = 64
MOST_KEPT = 32  # all are looked at with every request


@dataclass(frozen=True, eq=False)
class Kept:
    """The cache of one conversation: an id for each position, and the keys of media among them."""

    ids: list[int]
    keys: tuple[str, ...]
    cache: list[Any]
    nbytes: int

    def common(self, ids: list[int]) -> int:
        """How many of the first ``ids`` it holds."""
        least, most = 0, min(len(self.ids), len(ids))
        while least < most:  # by halves: lists are compared much faster than their items
            middle = (least + most + 1) // 2
            if self.ids[least:middle] == ids[least:middle]:
                least = middle
            else:
                most = middle - 1
        return least


class PrefixCache:
    """Caches by what they hold. The last one is always kept, others while all together are within
    ``capacity`` bytes; the least recently used go first.

    quantized : group size and bits of new caches; None: they have the model's type.
    """

    def __init__(
        self, model: OneVision, capacity: int = 0, quantized: tuple[int, int] | None = None
    ) -> None:
        self.capacity = capacity
        self._quantized = quantized
        self._model = model
        self._kept: list[Kept] = []

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def take(self, ids: list[int]) -> tuple[list[Any], int]:
        """A cache to continue from, the caller's until it is stored, and how many of ``ids`` it
        already holds: never the last id, with whose logits generation begins.
        """
        from mlx_lm.models.cache import KVCache, QuantizedKVCache, trim_prompt_cache

        kept, matched = self._best(ids)
        if kept is None:
            self._evict(self.capacity)
            if self._quantized is None:
                return [KVCache() for _ in self._model.layers], 0
            return [QuantizedKVCache(*self._quantized) for _ in self._model.layers], 0
        self._kept.remove(kept)
        if matched < len(kept.ids) - matched:
            # Another conversation that began alike: its own rest is worth more than a copy.
            self._kept.append(kept)
            self._evict(self.capacity)
            return [_first(layer, matched) for layer in kept.cache], matched
        self._model.bank.release(kept.keys)
        self._evict(self.capacity)
        trim_prompt_cache(kept.cache, kept.cache[0].offset - matched)
        return kept.cache, matched

    def match(self, ids: list[int]) -> int:
        """How many of the first ``ids`` a cache could be had for."""
        return self._best(ids)[1]

    def store(self, ids: Sequence[int], keys: Sequence[str], cache: list[Any]) -> None:
        """Keeps ``cache``, which holds the first of ``ids``, for the next turn. ``keys`` : of the
        media in them, whose virtual ids are still held.
        """
        new = Kept(list(ids[: cache[0].offset]), tuple(keys), cache, _size(cache))
        self._model.bank.hold(new.keys)
        for kept in self._kept.copy():
            if kept.common(new.ids) == len(kept.ids):  # an earlier turn
                self._drop(kept)
        self._evict(self.capacity - new.nbytes, MOST_KEPT - 1)
        self._kept.append(new)

    def store_from_batch(self, ids: Sequence[int], keys: Sequence[str], cache: list[Any]) -> None:
        """As :meth:`store`, for a request in a batch: its slice of the KV cache is still lazy. One
        that alone would take too much is not kept, and where memory is short none is.
        """
        if _size(cache) > self.capacity:
            return
        try:
            mx.eval([layer.state[:2] for layer in cache])
        except RuntimeError:
            self.clear()
            return
        self.store(ids, keys, cache)

    def forget(self, keys: Sequence[str]) -> None:
        """Drops the conversations about any of these media."""
        for kept in self._kept.copy():
            if not set(keys).isdisjoint(kept.keys):
                self._drop(kept)

    def shrink(self, room: int) -> None:
        """Drops conversations, the last one too, until all are within ``room`` bytes."""
        self._evict(max(room, 0))

    def clear(self) -> None:
        self._evict(-1)

    def _best(self, ids: list[int]) -> tuple[Kept | None, int]:
        best, most = None, LEAST_MATCH - 1
        for kept in self._kept:
            common = min(kept.common(ids), len(ids) - 1)
            if common > most:
                best, most = kept, common
        return best, 0 if best is None else most

    def _evict(self, room: int, most: int = MOST_KEPT) -> None:
        """Drops the oldest until there are no more than ``most``, within ``room`` bytes."""
        while self._kept and (self.nbytes > room or len(self._kept) > most):
            self._drop(self._kept[0])

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._model.bank.release(kept.keys)


def _size(cache: list[Any]) -> int:
    return sum(layer.nbytes for layer in cache)


def _first(layer: Any, count: int) -> Any:
    """A layer's cache, of the first positions only."""
    keys, values, _, *settings = layer.state
    copy = type(layer)()
    copy.state = (
        *tree_map(lambda held: held[..., :count, :], (keys, values)),
        count,
        *settings,
    )
    return copy
