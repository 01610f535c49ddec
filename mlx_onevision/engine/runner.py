"""Requests on the inference thread: encode media, prefill, decode, keep the KV cache.

Batches are mlx-lm's, unmodified; what is used of it is imported only when a request needs it.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.engine.decode import (
    PromptLookup,
    decode_steps,
    import_mlx_lm,
    speculative_steps,
)
from mlx_onevision.engine.pooling import last_hidden, tower_means
from mlx_onevision.engine.prefix_cache import PrefixCache
from mlx_onevision.engine.request import ActiveRequest, Counters, as_package_error
from mlx_onevision.errors import CancelledError, OutOfMemoryError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Inputs, Medium

if TYPE_CHECKING:
    from mlx_lm.generate import BatchGenerator

# Encoded media are kept up to this share of the memory that the device should use, and no more than
# about twenty large images of the largest model take.
BANK_SHARE = 32
MOST_BANK_BYTES = 1 << 31
PREFIX_SHARE = 8  # keys and values of conversations before the last, of memory not planned for
MOST_PREFIX_BYTES = 1 << 32


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
        # A CPU is no faster with more, and a prompt can be interrupted between two of them.
        processor = mx.default_device().type == mx.cpu
        self.chunk = memory.CHUNKS[-1] if processor else self.model.budget.chunk
        """Tokens of a lone prompt that are prefilled at once."""
        self.batch_positions = memory.batch_positions(
            self.model.config.text_config, free - self.prefix.capacity, itemsize
        )
        """How many positions, padding included, the requests of a batch may have together."""

    def run_alone(
        self, active: ActiveRequest, should_yield: Callable[[], bool] = lambda: False
    ) -> bool:
        """Runs a request by itself until it ends; False where it was paused, to go on in a batch,
        because ``should_yield``, asked after each token, found others waiting.

        The request's ``check`` is called between tokens, prefill chunks, groups of layers in these,
        and groups of tiles. What was prefilled before a cancellation stays in the prefix cache.
        """
        mx.reset_peak_memory()
        try:
            active.check()
            with _wired(), self.model.interruptible(active.check):
                if self._decode(active, self.begin(active), should_yield):
                    return False
        except BaseException as error:
            active.end(error)
        else:
            active.end()
        return True

    def begin(self, active: ActiveRequest) -> list[Any]:
        """Encodes the media of a request, and takes a KV cache to prefill its prompt into."""
        inputs, counters = active.request.inputs, active.counters
        ids, keys = self.virtual_ids(inputs)
        active.hold(self.model.bank, keys)
        counters.prompt_tokens = len(ids)
        self.fill_bank(inputs, ids, self.prefix.match(ids), counters, active.check)
        cache, counters.cached_tokens = self.prefix.take(ids)
        active.begin(ids, cache)
        return cache

    def _decode(
        self, active: ActiveRequest, cache: list[Any], should_yield: Callable[[], bool]
    ) -> bool:
        """Prefill and decode steps of a lone request; True where it was paused."""
        from mlx_lm.models.cache import trim_prompt_cache

        try:
            for token in self._tokens(active, cache):
                active.accept(token)
                if token in self.checkpoint.generation_defaults.eos_token_ids:
                    break
                active.check()
                if should_yield() and active.counters.completion_tokens < active.max_tokens:
                    # Leaves in the cache all ids but the last: the steps are a token ahead.
                    trim_prompt_cache(cache, cache[0].offset - (len(active.ids) - 1))
                    return True
        except CancelledError:
            trim_to_shortest_layer(cache)
            self.prefix.store(active.ids, active.keys, cache)
            raise
        except BaseException as error:
            if isinstance(as_package_error(error), OutOfMemoryError):
                self.prefix.clear()  # all kept caches go, so that the next request has memory
            raise
        self.prefix.store(active.ids, active.keys, cache)
        return False

    def _tokens(self, active: ActiveRequest, cache: list[Any]) -> Iterator[int]:
        cached = active.counters.cached_tokens
        steps = decode_steps(
            self.model,
            active.ids[cached:],
            cache,
            active.sampler.sampler(),
            self._processors(active, active.ids[:cached]),
            normalise=active.sampler.needs_logprobs,
            chunk=self.chunk,
            check=active.check,
        )
        if most := active.request.prompt_lookup:
            first, vocab_size = next(steps), self.model.config.text_config.vocab_size
            draft = PromptLookup(active.ids, most, vocab_size)
            steps = speculative_steps(self.model, cache, first, draft, check=active.check)
        return islice(steps, active.max_tokens)

    def insert(self, active: ActiveRequest, generator: "BatchGenerator") -> tuple[int, bool]:
        """Adds a new or paused request to a batch: its uid there, and whether it is prefilling."""
        cache = active.cache
        prefilling = cache is None
        if cache is None:
            cache = self.begin(active)
        held = active.counters.cached_tokens if prefilling else len(active.ids) - 1
        produced = active.counters.completion_tokens
        (uid,) = generator.insert(
            [active.ids[held:]],
            max_tokens=[active.max_tokens - produced],
            caches=[cache],
            all_tokens=[active.ids[:held]],
            samplers=[active.sampler.sampler(produced)],
            logits_processors=[self._processors(active)],
        )
        active.cache = None
        return uid, prefilling

    def _processors(self, active: ActiveRequest, before: Sequence[int] = ()) -> list[Any]:
        config = self.model.config
        vocab_size, placeholder = config.text_config.vocab_size, config.image_token_index
        return active.sampler.logits_processors(vocab_size, placeholder, before)

    def fill_bank(
        self,
        inputs: Inputs,
        ids: Sequence[int],
        matched: int,
        counters: Counters,
        check: Callable[..., None],
    ) -> None:
        """Encodes the media beyond the first ``matched`` ids, and loads mlx-lm meanwhile."""
        started = time.perf_counter()

        def launched() -> None:
            # The device works on tiles now, and the import takes more than a second.
            counters.import_seconds += _import_mlx_lm()
            check()

        self._encode([(inputs, ids[matched:], counters)], launched)
        counters.import_seconds += _import_mlx_lm()
        counters.encode_seconds += time.perf_counter() - started - counters.import_seconds

    @contextmanager
    def encoded_together(self, requests: Sequence[ActiveRequest]) -> Iterator[None]:
        """While requests begin that will be prefilled together: their media are in the bank, tiles
        of several encoded in a group. What fails here fails again where its own request begins.
        """

        def check() -> None:
            for active in requests:
                active.check()

        started = time.perf_counter()
        with ExitStack() as in_use:
            with suppress(Exception):
                prompts: list[tuple[Inputs, Sequence[int], Counters]] = []
                for active in requests:
                    inputs = active.request.inputs
                    ids, keys = self.virtual_ids(inputs)
                    in_use.enter_context(self.model.bank.in_use(keys))
                    prompts.append((inputs, ids[self.prefix.match(ids) :], active.counters))
                self._encode(prompts, check)
            seconds = time.perf_counter() - started
            encoded = sum(active.counters.encoded_media for active in requests)
            for active in requests:
                share = active.counters.encoded_media / max(1, encoded)
                active.counters.encode_seconds += share * seconds
            yield

    def logits(self, inputs: Inputs, last: int | None) -> np.ndarray:
        ids, keys = self.virtual_ids(inputs)
        with self.model.bank.in_use(keys):
            self._encode([(inputs, ids, Counters())], lambda: None)
            return np.array(self.model(mx.array(ids, mx.int32)[None], last=last)[0])

    def embed_tiles(
        self, tiles: np.ndarray, normalization: np.ndarray, check: Callable[..., None]
    ) -> np.ndarray:
        with _wired():
            return tower_means(self.model, tiles, normalization, check)

    def embed_prompts(self, prompts: Sequence[Inputs], check: Callable[..., None]) -> np.ndarray:
        """The last hidden state of each prompt, float32 (prompts, hidden_size)."""
        rows: list[list[int]] = []
        with _wired(), ExitStack() as in_use:
            for inputs in prompts:
                ids, keys = self.virtual_ids(inputs)
                in_use.enter_context(self.model.bank.in_use(keys))
                rows.append(ids)
            together = [(*pair, Counters()) for pair in zip(prompts, rows, strict=True)]
            self._encode(together, check)
            return last_hidden(self.model, rows, check)

    def forget(self, keys: Sequence[str]) -> None:
        self.prefix.forget(keys)
        self.model.bank.forget(keys)

    def virtual_ids(self, inputs: Inputs) -> tuple[list[int], list[str]]:
        """The prompt's ids, placeholders replaced by virtual ids, and the keys of its media."""
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
        self,
        prompts: Sequence[tuple[Inputs, Sequence[int], Counters]],
        check: Callable[..., None],
    ) -> None:
        """Encodes into the bank the media of prompts, each with those of its ids that are to be
        prefilled, and counts those that went through the tower.
        """
        bank = self.model.bank
        missing: dict[str, tuple[Medium, Counters]] = {}
        for inputs, ids, counters in prompts:
            needed = set(ids)
            for medium in inputs.media:
                last = bank.reserve(medium.key, medium.tokens)[-1]
                if last in needed and medium.key not in bank:
                    missing.setdefault(medium.key, (medium, counters))
        encoded = self.model.encode_media([medium for medium, _ in missing.values()], check)
        for (medium, counters), embeddings in zip(missing.values(), encoded, strict=True):
            bank.store(medium.key, embeddings)
            counters.encoded_media += 1


def trim_to_shortest_layer(cache: Sequence[Any]) -> None:
    """Takes back the positions that only some layers have computed."""
    shortest = min(layer.offset for layer in cache)
    for layer in cache:
        layer.trim(layer.offset - shortest)


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
    """Returns the seconds that it took."""
    started = time.perf_counter()
    import_mlx_lm()
    return time.perf_counter() - started


def working_set() -> int:
    """Bytes of memory that the device should use: Metal's advice, else the machine's memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
