"""A request: what to answer, and its progress from submission to its end."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlx_onevision.errors import CancelledError, OutOfMemoryError, RequestError
from mlx_onevision.media.anyres import Packing
from mlx_onevision.network.feature_bank import FeatureBank
from mlx_onevision.network.memory_sizes import MediumSize, RequestSize
from mlx_onevision.prompt.processor import Inputs
from mlx_onevision.sampling.detokenizer import Detokenizer, StopStrings, TokenBytes
from mlx_onevision.sampling.grammar import Grammar
from mlx_onevision.sampling.logprobs import LogprobRecorder
from mlx_onevision.sampling.ranges import check_range
from mlx_onevision.sampling.sampler import PENALTIES, RequestSampler, Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]

# What the thread that waits for a first token is given to take it and pass it on.
HANDOVER_SECONDS = 0.0002


@dataclass(frozen=True, eq=False)
class PromptRequest:
    """A prepared conversation, and how to answer it; settings as in
    :class:`~mlx_onevision.engine.options.Options`. ``grammar`` : of its JSON schema.
    ``open_ended`` : nobody asked for this max_tokens, so that it is fewer where memory holds fewer.

    Raises:
        RequestError: for a max_tokens or logprobs out of range, and for a stop string that is none.
    """

    inputs: Inputs
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()
    prepare_seconds: float = 0.0
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_lookup: int = 0
    draft_tokens: int = 0
    open_ended: bool = False

    def __post_init__(self) -> None:
        check_range("max_tokens", self.max_tokens)
        check_range("prompt_lookup", self.prompt_lookup)
        check_range("draft_tokens", self.draft_tokens)
        if self.proposed:
            given = "prompt_lookup" if self.prompt_lookup else "draft_tokens"
            unfit = [
                name
                for name, unlike in (
                    ("temperature", not self.sampling.is_greedy),
                    *((name, getattr(self.sampling, name) not in (0, 1)) for name in PENALTIES),
                    ("logit_bias", bool(self.sampling.logit_bias)),
                    ("json_schema", self.grammar is not None),
                    ("logprobs", self.logprobs is not None),
                    ("draft_tokens", self.prompt_lookup and self.draft_tokens),
                )
                if unlike
            ]
            if unfit:
                raise RequestError(
                    f"{given} is for greedy answers and has no meaning with {unfit[0]}; "
                    "leave one of them out"
                )
        if self.logprobs is not None:
            check_range("logprobs", self.logprobs)
        StopStrings(self.stop)

    @property
    def proposed(self) -> int:
        """The most tokens that are proposed at once; 0 without speculative decoding."""
        return self.prompt_lookup or self.draft_tokens

    def size(self, answer: int) -> RequestSize:
        """What memory depends on, with an answer of so many tokens."""
        # Proposed tokens are in the cache until they are taken back.
        size = request_size(self.inputs, answer + self.proposed)
        return size._replace(drafted=self.draft_tokens > 0)


@dataclass
class Counters:
    """What one request took. Seconds are wall time on the inference thread; bytes are MLX's."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    encoded_media: int = 0
    """Images and videos that went through the tower; the others came from the feature bank."""
    completion_tokens: int = 0
    import_seconds: float = 0.0
    encode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class TokenText:
    """A generated token (None for text held back until the end), the characters decoded before it,
    and the text that can be emitted now.
    """

    token: int | None
    start: int
    text: str


