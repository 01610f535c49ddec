"""Several requests at once on the inference thread: mlx-lm's continuous batching, with rows that
come in as memory allows and that end, fail and are cancelled each for itself.

A lone request does not come here: one sequence decodes faster by itself (:mod:`runner`), and has a
prefix cache. It comes when it gets company, in the middle of its answer.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from mlx_onevision import memory
from mlx_onevision.choosing import Choosing
from mlx_onevision.errors import CancelledError
from mlx_onevision.grammar import Grammar
from mlx_onevision.likelihoods import Watch
from mlx_onevision.processor import Inputs
from mlx_onevision.runner import Counters, Runner, Unfinished
from mlx_onevision.sampling import Sampling

if TYPE_CHECKING:
    from mlx_lm.generate import BatchGenerator


@dataclass(frozen=True, eq=False)
class Request:
    """What to answer, and how.

    ends_at : given each token as it is generated; True ends the answer with that one.
    grammar, watch : see :class:`~mlx_onevision.choosing.Choosing`.
    """

    inputs: Inputs
    sampling: Sampling
    max_tokens: int
    ends_at: Callable[[int], bool] = lambda _: False
    grammar: Grammar | None = None
    watch: Watch | None = None


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
        self._media = ExitStack()
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
        return self._unfinished is None

    @property
    def is_unfinished(self) -> bool:
        """Whether it was begun alone, and is to go on in a batch."""
        return self._unfinished is not None

    def join(self, runner: Runner, generator: "BatchGenerator") -> tuple[int, bool]:
        """Its number in ``generator``, and whether its prompt is still to be read."""
        text = runner.model.config.text_config
        placeholder = runner.model.config.image_token_index
        left, self._unfinished = self._unfinished, None
        ids = self._begin(runner) if left is None else left.ids
        produced = 0 if left is None else left.produced
        (uid,) = generator.insert(
            [ids if left is None else ids[-1:]],
            max_tokens=[self.request.max_tokens - produced],
            caches=None if left is None else [left.cache],
            all_tokens=None if left is None else [ids[:-1]],
            samplers=[self._choosing.sampler(produced)],
            logits_processors=[self._choosing.logits_processors(text.vocab_size, placeholder)],
        )
        return uid, left is None

    def _begin(self, runner: Runner) -> list[int]:
        """Its prompt with virtual ids; their rows are in the bank and stay there until :meth:`read`
        or :meth:`end`.
        """
        ids, keys = runner.virtual_ids(self.request.inputs)
        self._media.enter_context(runner.model.bank.in_use(keys))
        self.counters.prompt_tokens = len(ids)
        runner.fill_bank(self.request.inputs, ids, 0, self.counters, self.listener.check)
        self._since = time.perf_counter()
        return ids

    def read(self) -> None:
        """The prompt has been read, so its media are not needed any more."""
        self._media.close()

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
            self._choosing.end()
            self.counters.peak_memory = mx.get_peak_memory()
        finally:
            self.listener.put(None if isinstance(error, CancelledError) else error)


def serve(runner: Runner, line: deque[Row]) -> None:
    """Answers everything in ``line``, and what comes to it meanwhile. Must not raise."""
    while line:
        row = line.popleft()
        try:
            if line or not row.run_alone(runner, lambda: bool(line)):
                line.appendleft(row)
                Batch(runner, line).run()
        except BaseException as error:  # nobody may be left waiting
            row.end(error)
            while line:
                line.popleft().end(error)


class Batch:
    """Answers the rows of ``line``, those first in line first. More may be put there meanwhile,
    from any thread.

    Keys and values of a batch are padded to the longest row, so rows are let in while their number
    times the longest of them stays within ``runner.batch_positions``; one is always let in. No more
    are in the tower and in prefill at once than ``memory.prefill_rows`` says, so that few media are
    held beyond what the bank keeps.
    """

    def __init__(self, runner: Runner, line: deque[Row]) -> None:
        self._runner = runner
        self._waiting = line
        self._active: dict[int, Row] = {}
        self._reading: set[int] = set()  # those of the active ones whose prompt is not read yet
        chunk = runner.model.budget.chunk
        self._together, self._step_size = memory.prefill_rows(chunk, len(line))

    def run(self) -> None:
        """Until every row has ended, or one is left that has not begun: that one is for
        :meth:`Row.run_alone`. An error that cannot be traced to a row ends those under way with it;
        those that still wait go on.
        """
        mx.reset_peak_memory()
        while self._is_company():
            generator = None
            try:
                generator = self._generator()
                while self._active or self._is_company():
                    self._drop_cancelled(generator)
                    self._admit(generator)
                    if self._active:
                        self._step(generator)
            except BaseException as error:  # nobody may be left waiting
                failed = list(self._active.values())
                while generator is None and self._waiting:
                    failed.append(self._waiting.popleft())
                for row in failed:
                    row.end(error)
                self._active.clear()
                self._reading.clear()
            finally:
                if generator is not None:
                    generator.close()
                del generator  # and with it the caches
                mx.clear_cache()

    def _is_company(self) -> bool:
        waiting = self._waiting.copy()  # other threads add to it
        return len(waiting) > 1 or any(row.is_unfinished for row in waiting)

    def _generator(self) -> "BatchGenerator":
        from mlx_lm.generate import BatchGenerator

        eos = self._runner.checkpoint.generation_defaults.eos_token_ids
        return BatchGenerator(
            self._runner.model,
            stop_tokens=[[token] for token in eos],
            completion_batch_size=memory.MOST_ROWS,
            prefill_batch_size=self._together,
            prefill_step_size=self._step_size,
        )

    def _admit(self, generator: "BatchGenerator") -> None:
        while self._waiting and self._has_room_for(self._waiting[0]):
            row = self._waiting.popleft()
            try:
                row.listener.check()
                uid, reading = row.join(self._runner, generator)
            except Exception as error:  # a row that cannot be encoded, or is not wanted any more
                row.end(error)
                continue
            self._active[uid] = row
            if reading:
                self._reading.add(uid)

    def _has_room_for(self, row: Row) -> bool:
        if not self._active:
            return True
        if len(self._reading) >= self._together or len(self._active) >= memory.MOST_ROWS:
            return False
        longest = max(other.longest for other in (row, *self._active.values()))
        return (len(self._active) + 1) * longest <= self._runner.batch_positions

    def _step(self, generator: "BatchGenerator") -> None:
        """A chunk of the prompts that are being read, and a token of each row whose prompt is."""
        # Only then are all single ids sampled ones; see OneVision.decoding.
        decoding = nullcontext() if self._reading else self._runner.model.decoding()
        with decoding, self._runner.model.interruptible(self._check_all):
            prompts, answers = generator.next()
        for prompt in prompts:
            if prompt.end_of_prompt:
                self._reading.discard(prompt.uid)
                self._active[prompt.uid].read()
        for answer in answers:
            row, failure = self._active[answer.uid], None
            try:
                row.add(answer.token)
            except Exception as error:  # in what makes text of it, or in its schema: its own
                failure = error
                generator.remove([answer.uid])
            if failure is not None or answer.finish_reason is not None:
                del self._active[answer.uid]
                row.end(failure)

    def _check_all(self) -> None:
        """Raises CancelledError in the midst of a step that nobody wants any more."""
        for row in self._active.values():
            try:
                row.listener.check()
            except CancelledError:
                continue
            return
        raise CancelledError("the requests were cancelled")

    def _drop_cancelled(self, generator: "BatchGenerator") -> None:
        for uid, row in list(self._active.items()):
            try:
                row.listener.check()
            except CancelledError as cancelled:
                generator.remove([uid])
                del self._active[uid]
                self._reading.discard(uid)
                row.end(cancelled)
        for row in self._waiting.copy():  # other threads add to it
            try:
                row.listener.check()
            except CancelledError as cancelled:
                self._waiting.remove(row)
                row.end(cancelled)
