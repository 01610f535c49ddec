"""The feature bank: the embeddings of encoded images and videos, by token ids above the vocabulary.

mlx-lm's generation, caches and batching work on token ids. So every encoded medium owns a range of
*virtual ids* at or above ``vocab_size``, one for each of its embeddings. The same pixels under the
same settings have the same ids, and other pixels have others: a prompt is a plain list of ints, and
a cache that compares ids can never take one image for another. The reference has no such thing: it
replaces the embeddings of a placeholder id (``get_placeholder_mask``).

Embeddings are limited in bytes, and the least recently used are evicted first. A range of ids is
given to another medium only once neither a request nor a cached prompt holds it.
"""

from collections import OrderedDict
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

LAST_ID = 2**31 - 1  # token ids are int32


@dataclass
class Entry:
    """One medium.

    first, length : the first of its virtual ids, and how many there are.
    embeddings : (length, hidden_size); None once they are evicted.
    requests : how many running requests need the embeddings.
    prompts : how many cached prompts hold the ids; their KV caches contain the embeddings.
    """

    first: int
    length: int
    embeddings: mx.array | None = None
    requests: int = 0
    prompts: int = 0

    @property
    def ids(self) -> range:
        return range(self.first, self.first + self.length)


class FeatureBank:
    """Embeddings of media, stored by a key of their contents and looked up by virtual id. For one
    thread at a time.

    vocab_size : the first virtual id.
    capacity : bytes to keep; what running requests need is kept beyond it.
    """

    def __init__(self, vocab_size: int, capacity: int) -> None:
        self.vocab_size = vocab_size
        self.capacity = capacity
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._next = vocab_size

    def __contains__(self, key: str) -> bool:
        """Whether the embeddings of ``key`` are kept."""
        entry = self._entries.get(key)
        return entry is not None and entry.embeddings is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the embeddings that are kept."""
        kept = (entry.embeddings for entry in self._entries.values())
        return sum(embeddings.nbytes for embeddings in kept if embeddings is not None)

    def reserve(self, key: str, length: int) -> range:
        """The virtual ids of a medium of ``length`` embeddings; the same ones while it is known.

        Raises ValueError where it is known with another length.
        """
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(self._free_range(length), length)
            self._next = entry.first + length
        if entry.length != length:
            raise ValueError(f"medium {key} has {entry.length} embeddings, not {length}")
        self._entries.move_to_end(key)
        return entry.ids

    def store(self, key: str, embeddings: mx.array) -> None:
        """Keeps the embeddings (length, hidden_size) of a reserved medium, and evicts what no
        longer fits. Raises ValueError for another length than was reserved.
        """
        entry = self._entries[key]
        if (n := embeddings.shape[0]) != entry.length:
            raise ValueError(f"medium {key} reserved {entry.length} ids for {n} embeddings")
        entry.embeddings = embeddings
        self._evict()

    @contextmanager
    def in_use(self, keys: Sequence[str]) -> Generator[None]:
        """A context in which the embeddings of ``keys``, all of them reserved, are not evicted."""
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
        """Counts one more cached prompt that holds the ids of ``keys``."""
        for key in keys:
            self._entries[key].prompts += 1

    def release(self, keys: Sequence[str]) -> None:
        """Counts one cached prompt less for ``keys``."""
        for key in keys:
            self._entries[key].prompts -= 1
        self._evict()

    def forget(self, keys: Sequence[str]) -> None:
        """Evicts the embeddings of ``keys`` that no running request needs, even if they fit."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.requests == 0:
                entry.embeddings = None
        self._evict()

    def shrink(self, room: int) -> None:
        """Evicts embeddings that no request needs until all are within ``room`` bytes."""
        self._evict(min(room, self.capacity))

    def ids_of(self, key: str) -> range:
        """The virtual ids of a medium that is known."""
        return self._entries[key].ids

    def look_up(self, first: int, last: int) -> mx.array:
        """The embeddings (last - first, hidden_size) of the virtual ids first to last - 1.

        Raises ValueError where they are not of one medium, or were evicted.
        """
        entry = self._entry_of(first)
        if last - 1 not in entry.ids:
            raise ValueError(f"virtual ids {first} to {last - 1} are not of one medium")
        if entry.embeddings is None:
            raise ValueError(f"the features behind virtual id {first} were dropped")
        return entry.embeddings[first - entry.first : last - entry.first]

    def last_of(self, first: int) -> int:
        """The id after the last one of the medium that owns ``first``."""
        return self._entry_of(first).ids.stop

    def _entry_of(self, first: int) -> Entry:
        for entry in self._entries.values():
            if first in entry.ids:
                return entry
        raise ValueError(f"token id {first} is neither in the vocabulary nor in the feature bank")

    def _evict(self, room: int | None = None) -> None:
        excess = self.nbytes - (self.capacity if room is None else room)
        for key, entry in list(self._entries.items()):
            if entry.requests == 0 and entry.embeddings is not None and excess > 0:
                excess -= entry.embeddings.nbytes
                entry.embeddings = None
            if entry.requests == 0 and entry.prompts == 0 and entry.embeddings is None:
                del self._entries[key]

    def _free_range(self, length: int) -> int:
        """The first of ``length`` ids that no medium has: behind the range that was given out last;
        else the lowest gap; else after forgetting idle media, the least recently used first.
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
