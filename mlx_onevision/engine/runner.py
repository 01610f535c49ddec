# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Requests on the inference thread: encode media, prefill, decode, keep the KV cache.

What is used of mlx-lm is imported only when a request needs it.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.distributed import least
from mlx_onevision.engine.decode import clear_between_chunks, decode_steps, import_mlx_lm
from mlx_onevision.engine.kv_cache import reserve, trim_to_shortest_layer
from mlx_onevision.engine.memory import among_stages, memory_model, wired, working_set
from mlx_onevision.engine.prefix_cache import PrefixCache
from mlx_onevision.engine.request import (
    ActiveRequest,
    Counters,
    as_package_error,
)
from mlx_onevision.engine.speculation import (
    Draft,
    ModelDraft,
    PromptLookup,
    check_draft,
    speculative_steps,
)
from mlx_onevision.engine.worker import Progress
from mlx_onevision.errors import CancelledError, OutOfMemoryError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.memory_sizes import CACHE_STEP, FOLLOW_UP, RequestSize
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Inputs, Medium

if TYPE_CHECKING:
    from mlx_onevision.engine.ranks import Ranks

# Encoded media are kept up to this share of the memory that the device should use, and no more than
# about twenty large images of the largest model take.
BANK_SHARE = 32
MOST_BANK_BYTES = 1 << 31
PREFIX_SHARE = 8  # keys and values of conversations before the last, of memory not planned for
MOST_PREFIX_BYTES = 1 << 32


