"""One request on its way through the inference thread: alone, or as a row of a batch, or first the
one and then the other.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from mlx_onevision.engine.runner import Counters, Runner, Unfinished
from mlx_onevision.errors import CancelledError
from mlx_onevision.prompt.processor import Inputs
from mlx_onevision.sampling.grammar import Grammar
from mlx_onevision.sampling.logprobs import LogprobRecorder
from mlx_onevision.sampling.sampler import Choosing, Sampling

if TYPE_CHECKING:
    from mlx_lm.generate import BatchGenerator


@dataclass(frozen=True, eq=False)
class Request:
    """What to answer, and how.

    ends_at : given each token as it is generated; True ends the answer with that one.
    grammar, watch : see :class:`~mlx_onevision.sampling.sampler.Choosing`.
    """

    inputs: Inputs
    sampling: Sampling
    max_tokens: int
    ends_at: Callable[[int], bool] = lambda _: False
    grammar: Grammar | None = None
    watch: LogprobRecorder | None = None


class Listener(Protocol):
    """Who waits for a row's tokens."""

    @property
    def counters(self) -> Counters: ...

    def check(self, *_: object) -> None:
        """Raises CancelledError once the row is not wanted any more."""

    def put(self, item: int | BaseException | None) -> None:
        """A token; at the end None, or what went wrong."""


class Row:
    """One request of a batch, from the queue to its end."""

    def __init__(self, request: Request, listener: Listener) -> None:
        self.request = request
        self.listener = listener
        self.counters = listener.counters
        self.longest = len(request.inputs.input_ids) + request.max_tokens
        """Positions that its keys and values can come to."""
        self._choosing = Choosing(request.sampling, request.grammar, request.watch)
        self._keys: list[str] = []
        self._media = ExitStack()  # whose rows are needed
        self._holding = ExitStack()  # what keeps the virtual ids from being given to others
        self._since = 0.0
        self._ended = False
        self._unfinished: Unfinished | None = None

    def run_alone(self, runner: Runner, company: Callable[[], bool]) -> bool:
        """Answers it by itself; False where company came, with whom it is to go on."""
        request = self.request
        try:
            self.listener.check()
            self._unfinished = runner.generate(
                request.inputs,
                self._choosing,
                request.max_tokens,
                self.counters,
                self._deliver,
                self.listener.check,
                company,
            )
        except BaseException as error:
            self.end(error)
            return True
        self._since = time.perf_counter() - self.counters.decode_seconds
        if self._unfinished is None:
            self.end()
            return True
        self._let_go_at_end(runner, self._unfinished.keys)
        return False

    @property
    def is_unfinished(self) -> bool:
        """Whether it was begun alone, and is to go on in a batch."""
        return self._unfinished is not None

    def join(self, runner: Runner, generator: "BatchGenerator") -> tuple[int, bool]:
        """Its number in ``generator``, and whether its prompt is still to be read."""
        text = runner.model.config.text_config
        placeholder = runner.model.config.image_token_index
        left, self._unfinished = self._unfinished, None
        ids, cache, held, produced = (
            (*self._begin(runner), 0)
            if left is None
            else (left.ids, left.cache, len(left.ids) - 1, left.produced)
        )
        (uid,) = generator.insert(
            [ids[held:]],
            max_tokens=[self.request.max_tokens - produced],
            caches=[cache],
            all_tokens=[ids[:held]],
            samplers=[self._choosing.sampler(produced)],
            logits_processors=[self._choosing.logits_processors(text.vocab_size, placeholder)],
        )
        return uid, left is None

    def _begin(self, runner: Runner) -> tuple[list[int], list[Any], int]:
        """Its prompt with virtual ids, whose rows are in the bank and stay there until :meth:`read`
        or :meth:`end`; a cache, and how many of the ids that holds already.
        """
        ids, keys = runner.virtual_ids(self.request.inputs)
        self._media.enter_context(runner.model.bank.in_use(keys))
        runner.model.bank.hold(keys)
        self._let_go_at_end(runner, keys)
        self.counters.prompt_tokens = len(ids)
        matched = runner.prefix.match(ids)
        runner.fill_bank(self.request.inputs, ids, matched, self.counters, self.listener.check)
        cache, self.counters.cached_tokens = runner.prefix.take(ids)
        self._since = time.perf_counter()
        return ids, cache, self.counters.cached_tokens

    def _let_go_at_end(self, runner: Runner, keys: list[str]) -> None:
        """The virtual ids of ``keys``, which are held for it."""
        self._keys = keys
        self._holding.callback(runner.model.bank.release, keys)

    def read(self) -> None:
        """The prompt has been read, so its media are not needed any more."""
        self._media.close()

    def put_by(self, runner: Runner, ids: list[int], cache: list[Any]) -> None:
        """Keeps ``cache``, which holds ``ids``, for the next turn of this conversation."""
        runner.prefix.put_by(ids, self._keys, cache)

    def add(self, token: int) -> None:
        self.counters.completion_tokens += 1
        now = time.perf_counter()
        if self.counters.completion_tokens == 1:
            self.counters.prefill_seconds, self._since = now - self._since, now
        else:
            self.counters.decode_seconds = now - self._since
        self._deliver(token)

    def _deliver(self, token: int) -> None:
        self._choosing.chosen(token)
        self.listener.put(token)

    def end(self, error: BaseException | None = None) -> None:
        """Tells whoever waits that nothing more comes, once, whatever happens on the way."""
        if self._ended:
            return
        self._ended = True
        try:
            self._media.close()
            self._holding.close()
            self._choosing.end()
            self.counters.peak_memory = mx.get_peak_memory()
        finally:
            self.listener.put(None if isinstance(error, CancelledError) else error)
