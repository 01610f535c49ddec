"""Requests to a loaded model, from any thread: tokens stream back, and can be cancelled.

Requests begin in the order in which they are submitted; those that come while others are running
join them, between two tokens. Everything else takes its turn. MLX arrays stay on the inference
thread (:mod:`thread`, :mod:`runner`); ids, texts, numpy arrays and plain numbers cross over.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.request import ActiveRequest, PromptRequest, as_package_error
from mlx_onevision.engine.runner import Runner
from mlx_onevision.engine.thread import Worker
from mlx_onevision.errors import CancelledError, ContextOverflowError, OneVisionError
from mlx_onevision.media.video import no_check
from mlx_onevision.prompt.processor import Inputs
from mlx_onevision.sampling.detokenizer import TokenBytes

Result = TypeVar("Result")


class Engine:
    """A loaded model on its thread. Making it raises what loading raises.

    dtype : cast the weights to this type; None keeps the checkpoint's.
    recipe : quantize the weights while they are read; None leaves them as they are.
    """

    def __init__(
        self, folder: Path, dtype: str | None = None, recipe: Recipe | None = None
    ) -> None:
        self._waiting: deque[ActiveRequest] = deque()  # requests that may run together
        self._order = threading.Lock()
        self._worker = Worker(lambda: Runner(load_checkpoint(folder, dtype=dtype, recipe=recipe)))
        # Plain data, anyone's to read.
        self.config = self._worker.call(lambda runner: runner.checkpoint.config)
        self.defaults = self._worker.call(lambda runner: runner.checkpoint.generation_defaults)

    def admit(self, request: PromptRequest, tokenizer: TokenBytes) -> ActiveRequest:
        """ContextOverflowError when the prompt leaves no room for an answer."""
        length = len(request.inputs.input_ids)
        limit = self.config.text_config.max_position_embeddings
        if length >= limit:
            raise ContextOverflowError(
                f"the prompt has {length} tokens, but the model's context holds {limit}; "
                "use fewer or smaller media or a shorter text"
            )
        max_tokens = min(request.max_tokens, limit - length)
        eos, closing = self.defaults.eos_token_ids, self._worker.closing
        return ActiveRequest(request, tokenizer, max_tokens, eos, closing)

    def submit(self, requests: Sequence[ActiveRequest]) -> None:
        """Starts requests, which run together."""
        with self._order:
            waiting = self._waiting
            waiting.extend(requests)
            try:
                self._worker.post(
                    lambda runner: serve(runner, waiting), lambda error: _end(requests, error)
                )
            except OneVisionError:  # closed, or dead
                for active in requests:
                    with suppress(ValueError):  # an earlier job has taken it, to see ``closing``
                        waiting.remove(active)
                raise

    def _in_turn(self, function: Callable[[Runner], Result]) -> "Future[Result]":
        """Runs ``function`` after the requests that wait now, and before those that come later."""

        def job(runner: Runner) -> Result:
            try:
                return function(runner)
            except RuntimeError as error:
                raise as_package_error(error) from error

        with self._order:
            self._waiting = deque()
            return self._worker.submit(job)

    def logits(self, inputs: Inputs, last: int | None = None) -> np.ndarray:
        """Logits of the last positions of a prompt, or of every one; float32 (L, vocab_size)."""
        return self._in_turn(lambda runner: runner.logits(inputs, last)).result()

    def embed_tiles(
        self, tiles: np.ndarray, normalization: np.ndarray, check: Callable[[], None] = no_check
    ) -> "Future[np.ndarray]":
        """The tower's mean features of tiles (n, S, S, 3), one vector each; float32 (n, width).

        check : called on the inference thread between groups of tiles; ends it by raising.
        """
        both = _checking(self._worker.closing, check)
        return self._in_turn(lambda runner: runner.embed_tiles(tiles, normalization, both))

    def embed_prompts(
        self, prompts: Sequence[Inputs], check: Callable[[], None] = no_check
    ) -> "Future[np.ndarray]":
        """The last hidden state of each prompt; float32 (n, hidden_size). ``check`` : as above."""
        both = _checking(self._worker.closing, check)
        return self._in_turn(lambda runner: runner.embed_prompts(prompts, both))

    @property
    def healthy(self) -> bool:
        """False once its thread has died: it does not answer any more."""
        return self._worker.alive

    def forget(self, inputs: Inputs) -> None:
        """Drops what is kept of a prompt's media once the requests before this have run."""
        keys = [medium.key for medium in inputs.media]
        self._worker.submit(lambda runner: runner.forget(keys))

    def close(self) -> None:
        """Cancels what is under way and frees the model, on its thread."""
        self._worker.close()


def _checking(closing: threading.Event, wanted: Callable[[], None]) -> Callable[..., None]:
    """Raises CancelledError once the model is being closed, and what ``wanted`` raises."""

    def check(*_: object) -> None:
        if closing.is_set():
            raise CancelledError("the request was cancelled")
        wanted()

    return check


def _end(requests: Sequence[ActiveRequest], error: BaseException) -> None:
    for active in requests:
        with suppress(BaseException):  # its reader gets the error, whatever else goes wrong
            active.end(error)
