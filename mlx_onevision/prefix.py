"""The last conversation's key-value cache, so that its next turn reads only what is new.

A lone conversation trims its own cache in place: nothing is copied and there is one set of keys and
values. That ids name media by content is what makes a match on ids safe.
"""

from collections.abc import Sequence
from typing import Any

from mlx_onevision.model import OneVision

# A shorter match is not worth trimming for: every prompt shares its first few template tokens, and
# without this a new picture after them would start from a cache instead of afresh.
LEAST_MATCH = 64


class PrefixCache:
    """Keys and values of one sequence of ids, held with the virtual ids of the media in it."""

    def __init__(self, model: OneVision) -> None:
        self._model = model
        self._ids: list[int] = []
        self._keys: tuple[str, ...] = ()
        self._cache: list[Any] | None = None

    def take(self, ids: Sequence[int]) -> tuple[list[Any], int]:
        """A cache to continue from, and how many of ``ids`` it already holds.

        The last id is never among them, because its logits are what generation begins with. The
        cache is the caller's until it is put back.
        """
        from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

        matched = self.match(ids)
        cache = self._cache
        self._cache = None
        if matched and cache is not None:
            trim_prompt_cache(cache, cache[0].offset - matched)
            return cache, matched
        self.clear()
        return make_prompt_cache(self._model), 0

    def match(self, ids: Sequence[int]) -> int:
        """How many of the first ``ids`` a cache could be had for."""
        if self._cache is None:
            return 0
        common = 0
        for cached, wanted in zip(self._ids, ids[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        return common if common >= LEAST_MATCH else 0

    def put_back(self, ids: Sequence[int], keys: Sequence[str], cache: list[Any]) -> None:
        """Keeps ``cache`` for the next turn; it holds the first of ``ids``, as far as it
        reaches.
        """
        held = self._keys
        self._model.bank.hold(keys)
        self._model.bank.release(held)
        self._keys = tuple(keys)
        self._ids = list(ids[: cache[0].offset])
        self._cache = cache

    def clear(self) -> None:
        self._model.bank.release(self._keys)
        self._ids, self._keys, self._cache = [], (), None
