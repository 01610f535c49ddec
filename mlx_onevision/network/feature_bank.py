"""The feature bank: encoded images and videos as token ids above the vocabulary.

mlx-lm's generation, caches and batching speak token ids only. So every encoded medium owns a range
of *virtual ids*, all at or above ``vocab_size``, one for each of its feature rows. The same pixels
under the same settings have the same ids, other pixels have others: a prompt is a plain list of
ints, and a cache that matches on ids can never mistake one image for another.

Rows are bounded in bytes and leave in order of last use. A range of ids is given to another medium
only once neither a request nor a cached prompt holds it.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

# Ids travel as int32.
LAST_ID = 2**31 - 1


@dataclass
class Entry:
    """One medium: the first of its virtual ids, how many there are, and its rows while they are
    kept.
    """

    first: int
    length: int
    rows: mx.array | None = None
    requests: int = 0
    """Requests under way that need the rows."""
    prompts: int = 0
    """Cached prompts that hold the ids; their rows are in key-value caches already."""

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.length)


class FeatureBank:
    """Feature rows by content key and by virtual id.

    vocab_size : the first virtual id.
    capacity : bytes of rows to keep; those that requests under way need are kept beyond it.
    """

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.vocab_size = vocab_size
        self.capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._next = vocab_size

    def __contains__(self, key: str) -> bool:
        """Whether the rows of ``key`` are here."""
        entry = self._entries.get(key)
        return entry is not None and entry.rows is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept."""
        return sum(entry.rows.nbytes for entry in self._entries.values() if entry.rows is not None)

    def reserve(self, key: str, length: int) -> range:
        """The virtual ids of a medium of ``length`` rows, the same ones for as long as it is
        known.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(self._free_range(length), length)
            self._next = entry.first + length
        if entry.length != length:
            raise ValueError(f"medium {key} has {entry.length} rows, not {length}")
        self._entries.move_to_end(key)
        return entry.ids

    def store(self, key: str, rows: mx.array) -> None:
        """Keeps the rows (n, D) of a reserved medium, and drops what no longer fits."""
        entry = self._entries[key]
        if rows.shape[0] != entry.length:
            raise ValueError(f"medium {key} reserved {entry.length} ids for {rows.shape[0]} rows")
        entry.rows = rows
        self._evict()

    @contextmanager
    def in_use(self, keys: Sequence[str]) -> Iterator[None]:
        """Keeps the rows of ``keys`` (all of them reserved) while a request is under way."""
        entries = [self._entries[key] for key in keys]
        for entry in entries:
            entry.requests += 1
        try:
            yield
        finally:
            for entry in entries:
                entry.requests -= 1
            self._evict()

    def hold(self, keys: Sequence[str]) -> None:
        """A cached prompt now holds the ids of ``keys``."""
        for key in keys:
            self._entries[key].prompts += 1

    def release(self, keys: Sequence[str]) -> None:
        """That cached prompt is gone."""
        for key in keys:
            self._entries[key].prompts -= 1
        self._evict()

    def forget(self, keys: Sequence[str]) -> None:
        """Drops the rows of ``keys`` now; nobody will ask about these media again soon."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.requests == 0:
                entry.rows = None
        self._evict()

    def look_up(self, first: int, last: int) -> mx.array:
        """The rows (last - first, D) behind the virtual ids first to last - 1, all of one
        medium.
        """
        for entry in self._entries.values():
            if first in entry.ids:
                if last - 1 not in entry.ids:
                    raise ValueError(f"virtual ids {first} to {last - 1} are not of one medium")
                if entry.rows is None:
                    raise ValueError(f"the features behind virtual id {first} were dropped")
                return entry.rows[first - entry.first : last - entry.first]
        raise ValueError(f"token id {first} is neither in the vocabulary nor in the feature bank")

    def last_of(self, first: int) -> int:
        """The id after the last one of the medium that owns ``first``."""
        for entry in self._entries.values():
            if first in entry.ids:
                return entry.ids.stop
        raise ValueError(f"token id {first} is neither in the vocabulary nor in the feature bank")

    def _evict(self) -> None:
        excess = self.nbytes - self.capacity
        for key, entry in list(self._entries.items()):
            if entry.requests == 0 and entry.rows is not None and excess > 0:
                excess -= entry.rows.nbytes
                entry.rows = None
            if entry.requests == 0 and entry.prompts == 0 and entry.rows is None:
                del self._entries[key]

    def _free_range(self, length: int) -> int:
        """The first of ``length`` ids that nothing holds: after the last range given out, else
        from the bottom, in the gaps that eviction left, else where something idle is made to go.
        """
        while True:
            for first in (self._next, self.vocab_size):
                for entry in sorted(self._entries.values(), key=lambda entry: entry.first):
                    if entry.first < first + length and first < entry.ids.stop:
                        first = entry.ids.stop
                if first + length - 1 <= LAST_ID:
                    return first
            idle = (k for k, e in self._entries.items() if e.requests == 0 and e.prompts == 0)
            oldest = next(idle, None)
            if oldest is None:
                raise RuntimeError("the feature bank has no virtual ids left")
            del self._entries[oldest]
