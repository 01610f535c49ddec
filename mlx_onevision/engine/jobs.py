# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""What a model computes besides answers: logits and embeddings. A job has its turn between
requests, and a name by which it can be sent to other ranks.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_onevision.engine import pooling
from mlx_onevision.engine.decode import clear_between_chunks, import_mlx_lm
from mlx_onevision.engine.kv_cache import reserve
from mlx_onevision.engine.memory import wired
from mlx_onevision.engine.request import Counters, as_package_error, request_size
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.media.video import no_check
from mlx_onevision.prompt.processor import Inputs


def prompt_logits(
    runner: Runner, check: Callable[[], None], inputs: Inputs, last: int | None
) -> NDArray[np.float32]:
    """Logits of the last positions of a prompt, or of every one: float32 (L, vocab_size).

    In chunks: where attention is not fused, it takes memory with the square of its step.
    """
    import_mlx_lm()
    from mlx_lm.models.cache import KVCache

    model = runner.model
    ids, keys = runner.virtual_ids(inputs)
    first = 0 if last is None else max(0, len(ids) - last)  # position whose logits are wanted
    with (
        wired(),
        model.bank.in_use(keys),
        runner.within_limit([request_size(inputs, 0)]),
        runner.interruptible(check),
    ):
        for _ in runner.encode([(inputs, ids, Counters())], check):
            pass
        cache: list[Any] = [KVCache() for _ in model.layers]
        found = np.empty((len(ids) - first, model.config.text_config.vocab_size), np.float32)
        reserve(model, cache, len(ids))
        for start in range(0, len(ids), runner.prefill_chunk):
            runner.progress.step()
            check()
            chunk = ids[start : start + runner.prefill_chunk]
            end, wanted = start + len(chunk) - first, start + len(chunk) - max(start, first)
            logits = model(mx.array([chunk], mx.int32), cache, last=max(1, wanted))
            mx.eval([layer.state for layer in cache])
            if wanted > 0:
                found[end - wanted : end] = logits[0]
            clear_between_chunks()
        return found


def _embed_tiles(
    runner: Runner,
    check: Callable[[], None],
    tiles: NDArray[np.uint8],
    normalization: NDArray[np.float32],
) -> NDArray[np.float32]:
    return pooling.tile_vectors(runner, tiles, normalization, check)


def _embed_prompts(
    runner: Runner, check: Callable[[], None], prompts: Sequence[Inputs]
) -> NDArray[np.float32]:
    return pooling.prompt_vectors(runner, prompts, check)


def _forget(runner: Runner, check: Callable[[], None], keys: Sequence[str]) -> None:
    runner.forget(keys)


JOBS: Mapping[str, Callable[..., Any]] = {
    "logits": prompt_logits,
    "embed_tiles": _embed_tiles,
    "embed_prompts": _embed_prompts,
    "forget": _forget,
}
"""Each is called with the runner, a check that ends it by raising, and the job's arguments."""


class Job:
    """One of :data:`JOBS`, with its arguments, and a future for its result.

    wanted : the caller's check, called between steps; ends the job by raising.
    in_turn : it waits for the requests that came before it, and later ones wait for it.
    number : by which ranks know it; -1 without ranks.
    """

    def __init__(
        self, name: str, arguments: list[Any], wanted: Callable[[], None] = no_check
    ) -> None:
        self.name, self.arguments = name, arguments
        self.in_turn = name != "forget"
        self.number = -1
        self.future: Future[Any] = Future()
        self._wanted = wanted
        self._refusal: Exception | None = None
        self._cancelled = threading.Event()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel_now(self) -> None:
        self._cancelled.set()

    def refused(self) -> bool:
        """Whether its caller does not want it any more."""
        try:
            if not self.future.running() and not self.future.set_running_or_notify_cancel():
                raise CancelledError("the request was cancelled")
            self._wanted()
        except Exception as error:
            self._refusal = self._refusal or error
        return self._refusal is not None

    def run(self, runner: Runner, check: Callable[..., None]) -> None:
        """``check`` : called between steps, and ends it by raising."""
        try:
            check()
            result = JOBS[self.name](runner, check, *self.arguments)
        except BaseException as error:
            runner.raise_if_alone(error)
            self.end(self._refusal or error)
        else:
            with suppress(Exception):
                self.future.set_result(result)

    def end(self, error: BaseException) -> None:
        """Fails with an error, unless it has its result."""
        with suppress(Exception):  # nobody waits, or it has its result
            self.future.set_exception(as_package_error(error))