class Runner:
    """The model and what is kept between requests. Lives on the inference thread.

    limit : bytes of memory that may be used at most; None: what the device should use.
    kv_bits : 8 or 4 keeps keys and values quantized.
    draft : a smaller model that proposes tokens to this one.
    progress : counts the steps, of the draft model as well.

    Raises:
        OutOfMemoryError: where the model, and its draft, do not fit into the limit.
        RequestError: for other kv_bits, for a model whose keys cannot be quantized, and for a draft
            whose tiles are others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        limit: int | None = None,
        kv_bits: int | None = None,
        draft: Checkpoint | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.progress = progress or Progress()
        self.ranks: Ranks | None = None  # that compute together with this one
        self.model: OneVision = checkpoint.model
        self.limit = working_set() if limit is None else min(limit, working_set())
        self.memory = memory_model(checkpoint, kv_bits)
        self.draft: Runner | None = None
        if draft is not None:
            check_draft(checkpoint, draft)
            self.draft = Runner(draft, progress=self.progress)
            # Of the draft's, only what is in use is kept, and the last conversation.
            self.draft.model.bank.capacity = self.draft.prefix.capacity = 0
            self.memory = self.memory.with_draft(self.draft.memory)
        if self.model.stage is not None:
            self.memory = among_stages(self.memory, self.limit, self.model.stage)
        quantized = None if kv_bits is None else (self.memory.kv_group, kv_bits)
        self.prefix = PrefixCache(self.model, quantized=quantized)
        if self.model.stage is not None:  # other layers may take more, and fewer be kept of them
            self.prefix.agreed = lambda count: int(least([count], self.model.group)[0])
        self.memory.admit_model(self.limit)
        self.plan(self.limit)

    def plan(self, limit: int) -> None:
        """Divides the bytes that may be used, which are others where models come and go."""
        self.limit = limit
        # The same on all ranks; where these have the same shares, that is what each has.
        limits = [(limit, sizes.weights) for sizes, limit in self.memory.of_ranks(self.limit)]
        scratch = min(memory.scratch_bytes(*own) for own in limits)
        self.model.budget = self.memory.plan(scratch)
        self.chunk = self.memory.most_chunk
        """Tokens of a lone prompt that are prefilled at once, at most."""
        room = min(limit - weights for limit, weights in limits) - scratch
        most = min(min(limits)[0] // BANK_SHARE, MOST_BANK_BYTES, room)
        self.model.bank.capacity = max(0, most)
        free = max(0, room - self.model.bank.capacity)
        self.prefix.capacity = min(free // PREFIX_SHARE, MOST_PREFIX_BYTES)
        self.model.bank.shrink(self.model.bank.capacity)
        self.prefix.shrink(self.prefix.capacity)

    def make_room(self, sizes: Sequence[RequestSize]) -> None:
        """Lets go of kept features and conversations, so that these requests can run together."""
        room = self.memory.room(sizes, self.model.budget, self.limit)
        self.model.bank.shrink(room)
        room -= self.model.bank.nbytes
        if self.draft is not None:
            self.draft.prefix.shrink(room)
            room -= self.draft.prefix.nbytes
        self.prefix.shrink(room)

    @contextmanager
    def within_limit(self, sizes: Sequence[RequestSize]) -> Generator[None]:
        """Meanwhile, steps are as small as each of these requests needs them to be."""
        budget = self.model.budget
        self.model.budget = self.memory.fitted(sizes, budget, self.limit)
        self.make_room(sizes)
        try:
            yield
        finally:
            self.model.budget = budget

    def sync(self) -> None:
        """Applies what has happened meanwhile, at a place that all ranks come to."""
        self.progress.step()
        if self.ranks is not None:
            self.ranks.sync()

    def interruptible(self, check: Callable[[], None]) -> AbstractContextManager[None]:
        """Calls ``check`` in the midst of long steps; where ranks divide the layers, they would not
        do so equally often, and on a GPU each would wait for the others.
        """
        apart = self.model.stage is not None
        waits = self.ranks is not None and mx.default_device().type == mx.gpu

        def step() -> None:
            self.progress.step()
            check()

        return nullcontext() if apart or waits else self.model.interruptible(step)

    def raise_if_alone(self, error: BaseException) -> None:
        """DiedError for what may have gone wrong on this one of several ranks alone."""
        if self.ranks is not None:
            self.ranks.raise_if_alone(error)

    def run_alone(
        self, active: ActiveRequest, should_yield: Callable[[], bool] = lambda: False
    ) -> bool:
        """Runs a request by itself until it ends; False where it was paused, to go on in a batch,
        because ``should_yield``, asked after each token, found others waiting.

        The request's ``check`` is called between tokens, prefill chunks, groups of layers in these,
        and groups of tiles. What was prefilled before a cancellation stays in the prefix cache.
        """
        mx.reset_peak_memory()

        def check() -> None:
            self.sync()
            active.check()

        try:
            check()
            alone = self.within_limit([active.size])
            with wired(), alone, self.interruptible(check):
                if self._decode(active, self.begin(active, check), should_yield, check):
                    return False
        except BaseException as error:
            self.raise_if_alone(error)
            if isinstance(as_package_error(error), OutOfMemoryError):
                self.prefix.clear()  # all kept caches go, so that the next request has memory
                if self.draft is not None:
                    self.draft.prefix.clear()
            active.end(error)
        else:
            active.end()
        return True

    def begin(self, active: ActiveRequest, check: Callable[[], None]) -> list[Any]:
        """Encodes the media of a request, and meanwhile takes a KV cache to prefill its prompt to,
        and makes room in it.
        """
        inputs, counters = active.request.inputs, active.counters
        ids, keys = self.virtual_ids(inputs)
        active.hold(self.model.bank, ids, keys)
        cache: list[Any] = []

        def launched() -> None:
            check()
            if not cache:
                taken, counters.cached_tokens = self.prefix.take(ids)
                cache.extend(taken)
                room = min(active.max_tokens, CACHE_STEP)
                reserve(self.model, cache, len(ids) + room, FOLLOW_UP)

        try:
            self.fill_bank(inputs, ids, self.prefix.match(ids), counters, launched)
            launched()
        except BaseException as error:
            self.raise_if_alone(error)
            if counters.cached_tokens:
                self.prefix.store(ids, keys, cache)
            raise
        active.begin(cache)
        return cache

    def _decode(
        self,
        active: ActiveRequest,
        cache: list[Any],
        should_yield: Callable[[], bool],
        check: Callable[[], None],
    ) -> bool:
        """Prefill and decode steps of a lone request; True where it was paused."""
        from mlx_lm.models.cache import trim_prompt_cache

        try:
            ahead = 1 + active.request.proposed  # a step's tokens
            with closing(self._tokens(active, cache, check)) as tokens:
                for token in tokens:
                    self.progress.step()
                    active.accept(token)
                    if token in self.checkpoint.generation_defaults.eos_token_ids:
                        break
                    active.check()
                    if should_yield() and active.produced < active.max_tokens:
                        # Leaves in the cache all ids but the last: the steps are a token ahead.
                        trim_prompt_cache(cache, cache[0].offset - (len(active.ids) - 1))
                        return True
                    reserve(self.model, cache, cache[0].offset + ahead)
        except CancelledError:
            trim_to_shortest_layer(cache)
            self.prefix.store(active.ids, active.keys, cache)
            raise
        self.prefix.store(active.ids, active.keys, cache)
        return False

    def _tokens(
        self, active: ActiveRequest, cache: list[Any], check: Callable[[], None]
    ) -> Generator[int]:
        cached = active.counters.cached_tokens
        steps = decode_steps(
            self.model,
            active.ids[cached:],
            cache,
            active.sampler.sampler(),
            self.processors(active),
            normalise=active.sampler.needs_logprobs,
            chunk=self.prefill_chunk,
            check=check,
            ranks=self.ranks,
        )
        with ExitStack() as drafting:
            if (most := active.request.proposed) and active.max_tokens > 1:
                yield (first := next(steps))
                draft = drafting.enter_context(self._draft(active))
                steps = speculative_steps(self.model, cache, first, draft, most)
            yield from islice(steps, active.max_tokens - active.produced)

    @contextmanager
    def _draft(self, active: ActiveRequest) -> Generator[Draft]:
        """What proposes tokens, given the prompt. A draft model has a prefix cache and a feature
        bank of its own, and encodes the media with its own tower.
        """
        vocab_size = self.model.config.text_config.vocab_size
        if self.draft is None or active.request.prompt_lookup:
            yield PromptLookup(active.ids[: active.counters.prompt_tokens], vocab_size)
            return
        runner, inputs = self.draft, active.request.inputs
        model, bank = runner.model, runner.model.bank
        model.budget = self.model.budget
        ids, keys = runner.virtual_ids(inputs)
        bank.hold(keys)
        try:
            with bank.in_use(keys), model.interruptible(active.check):
                matched = runner.prefix.match(ids)
                runner.fill_bank(inputs, ids, matched, Counters(), active.check)
                cache, _ = runner.prefix.take(ids)
                reserve(model, cache, len(ids) + min(active.max_tokens, CACHE_STEP))
                chunk = min(runner.chunk, model.budget.chunk)
                draft = ModelDraft(model, cache, ids, vocab_size, chunk=chunk, check=active.check)
            try:
                yield draft
            finally:
                if not isinstance(sys.exc_info()[1], Exception):  # else it may be damaged
                    runner.prefix.store(draft.ids, keys, cache)
        finally:
            bank.release(keys)

    @property
    def prefill_chunk(self) -> int:
        """Tokens of one prompt that are prefilled at once."""
        return min(self.chunk, self.model.budget.chunk)

    def prefill(self, ids: Sequence[int], cache: list[Any]) -> Iterator[None]:
        """Reads what of ``ids`` the cache does not hold, and pauses after each chunk."""
        if cache[0].offset < len(ids):
            reserve(self.model, cache, len(ids))
        while (start := cache[0].offset) < len(ids):
            chunk = mx.array([ids[start : start + self.prefill_chunk]], mx.int32)
            self.model(chunk, cache, last=1)  # its logits are never computed
            mx.eval([layer.state for layer in cache])
            clear_between_chunks()
            yield

    def processors(self, active: ActiveRequest) -> list[Any]:
        """What changes the logits of a request before a token is sampled."""
        vocab_size = self.model.config.text_config.vocab_size
        prompt = active.request.inputs.input_ids
        # A vocabulary that was cut may have no row for a placeholder.
        return active.sampler.logits_processors(vocab_size, prompt[prompt < vocab_size])

    def fill_bank(
        self,
        inputs: Inputs,
        ids: Sequence[int],
        matched: int,
        counters: Counters,
        check: Callable[..., None],
    ) -> None:
        """Encodes the media beyond the first ``matched`` ids, and loads mlx-lm meanwhile."""

        def launched() -> None:
            # The device works on tiles now, and the import takes more than a second.
            seconds = _import_mlx_lm()
            counters.import_seconds += seconds
            counters.encode_seconds -= seconds
            check()

        for _ in self.encode([(inputs, ids[matched:], counters)], launched):
            pass
        counters.import_seconds += _import_mlx_lm()

    def forget(self, keys: Sequence[str]) -> None:
        """Drops the features of these media, and the conversations about them."""
        self.prefix.forget(keys)
        self.model.bank.forget(keys)
        if self.draft is not None:
            self.draft.forget(keys)

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

    def encode(
        self,
        prompts: Sequence[tuple[Inputs, Sequence[int], Counters]],
        launched: Callable[..., None] = lambda: None,
    ) -> Iterator[None]:
        """Encodes into the bank the media of prompts, each with those of its ids that are to be
        prefilled, and counts those that went through the tower and the time. Pauses after each
        group of tiles; ``launched`` is called while the device works on it.
        """
        bank = self.model.bank
        missing: dict[str, tuple[Medium, Counters]] = {}
        for inputs, ids, counters in prompts:
            needed = set(ids)
            for medium in inputs.media:
                last = bank.reserve(medium.key, medium.tokens)[-1]
                if last in needed and medium.key not in bank:
                    missing.setdefault(medium.key, (medium, counters))
        groups = self.model.encode_groups([medium for medium, _ in missing.values()], launched)
        shares = {id(counters): counters for _, counters in missing.values()}.values()
        following = iter(missing.values())
        while True:
            started = time.perf_counter()
            try:
                packed = next(groups, None)
            finally:
                for counters in shares:
                    counters.encode_seconds += (time.perf_counter() - started) / len(shares)
            self.progress.step()
            if packed is None:
                return
            for embeddings, (medium, counters) in zip(packed, following, strict=False):
                bank.store(medium.key, embeddings)
                counters.encoded_media += 1
            yield


def _import_mlx_lm() -> float:
    """See :func:`import_mlx_lm`; returns the seconds that it took."""
    started = time.perf_counter()
    import_mlx_lm()
    return time.perf_counter() - started
