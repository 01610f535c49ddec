# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""The key-value caches of the last conversations, so that the next turn of each prefills only what
is new.

A conversation that goes on trims its own cache in place, without a copy. Virtual ids name media by
content, so a match on ids is a match on content. A conversation can be kept in a file: its arrays
are laid out as mlx-lm's ``save_prompt_cache`` does it, and the header has the rest.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx import utils

from mlx_onevision.checkpoint.tensors import read_header
from mlx_onevision.engine.kv_cache import first_positions
from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.files import replacing
from mlx_onevision.network.onevision import OneVision

# Every prompt shares its first few template tokens: not worth trimming a cache for.
LEAST_MATCH = 64  # tokens
MOST_KEPT = 32  # conversations; all are looked at with every request


@dataclass(frozen=True, eq=False)
class Kept:
    """The cache of one conversation: an id for each position, and the keys of media among them."""

    ids: list[int]
    keys: tuple[str, ...]
    cache: list[Any]
    nbytes: int

    def common(self, ids: list[int]) -> int:
        """How many of the first ``ids`` it holds."""
        return common_prefix(self.ids, ids)


class PrefixCache:
    """Caches by what they hold. The last one is always kept, others while all together are within
    ``capacity`` bytes; the least recently used go first.

    quantized : group size and bits of new caches; None: they have the model's type.
    """

    def __init__(
        self, model: OneVision, capacity: int = 0, quantized: tuple[int, int] | None = None
    ) -> None:
        self.capacity = capacity
        self.agreed: Callable[[int], int] = lambda count: count
        """Given how many positions are found here, how many are found on every rank."""
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
        from mlx_lm.models.cache import trim_prompt_cache

        kept, matched = self._best(ids)
        if kept is None:
            self._evict(self.capacity)
            return self._empty(), 0
        self._kept.remove(kept)
        if matched < len(kept.ids) - matched:
            # Another conversation that began alike: its own rest is worth more than a copy.
            self._kept.append(kept)
            self._evict(self.capacity)
            return first_positions(kept.cache, matched), matched
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
            if self._model.group is not None:
                raise  # it may be this rank's alone
            self.clear()
            return
        self.store(ids, keys, cache)

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Writes the conversation that was stored last; ``about`` says more of it. A file that was
        there is replaced at once or not at all, and only its owner can read it.

        Raises:
            RequestError: where there is no conversation.
            OSError: where it cannot be written.
        """
        if not self._kept:
            raise RequestError(f"there is no conversation to write to {path}; ask something first")
        kept = self._kept[-1]
        count = min(len(kept.ids), kept.cache[0].offset)
        layers = first_positions(kept.cache, count)
        states: Any = utils.tree_flatten([layer.state for layer in layers])
        media = [(key, self._model.bank.ids_of(key)) for key in dict.fromkeys(kept.keys)]
        own = {
            "ids": json.dumps(kept.ids[:count]),
            "media": json.dumps([(key, ids.start, len(ids)) for key, ids in media]),
            **about,
        }
        scalars = ["", *([name, "scalar"] for name, value in states if isinstance(value, int))]
        header = utils.tree_flatten([own, [type(layer).__name__ for layer in layers], scalars])
        with replacing(path, private=True) as file:
            arrays = {name: mx.array(value) for name, value in states}
            mx.save_safetensors(file, arrays, dict(header))

    def load(
        self, path: Path, admit: Callable[[int, Mapping[str, str]], None]
    ) -> tuple[int, dict[str, str]]:
        """Keeps the conversation of a file that :meth:`save` wrote; returns its tokens, and what
        else was written.

        admit : called with their number and what else was written, before the arrays are read; it
            raises where they do not suit.

        Raises:
            RequestError: where the file is damaged or something else.
            OSError: where it cannot be read.
        """
        with path.open("rb") as file:
            try:
                read_header(path)  # MLX takes files that are cut off
                loaded: Any = mx.load(file, format="safetensors", return_metadata=True)
                arrays, header = loaded
                # Names are not unflattened: a number in one may ask for a list of any length.
                about = {name[2:]: text for name, text in header.items() if name[:2] == "0."}
                ids = _checked_ids(json.loads(about.pop("ids")))
                media = _checked_media(json.loads(about.pop("media")))
            except (CheckpointError, RuntimeError, ValueError, LookupError, TypeError) as error:
                raise RequestError(
                    f"{path} is no prompt cache, or is cut off or damaged; delete it, or name "
                    "another file"
                ) from error
            admit(len(ids), about)
            # No more embeddings than the context holds.
            if sum(length for *_, length in media) > self._most_media:
                raise RequestError(f"{path} has more media than a prompt can have; delete it")
            cache = self._empty()
            kinds: Any = utils.tree_flatten([self._kinds(len(ids))] * len(cache))
            if any(name not in arrays or _kind(arrays[name]) != kind for name, kind in kinds):
                raise RequestError(f"{path} has keys and values of other shapes; delete it")
            states: Any = utils.tree_unflatten([(name, arrays[name]) for name, _ in kinds])
            for layer, state in zip(cache, states, strict=True):
                layer.state = (*state, len(ids), *layer.state[3:])
                mx.eval(state)
        moved: dict[int, int] = {}  # virtual ids, which may belong to other media by now
        for key, first, length in media:
            try:
                own = self._model.bank.reserve(key, length)
            except ValueError as error:
                raise RequestError(
                    f"{path} has media of other lengths than they have here; delete it"
                ) from error
            moved |= zip(range(first, first + length), own, strict=True)
        held = [moved.get(token, token) for token in ids]
        self.store(held, [key for key, *_ in media], cache)
        return len(held), about

    @property
    def _most_media(self) -> int:
        """Embeddings of all media of a prompt, at most: no more than its context holds."""
        return self._model.config.text_config.max_position_embeddings

    def _kinds(self, count: int) -> Any:
        """Of the keys and values of a layer that holds so many positions."""
        text = self._model.config.text_config
        shape = (1, text.num_key_value_heads, count, text.head_dim)
        values: Any = mx.zeros(shape, self._model.dtype)
        if self._quantized is not None:
            group_size, bits = self._quantized
            values = list(mx.quantize(values, group_size=group_size, bits=bits))
        return utils.tree_map(_kind, (values, values))

    def _empty(self) -> list[Any]:
        from mlx_lm.models.cache import KVCache, QuantizedKVCache

        if self._quantized is None:
            return [KVCache() for _ in self._model.layers]
        return [QuantizedKVCache(*self._quantized) for _ in self._model.layers]

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
        most = self.agreed(0 if best is None else most)
        return best if most else None, most

    def _evict(self, room: int, most: int = MOST_KEPT) -> None:
        """Drops the oldest until there are no more than ``most``, within ``room`` bytes."""
        while self._kept and (self.nbytes > room or len(self._kept) > most):
            self._drop(self._kept[0])

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._model.bank.release(kept.keys)


def check_settings(path: Path, found: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Checks that a saved KV cache was made by a model like this one.

    found, own : of the file and of the model: its name, its revision, and the settings that it was
        loaded with, such as its dtype.

    Raises:
        RequestError: naming what differs.
    """
    if found.get("revision") != own["revision"]:
        raise RequestError(
            f"{path} belongs to another model, {found.get('name')}, and not to {own['name']}; "
            "name another file, or delete it"
        )
    for setting, value in own.items():
        if setting != "name" and found.get(setting) != value:
            raise RequestError(
                f"{path} was written with {setting} {found.get(setting)}, and the model is loaded "
                f"with {setting} {value}; load it as it was, or name another file"
            )


def common_prefix(ids: list[int], others: list[int]) -> int:
    """How many ids both begin with."""
    least, most = 0, min(len(ids), len(others))
    while least < most:  # by halves: lists are compared much faster than their items
        middle = (least + most + 1) // 2
        if ids[least:middle] == others[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _checked_ids(ids: Any) -> list[int]:
    """Token ids as a file has them; ValueError where they are none."""
    if not isinstance(ids, list):
        raise ValueError("no ids")
    found = cast(list[Any], ids)
    if not found or any(type(token) is not int for token in found):
        raise ValueError("no ids")
    return found


def _checked_media(media: Any) -> list[tuple[str, int, int]]:
    """Keys, first ids and lengths as a file has them; ValueError where they are none. TypeError
    where it has no triples.
    """
    found = [(key, first, length) for key, first, length in media]
    for key, first, length in found:
        if type(key) is not str or type(first) is not int or type(length) is not int or length < 1:
            raise ValueError("no media")
    return found


def _size(cache: list[Any]) -> int:
    return sum(layer.nbytes for layer in cache)


def _kind(values: mx.array) -> str:
    return f"{values.dtype} {values.shape}"