class ActiveRequest:
    """A request from its submission to its end: its tokens, cancellation and counters for the
    caller, and its state on the inference thread.

    max_tokens : the request's own, or fewer where the context holds fewer.
    eos : ids that end an answer. closing : set when the model is being closed, which cancels.
    """

    def __init__(
        self,
        request: PromptRequest,
        tokenizer: TokenBytes,
        max_tokens: int,
        eos: Sequence[int],
        closing: threading.Event,
    ) -> None:
        self.request = request
        self.max_tokens = max_tokens
        self.counters = Counters()
        self.finish_reason: FinishReason = "length"
        self.recorder = None if request.logprobs is None else LogprobRecorder(request.logprobs)
        self.sampler = RequestSampler(request.sampling, request.grammar, self.recorder)
        self.ids: list[int] = []  # the prompt's, virtual ones among them, and the answer's so far
        self.keys: list[str] = []  # of the media whose virtual ids are among them
        self.cache: list[Any] | None = None  # while it runs alone or is paused; else its batch's
        self._eos = frozenset(eos)
        self.number = -1  # among ranks
        # Called instead of cancelling it here and now: among ranks, all must do that at one place.
        self.cancelling: Callable[[ActiveRequest], None] = ActiveRequest.cancel_now
        # Not an event: its lock may be held by the thread that collects an abandoned stream.
        self._closing, self._cancelled = closing, False
        self._failure: Exception | None = None
        self._detokenizer, self._stop = Detokenizer(tokenizer), StopStrings(request.stop)
        self._decoded = 0  # characters
        self._queue: queue.SimpleQueue[TokenText | BaseException | None] = queue.SimpleQueue()
        self._features = ExitStack()  # needed until the prompt is prefilled
        self._virtual_ids = ExitStack()  # not to be given to other media before the end
        self._since = 0.0
        self._ended = False

    def cancel(self) -> None:
        """Stops before the next token, prefill chunk or group of tiles; iteration then ends."""
        self.cancelling(self)

    def __iter__(self) -> Iterator[TokenText]:
        """Tokens as they come, an end-of-text token last. Raises what went wrong."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    # The rest is the inference thread's.

    def cancel_now(self) -> None:
        self._cancelled = True

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    @property
    def produced(self) -> int:
        """Tokens of the answer, those among them that were generated behind its end."""
        return len(self.ids) - self.counters.prompt_tokens

    @property
    def size(self) -> RequestSize:
        return self.request.size(self.max_tokens)

    @property
    def is_paused(self) -> bool:
        return self.cache is not None

    def check(self, *_: object) -> None:
        if self._cancelled or self._closing.is_set():
            if self.finish_reason != "stop":
                self.finish_reason = "cancelled"
            raise CancelledError("the request was cancelled")

    def hold(self, bank: FeatureBank, ids: list[int], keys: list[str]) -> None:
        """Its prompt's ids and media: keeps the features of these until the first token, and their
        ids until the end.
        """
        self.ids, self.keys = ids, keys
        self.counters.prompt_tokens = len(ids)
        self._features.enter_context(bank.in_use(keys))
        bank.hold(keys)
        self._virtual_ids.callback(bank.release, keys)

    def begin(self, cache: list[Any] | None) -> None:
        """Its prefill begins, into its own KV cache or in a batch."""
        self.cache = cache
        self._since = time.perf_counter()

    def accept(self, token: int) -> None:
        """A token has been generated: hands it on, with the text that it completes. What goes wrong
        with that ends it, as a stop string does: by cancelling it.
        """
        self.ids.append(token)
        if self.produced == 1:
            self._features.close()
        if self._failure is not None or self._stop.found is not None:
            return  # ranks go on until all know that it has ended
        try:
            self._hand_on(token)
        except Exception as error:  # in what makes text of it, or in its schema
            self._failure = error
            self.cancel()

    def _hand_on(self, token: int) -> None:
        now = time.perf_counter()
        self.counters.completion_tokens += 1
        if self.counters.completion_tokens == 1:
            self.counters.prefill_seconds, self._since = now - self._since, now
        else:
            self.counters.decode_seconds = now - self._since
        self.sampler.accept_token(token)
        start, text = self._decoded, ""
        if token in self._eos:
            self.finish_reason = "stop"
        else:
            text = self._detokenizer.add(token)
            self._decoded += len(text)
            text = self._stop.add(text)
            if self._stop.found is not None:
                self.finish_reason = "stop"
                self.cancel()
        self._queue.put(TokenText(token, start, text))
        if self.counters.completion_tokens == 1:
            # Else its reader waits for the interpreter lock, which building the next step holds.
            time.sleep(HANDOVER_SECONDS)

    def end(self, error: BaseException | None = None) -> None:
        """Frees what it holds, and says that nothing more comes, once, whatever happens."""
        if self._ended:
            return
        self._ended = True
        if error is None or isinstance(error, CancelledError):
            error = self._failure
        try:
            self.cache = None
            self._features.close()
            self._virtual_ids.close()
            self.sampler.end()
            self.counters.peak_memory_bytes = mx.get_peak_memory()
            if error is None and self._stop.found is None:
                text = self._stop.add(self._detokenizer.finish()) + self._stop.finish()
                if text:
                    self._queue.put(TokenText(None, self._decoded, text))
        finally:
            self._queue.put(None if error is None else as_package_error(error))


def request_size(inputs: Inputs, answer: int) -> RequestSize:
    """What memory depends on, of a prepared prompt and an answer of so many tokens."""
    media = (
        MediumSize(
            len(medium.tiles),
            medium.tokens,
            medium.packing if isinstance(medium.packing, Packing) else None,
            medium.kind == "video",
            medium.key,
        )
        for medium in inputs.media
    )
    return RequestSize(len(inputs.input_ids), answer, tuple(media))


def as_package_error(error: BaseException) -> BaseException:
    """An allocation that MLX could not make, as OutOfMemoryError; anything else as it is."""
    text = str(error)
    if isinstance(error, RuntimeError) and ("allocate" in text or "out of memory" in text.lower()):
        return OutOfMemoryError(
            f"the device ran out of memory ({text.splitlines()[0][:200]}); "
            "use a quantized model, fewer or smaller media, or close other programs"
        )
    return error
