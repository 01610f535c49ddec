# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Requests that decode together: a row each of one KV cache a layer.

The caches are mlx-lm's, padded on the left to the longest row; the loop is not. mlx-lm's computes
and slices log-probabilities that nobody reads, runs the last id of each prompt in a step of its
own, and is imported together with transformers.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_onevision.engine.decode import CLEAR_EVERY
from mlx_onevision.engine.kv_cache import reserve
from mlx_onevision.engine.prefix_cache import common_prefix
from mlx_onevision.engine.request import ActiveRequest
from mlx_onevision.engine.runner import Runner


@dataclass(eq=False)
class Row:
    """A request and what samples its tokens.

    context : mlx-lm's buffer of the ids so far, for its logits processors; None without any.
    fresh : the next step's input is the last id of its prompt, and not a token of its answer.
    """

    active: ActiveRequest
    sampler: Callable[[mx.array], mx.array]
    processors: Sequence[Callable[[Any, mx.array], mx.array]]
    context: Any
    fresh: bool = True

    @property
    def held(self) -> int:
        """How many of its ids the KV cache holds."""
        return len(self.active.ids) - self.fresh

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is wanted."""
        return not self.processors and not self.active.sampler.needs_logprobs


class Rows:
    """Requests in the order in which they joined. A step is sent to the device before the tokens of
    the one before are read.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._model = runner, runner.model
        self._rows: list[Row] = []
        self._cache: list[Any] = []
        self._tokens = mx.array([], mx.int32)  # the next step's inputs, one a row
        self._events: mx.array | None = None  # what came with them, among ranks
        self._steps = 0

    @property
    def requests(self) -> list[ActiveRequest]:
        return [row.active for row in self._rows]

    def join(self, newcomers: Sequence[tuple[ActiveRequest, list[Any]]]) -> None:
        """Adds requests, each with a KV cache that holds the first of its ids, and which is emptied
        here. The other ids, up to the last one, go through the model now, all in one step.
        """
        from mlx_lm.models.cache import TokenBuffer

        requests, caches = [active for active, _ in newcomers], [cache for _, cache in newcomers]
        tails = [active.ids[cache[0].offset : -1] for active, cache in newcomers]
        joined = self._merged(caches, max(map(len, tails)))
        self._prefill(joined, tails)
        self._extend(joined)
        for active in requests:
            processors = self._runner.processors(active)
            context = TokenBuffer(active.ids[:-1]) if processors else None
            sampler = active.sampler.sampler(active.produced)
            self._rows.append(Row(active, sampler, processors, context))
        last = mx.array([active.ids[-1] for active in requests], mx.int32)
        self._tokens = mx.concatenate([self._tokens, last])

    def step(self) -> list[tuple[ActiveRequest, int]]:
        """The next token of each request; none yet of those that have only just joined."""
        inputs, fresh = self._tokens, [row.fresh for row in self._rows]
        reserve(self._model, self._cache, self._cache[0].size() + 1)
        # All single ids are sampled ones, except the last of a prompt; see OneVision.decoding.
        with nullcontext() if any(fresh) else self._model.decoding():
            logits = self._model(inputs[:, None], self._cache)[:, -1]
        self._tokens, events = self._sample(logits, inputs).astype(mx.int32), self._events
        ranks = self._runner.ranks
        if ranks is not None:
            shared = ranks.share(self._tokens)
            self._tokens, self._events = shared[:-1], shared[-1:]
            mx.async_eval(self._events)
        mx.async_eval(self._tokens)
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        for row in self._rows:
            row.fresh = False
        found = zip(self.requests, np.array(inputs).tolist(), fresh, strict=True)
        if ranks is not None and events is not None:
            ranks.heed(np.array(events).tolist()[0])
        return [(active, token) for active, token, first in found if not first]

    def remove(self, requests: Sequence[ActiveRequest]) -> None:
        """Takes requests out of the batch, and their rows out of the KV cache."""
        keep = [n for n, row in enumerate(self._rows) if row.active not in requests]
        if len(keep) == len(self._rows):
            return
        self._rows = [self._rows[n] for n in keep]
        if not keep:
            self._cache, self._tokens = [], mx.array([], mx.int32)
            return
        self._tokens = self._tokens[mx.array(keep)]
        for layer in self._cache:
            layer.filter(keep)
            mx.eval(layer.state)

    def match(self, ids: list[int]) -> tuple[ActiveRequest | None, int]:
        """The request whose KV cache holds the most of the first ``ids``, and how many it holds."""
        matches = [
            (min(common_prefix(row.active.ids, ids), row.held), row.active) for row in self._rows
        ]
        most, active = max(matches, key=lambda match: match[0], default=(0, None))
        return active, most

    def cache_of(self, active: ActiveRequest, count: int) -> list[Any]:
        """A copy of the first positions of a request's KV cache, not evaluated yet."""
        from mlx_lm.models.cache import KVCache

        number = self.requests.index(active)
        copies: list[Any] = []
        for layer in self._cache:
            first = layer.size() - self._rows[number].held
            part = (slice(number, number + 1), slice(None), slice(first, first + count))
            copy = KVCache()
            copy.state = (*(mx.contiguous(x[part]) for x in (layer.keys, layer.values)), count)
            copies.append(copy)
        return copies

    def _merged(self, caches: Sequence[list[Any]], more: int) -> list[Any]:
        """One cache a layer, with room for as many positions more; layer by layer, so that nothing
        is there twice.
        """
        from mlx_lm.models.cache import BatchKVCache

        merged: list[Any] = []
        for number in range(len(self._model.layers)):
            layer: Any = BatchKVCache.merge([cache[number] for cache in caches])
            for cache in caches:
                cache[number] = None
            reserve(self._model, [layer], layer.size() + more + 1)
            mx.eval(layer.state)
            merged.append(layer)
        return merged

    def _prefill(self, cache: list[Any], tails: Sequence[list[int]]) -> None:
        """Computes what of each prompt its row does not hold, padded on the right, in one step."""
        longest = max(map(len, tails))
        if not longest:
            return
        padding = [longest - len(tail) for tail in tails]
        for layer in cache:
            layer.prepare(right_padding=padding)
        ids = [[*tail, *[0] * more] for tail, more in zip(tails, padding, strict=True)]
        self._model(mx.array(ids, mx.int32), cache, last=1)  # its logits are never computed
        mx.eval([layer.state for layer in cache])
        for layer in cache:
            layer.finalize()
            mx.eval(layer.state)
        mx.clear_cache()

    def _extend(self, joined: list[Any]) -> None:
        if not self._cache:
            self._cache = joined
            return
        for number, layer in enumerate(self._cache):
            layer.extend(joined[number])
            joined[number] = None
            mx.eval(layer.state)

    def _sample(self, logits: mx.array, inputs: mx.array) -> mx.array:
        """The next token of each row (B,), of float32 logits (B, vocab_size)."""
        likeliest = mx.argmax(logits, axis=-1)
        if all(row.is_plain for row in self._rows):
            return likeliest
        chosen: list[mx.array] = []
        for number, row in enumerate(self._rows):
            one = slice(number, number + 1)
            if row.is_plain:
                chosen.append(likeliest[one])
                continue
            own = logits[one]
            if row.processors:
                seen = row.context.update_and_fetch(inputs[one])
                for process in row.processors:
                    own = process(seen, own)
            if row.active.sampler.needs_logprobs:
                own = own - mx.logsumexp(own, axis=-1, keepdims=True)
            chosen.append(row.sampler(own).astype(mx.uint32))
        return mx.concatenate(chosen)
