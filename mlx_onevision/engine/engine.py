"""Requests to a loaded model, from any thread: tokens stream back, and can be cancelled.

Answers are begun in the order in which they were asked for. One that is alone runs alone; those
that come while others are under way join them, between two tokens. Everything else takes its turn.

Everything that touches an MLX array happens on the inference thread (see :mod:`worker` and
:mod:`runner`); what crosses over is ids, numpy arrays and plain numbers.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.request import Request, Row
from mlx_onevision.engine.runner import Counters, Runner
from mlx_onevision.engine.thread import Worker
from mlx_onevision.errors import (
    CancelledError,
    ContextOverflowError,
    OneVisionError,
    OutOfMemoryError,
)
from mlx_onevision.prompt.processor import Inputs

Result = TypeVar("Result")


class TokenStream:
    """Generated token ids as they come. Iterate it, cancel it, read ``counters`` when it has
    ended.

    closing : set when the model is being closed, which cancels.
    ends_at : see :class:`~mlx_onevision.engine.request.Request`.
    """

    def __init__(
        self, closing: threading.Event, ends_at: Callable[[int], bool] = lambda _: False
    ) -> None:
        self.counters = Counters()
        self._closing = closing
        self._ends_at = ends_at
        self._items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._interrupted = False

    def cancel(self) -> None:
        """Stops before the next token, prefill chunk or group of tiles; iteration then ends."""
        self._cancelled.set()

    @property
    def interrupted(self) -> bool:
        """Whether a cancellation, not the model or the token limit, ended it."""
        return self._interrupted

    def __iter__(self) -> Iterator[int]:
        while True:
            item = self._items.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    # The inference thread's side.

    def check(self, *_: object) -> None:
        if self._cancelled.is_set() or self._closing.is_set():
            self._interrupted = True
            raise CancelledError("the request was cancelled")

    def put(self, item: int | BaseException | None) -> None:
        if isinstance(item, int) and self._ends_at(item):
            self._cancelled.set()
        self._items.put(_in_our_words(item) if isinstance(item, BaseException) else item)


class Engine:
    """A loaded model on its thread. Requests run in the order they came.

    folder : a checkpoint's files.
    dtype : cast the weights to this type; None keeps the checkpoint's.
    recipe : pack the weights while they are read; None leaves them as they are.

    Raises what loading raises.
    """

    def __init__(
        self, folder: Path, dtype: str | None = None, recipe: Recipe | None = None
    ) -> None:
        self._line: deque[Row] = deque()  # answers that may run together
        self._order = threading.Lock()
        self._worker = Worker(lambda: Runner(load_checkpoint(folder, dtype=dtype, recipe=recipe)))
        # Plain data, anyone's to read.
        self.config = self._worker.call(lambda runner: runner.checkpoint.config)
        self.defaults = self._worker.call(lambda runner: runner.checkpoint.generation_defaults)

    def generate(self, request: Request) -> TokenStream:
        """Starts a request and returns its tokens as they come; an end-of-text token is the last.

        Raises:
            ContextOverflowError: when the prompt leaves no room for an answer.
        """
        fitted = self._within_context(request)
        stream = TokenStream(self._worker.closing, request.ends_at)
        self._queue([Row(fitted, stream)])
        return stream

    def generate_batch(self, requests: Sequence[Request]) -> list[TokenStream]:
        """Starts requests that run together; each has its tokens, its cancellation and its errors
        to itself, a prompt beyond the context included.
        """
        streams = [TokenStream(self._worker.closing, request.ends_at) for request in requests]
        rows: list[Row] = []
        for request, stream in zip(requests, streams, strict=True):
            try:
                rows.append(Row(self._within_context(request), stream))
            except ContextOverflowError as error:
                stream.put(error)
        if rows:
            self._queue(rows)
        return streams

    def _queue(self, rows: Sequence[Row]) -> None:
        with self._order:
            line = self._line
            line.extend(rows)
            try:
                self._worker.post(
                    lambda runner: serve(runner, line), lambda error: _end(rows, error)
                )
            except OneVisionError:  # closed, or dead
                for row in rows:
                    with suppress(ValueError):  # an earlier job has taken it, to see ``closing``
                        line.remove(row)
                raise

    def _submit(self, function: Callable[[Runner], Result]) -> "Future[Result]":
        """Runs ``function`` in its turn: after the answers that wait now, and before those that are
        asked for from here on.
        """
        with self._order:
            self._line = deque()
            return self._worker.submit(lambda runner: _worded(lambda: function(runner)))

    def failed(self, error: BaseException) -> TokenStream:
        """The tokens of a request that could not be made: none, and ``error``."""
        stream = TokenStream(self._worker.closing)
        stream.put(error)
        return stream

    def _within_context(self, request: Request) -> Request:
        length = len(request.inputs.input_ids)
        limit = self.config.text_config.max_position_embeddings
        if length >= limit:
            raise ContextOverflowError(
                f"the prompt has {length} tokens, but the model's context holds {limit}; "
                "use fewer or smaller media or a shorter text"
            )
        return replace(request, max_tokens=min(request.max_tokens, limit - length))

    def logits(self, inputs: Inputs, last: int | None = None) -> np.ndarray:
        """Logits of the last positions of a prompt, or of every one; float32 (L, vocab_size)."""
        return self._submit(lambda runner: runner.logits(inputs, last)).result()

    def embed_tiles(
        self,
        tiles: np.ndarray,
        normalization: np.ndarray,
        check: Callable[[], None] = lambda: None,
    ) -> "Future[np.ndarray]":
        """The tower's mean features of tiles (n, S, S, 3), one vector each; float32 (n, width).

        check : called on the inference thread between groups of tiles; ends it by raising.
        """
        both = _checking(self._worker.closing, check)
        return self._submit(lambda runner: runner.embed_tiles(tiles, normalization, both))

    def embed_prompts(
        self, prompts: Sequence[Inputs], check: Callable[[], None] = lambda: None
    ) -> "Future[np.ndarray]":
        """The last hidden state of each prompt; float32 (n, hidden_size).

        check : called on the inference thread between prompts, and within them; ends it by raising.
        """
        both = _checking(self._worker.closing, check)
        return self._submit(lambda runner: runner.embed_prompts(prompts, both))

    @property
    def healthy(self) -> bool:
        """False once its thread has died: whatever is asked, it does not answer any more."""
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


def _end(rows: Sequence[Row], error: BaseException) -> None:
    for row in rows:
        with suppress(BaseException):  # whoever waits has been told, whatever else goes wrong
            row.end(error)


def _worded(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except RuntimeError as error:
        raise _in_our_words(error) from error


def _in_our_words(error: BaseException) -> BaseException:
    """An allocation that MLX could not make, as our own error; anything else as it is."""
    text = str(error)
    if isinstance(error, RuntimeError) and ("allocate" in text or "out of memory" in text.lower()):
        return OutOfMemoryError(
            f"the device ran out of memory ({text.splitlines()[0][:200]}); "
            "use a quantized model, fewer or smaller media, or close other programs"
        )
    return error
