# pyright: reportUnknownMemberType=false
"""Prefill and decode of a request that runs alone, and the parts of mlx-lm that it needs.

The steps are those of mlx-lm's ``generate_step``: prefill in chunks, and each token's step sent to
the device before the token before it is read. It differs where that saves time: the last id of the
prompt is in the last chunk, with no step of its own, and a greedy choice is made of the logits
themselves.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_onevision.network.onevision import OneVision

if TYPE_CHECKING:
    from mlx_onevision.engine.ranks import Ranks

Processor = Callable[[mx.array, mx.array], mx.array]

CLEAR_EVERY = 256  # tokens after which MLX's cache of freed buffers is emptied
MOST_FREED = 1 << 31  # bytes in it after which it is emptied between two chunks of a prompt


def decode_steps(
    model: OneVision,
    ids: list[int],
    cache: list[Any],
    sampler: Callable[[mx.array], mx.array],
    processors: Sequence[Processor],
    *,
    normalise: bool,
    chunk: int,
    check: Callable[[], None],
    ranks: "Ranks | None" = None,
) -> Iterator[int]:
    """The tokens of an answer, without end. Each but the first is in the cache when it is yielded.

    ids : of the prompt, behind what the cache holds; one at least.
    sampler : from log-probabilities (1, vocab_size) to an id (1,); from logits where not
        ``normalise``.
    processors : applied to the logits, given all ids so far.
    chunk : prompt tokens that are prefilled at once. ``check`` : called after each of them.
    ranks : that compute each step together, and all go on with the tokens of rank 0.
    """
    seen = mx.array([], mx.int32)

    def step(inputs: mx.array) -> mx.array:
        nonlocal seen
        logits = model(inputs[None], cache, last=1)[:, -1]
        if processors:
            seen = mx.concatenate([seen, inputs])
            for process in processors:
                logits = process(seen, logits)
        if normalise:
            logits = logits - mx.logsumexp(logits, keepdims=True)
        token = sampler(logits).astype(mx.int32)
        if ranks is not None:
            token = ranks.share(token)
        mx.async_eval(token)
        return token

    prompt = mx.array(ids, mx.int32)
    # With pipeline stages, this rank runs a chunk later than the rank before it. Every rank must
    # still call `check` equally often, so calls are spread by `behind`.
    behind = 0 if model.stage is None else model.stage.behind
    chunks, checked = (len(prompt) - 1) // chunk, 0

    def check_until(count: int) -> None:
        nonlocal checked
        while checked < min(count, chunks):
            checked += 1
            check()

    check()
    check_until(behind - 1)
    for number in range(chunks):
        arrived = partial(check_until, number + behind)
        with model.interruptible(arrived) if behind else nullcontext():
            model(prompt[None, :chunk], cache, last=1)  # its logits are never computed
        mx.eval([layer.state for layer in cache])
        if processors:
            seen = mx.concatenate([seen, prompt[:chunk]])
        prompt = prompt[chunk:]
        if not behind:
            check_until(number + 1)
        clear_between_chunks()

    def value(token: mx.array) -> int:
        values = np.array(token).tolist()
        if ranks is not None:
            ranks.heed(values[1])
        return values[0]

    token = step(prompt)
    yield value(token)  # before the next step is built, which takes a while
    produced = 0
    with model.decoding():
        following = token = step(token[:1])
        try:
            while True:
                following = step(token[:1])
                yield value(token)
                token = following
                produced += 1
                if produced % CLEAR_EVERY == 0:
                    mx.clear_cache()
        finally:
            if ranks is not None:  # a rank that ends must not leave the others waiting
                mx.eval(following)


def clear_between_chunks() -> None:
    """Empties MLX's cache of freed buffers where it is large; else the next chunk takes them."""
    if mx.get_cache_memory() > MOST_FREED:
        mx.clear_cache()


# What is imported of mlx-lm; batches need more of it, see :mod:`batch`.
PARTS = ("models", "sample_utils")
_initialising = threading.RLock()


class _Package(ModuleType):
    """The package ``mlx_lm`` before its ``__init__`` has run, which it does as soon as somebody
    asks for a name that is not among ``PARTS``.
    """

    def __getattribute__(self, name: str) -> Any:
        known = ModuleType.__getattribute__(self, "__dict__")
        special = name.startswith("__") and (name in known or hasattr(ModuleType, name))
        if not special and name not in PARTS:
            with _initialising:
                if not known.get("__initialising__"):
                    known["__initialising__"] = True
                    self.__spec__.loader.exec_module(self)  # pyright: ignore[reportOptionalMemberAccess]
                    object.__setattr__(self, "__class__", ModuleType)
        return ModuleType.__getattribute__(self, name)


def import_mlx_lm() -> None:
    """Imports mlx-lm's KV caches and samplers.

    By themselves: its ``__init__`` imports transformers, which is most of a cold command's time.
    """
    spec = importlib.util.find_spec("mlx_lm") if "mlx_lm" not in sys.modules else None
    if spec is not None:
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Package
        sys.modules.setdefault("mlx_lm", package)
    for name in ("mlx_lm.models.cache", "mlx_lm.sample_utils"):
        importlib.import_module(name)
