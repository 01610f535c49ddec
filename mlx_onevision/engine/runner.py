"""One request on the inference thread: encode, read the prompt, generate, keep what the next one
needs.

Text generation is mlx-lm's, unmodified; it is imported here and only when a request needs it.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.engine.pooling import last_hidden, tower_means
from mlx_onevision.engine.prefix_cache import PrefixCache
from mlx_onevision.errors import CancelledError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.onevision import OneVision, pool_frames
from mlx_onevision.prompt.processor import Inputs, Medium
from mlx_onevision.sampling.sampler import Chooser

# Encoded media are kept up to this share of the memory that the device should use, and no more than
# about twenty large images of the largest model take.
BANK_SHARE = 32
MOST_BANK_BYTES = 1 << 31

# Keys and values of conversations before the last one are kept up to this share of the memory that
# nothing else is planned for.
PREFIX_SHARE = 8
MOST_PREFIX_BYTES = 1 << 32


@dataclass(frozen=True)
class Unfinished:
    """An answer that was left off between two tokens, with all that it takes to go on.

    ids : the prompt's, virtual ones among them, and the answer's so far.
    keys : the media among them, whose ids the bank holds for whoever goes on.
    cache : holds all of them but the last.
    produced : how many of them are the answer's.
    """

    ids: list[int]
    keys: list[str]
    cache: list[Any]
    produced: int


@dataclass
class Counters:
    """What one request took. Seconds are wall time on the inference thread; bytes are MLX's."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already."""
    encoded_media: int = 0
    """Images and videos that went through the tower; the others came from the feature bank."""
    completion_tokens: int = 0
    import_seconds: float = 0.0
    """Loading mlx-lm, which the first request of a process waits for."""
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory: int = 0


class Runner:
    """The model and what is kept between requests. Lives on the inference thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model: OneVision = checkpoint.model
        self.prefix = PrefixCache(self.model)
        weights = sum(leaf.nbytes for leaf in dict(tree_flatten(self.model.parameters())).values())
        room = working_set()
        self.model.bank.capacity = min(room // BANK_SHARE, MOST_BANK_BYTES)
        itemsize = self.model.vision_tower.dtype.size
        scratch = memory.scratch_bytes(room, weights)
        self.model.budget = memory.plan(self.model.config, scratch, itemsize)
        free = max(0, room - weights - self.model.bank.capacity - scratch)
        self.prefix.capacity = min(free // PREFIX_SHARE, MOST_PREFIX_BYTES)
        # A processor is no faster with more, and a prompt can be left off between two of them.
        processor = mx.default_device().type == mx.cpu
        self.chunk = memory.CHUNKS[-1] if processor else self.model.budget.chunk
        """Tokens of a lone prompt that are read at once."""
        self.batch_positions = memory.batch_positions(
            self.model.config.text_config,
            free - self.prefix.capacity,
            itemsize,
        )
        """How many positions, padding included, the rows of a batch may have together."""

    def generate(
        self,
        inputs: Inputs,
        choosing: Chooser,
        max_tokens: int,
        counters: Counters,
        deliver: Callable[[int], None],
        check: Callable[..., None],
        company: Callable[[], bool] = lambda: False,
    ) -> Unfinished | None:
        """Hands each token to ``deliver`` as it comes, an end-of-text token included.

        counters : filled in as the request goes on.
        check : called between tokens, prefill chunks, groups of layers in these, and groups of
            tiles; ends the request by raising CancelledError. What was read until then stays in the
            cache.
        company : asked after each token; True leaves the answer off there, and returns it. It goes
            on in a batch then, with those that came meanwhile.
        """
        mx.reset_peak_memory()
        ids, keys = self.virtual_ids(inputs)
        counters.prompt_tokens = len(ids)
        with _wired(), self.model.bank.in_use(keys), self.model.interruptible(check):
            self.fill_bank(inputs, ids, self.prefix.match(ids), counters, check)
            cache, counters.cached_tokens = self.prefix.take(ids)
            produced: list[int] = []
            try:
                for token in self._tokens(ids, cache, choosing, max_tokens, counters, check):
                    produced.append(token)
                    deliver(token)
                    if token in self.checkpoint.generation_defaults.eos_token_ids:
                        break
                    check()
                    if company() and len(produced) < max_tokens:
                        return self._left_off(ids + produced, keys, len(produced), cache)
            except CancelledError:
                _level(cache)
                self.prefix.put_back(ids + produced, keys, cache)
                raise
            except BaseException:
                self.prefix.clear()  # memory may be short
                raise
            finally:
                counters.completion_tokens = len(produced)
                counters.peak_memory = mx.get_peak_memory()
            self.prefix.put_back(ids + produced, keys, cache)
        return None

    def _left_off(
        self, ids: list[int], keys: list[str], produced: int, cache: list[Any]
    ) -> Unfinished:
        from mlx_lm.models.cache import trim_prompt_cache

        trim_prompt_cache(cache, cache[0].offset - (len(ids) - 1))  # mlx-lm runs a token ahead
        self.model.bank.hold(keys)
        return Unfinished(ids, keys, cache, produced)

    def fill_bank(
        self,
        inputs: Inputs,
        ids: Sequence[int],
        matched: int,
        counters: Counters,
        check: Callable[..., None],
    ) -> None:
        """Encodes what reaches beyond the first ``matched`` ids, which a key-value cache holds, and
        loads mlx-lm meanwhile.
        """
        started = time.perf_counter()

        def launched() -> None:
            # The device works on tiles now, and the import takes more than a second.
            counters.import_seconds += _import_mlx_lm()
            check()

        counters.encoded_media = self._encode(inputs, ids, matched, launched)
        counters.import_seconds += _import_mlx_lm()
        counters.encode_seconds = time.perf_counter() - started - counters.import_seconds

    def _tokens(
        self,
        ids: list[int],
        cache: list[Any],
        choosing: Chooser,
        max_tokens: int,
        counters: Counters,
        check: Callable[..., None],
    ) -> Iterator[int]:
        from mlx_lm.generate import generate_step

        text, matched = self.model.config.text_config, counters.cached_tokens
        placeholder = self.model.config.image_token_index
        started = time.perf_counter()
        steps = generate_step(
            mx.array(ids[matched:], mx.int32),
            self.model,
            max_tokens=max_tokens,
            sampler=choosing.sampler(),
            logits_processors=choosing.logits_processors(
                text.vocab_size, placeholder, ids[:matched]
            ),
            prompt_cache=cache,
            prefill_step_size=self.chunk,
            prompt_progress_callback=check,
        )
        token, _ = next(steps)
        counters.prefill_seconds = time.perf_counter() - started
        started = time.perf_counter()
        yield int(token)
        with self.model.decoding():
            for token, _ in steps:
                counters.decode_seconds = time.perf_counter() - started
                yield int(token)

    def logits(self, inputs: Inputs, last: int | None) -> np.ndarray:
        ids, keys = self.virtual_ids(inputs)
        with self.model.bank.in_use(keys):
            self._encode(inputs, ids, 0, lambda: None)
            return np.array(self.model(mx.array(ids, mx.int32)[None], last=last)[0])

    def embed_tiles(
        self, tiles: np.ndarray, normalization: np.ndarray, check: Callable[..., None]
    ) -> np.ndarray:
        """See :func:`pooling.tower_means`."""
        with _wired():
            return tower_means(self.model, tiles, normalization, check)

    def embed_prompts(self, prompts: Sequence[Inputs], check: Callable[..., None]) -> np.ndarray:
        """The last hidden state of each prompt, float32 (prompts, hidden_size)."""
        rows = []
        with _wired(), ExitStack() as in_use:
            for inputs in prompts:
                ids, keys = self.virtual_ids(inputs)
                in_use.enter_context(self.model.bank.in_use(keys))
                self._encode(inputs, ids, 0, check)
                rows.append(ids)
            return last_hidden(self.model, rows, check)

    def forget(self, keys: Sequence[str]) -> None:
        """Drops the features of media, and the conversations about them."""
        self.prefix.forget(keys)
        self.model.bank.forget(keys)

    def virtual_ids(self, inputs: Inputs) -> tuple[list[int], list[str]]:
        """The prompt with every placeholder replaced by its medium's virtual ids, and their
        keys.
        """
        ids: list[int] = inputs.input_ids.tolist()
        placeholders = (self.model.config.image_token_index, self.model.config.video_token_index)
        position = 0
        for medium in inputs.media:
            while ids[position] not in placeholders:
                position += 1
            virtual = self.model.bank.reserve(medium.key, medium.tokens)
            ids[position : position + medium.tokens] = virtual
            position += medium.tokens
        return ids, [medium.key for medium in inputs.media]

    def _encode(
        self, inputs: Inputs, ids: Sequence[int], matched: int, check: Callable[..., None]
    ) -> int:
        """Puts the rows of all media that reach beyond ``matched`` into the bank; what the cache
        holds whole needs none. Returns how many went through the tower.
        """
        bank = self.model.bank
        rest = set(ids[matched:])
        encoded = 0
        for medium in inputs.media:
            needed = bank.reserve(medium.key, medium.tokens)[-1] in rest
            if needed and medium.key not in bank:
                bank.store(medium.key, self._rows(medium, check))
                encoded += 1
        return encoded

    def _rows(self, medium: Medium, check: Callable[..., None]) -> mx.array:
        model = self.model
        finish = pool_frames if medium.kind == "video" else _whole
        features = model.encode_tiles(medium.tiles, medium.normalization, check, finish)
        if medium.kind == "video":
            rows = model.pack_video(features)
        elif medium.packing is not None:
            rows = model.pack_image(features, medium.packing)
        else:
            rows = model.pack_tile(features)
        rows = rows.astype(model.dtype)
        mx.eval(rows)
        return rows


def _level(cache: Sequence[Any]) -> None:
    """Takes back what only some layers have read."""
    least = min(layer.offset for layer in cache)
    for layer in cache:
        layer.trim(layer.offset - least)


def _whole(group: mx.array) -> mx.array:
    return group


@contextmanager
def _wired() -> Iterator[None]:
    """On a Mac, keeps the memory in use resident while a request runs, and only then."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit is None:
        yield
        return
    before = mx.set_wired_limit(int(limit))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


def _import_mlx_lm() -> float:
    """Seconds that it took; next to nothing after the first time."""
    started = time.perf_counter()
    import mlx_lm.generate  # noqa: F401

    return time.perf_counter() - started


def working_set() -> int:
    """Bytes of memory that the device should use: Metal's own advice, else the machine's memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
