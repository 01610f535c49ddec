"""Several requests at once on the inference thread: mlx-lm's continuous batching, with rows that
come in as memory allows and that end, fail and are cancelled each for itself.

A lone request does not come here: one sequence decodes faster by itself (:mod:`runner`). It comes
when it gets company, in the middle of its answer.
"""

from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_onevision.engine.request import Row
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.network import memory_budget as memory

if TYPE_CHECKING:
    from mlx_lm.generate import BatchGenerator


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
    are in the tower and in prefill at once than ``memory.prefill_batch`` says, so few media are
    held beyond what the bank keeps.
    """

    def __init__(self, runner: Runner, line: deque[Row]) -> None:
        self._runner = runner
        self._waiting = line
        self._active: dict[int, Row] = {}
        self._reading: set[int] = set()  # those of the active ones whose prompt is not read yet
        chunk = runner.model.budget.chunk
        self._together, self._step_size = memory.prefill_batch(chunk, len(line))

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
            completion_batch_size=memory.MAX_BATCH_SIZE,
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
        if len(self._reading) >= self._together or len(self._active) >= memory.MAX_BATCH_SIZE:
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
                try:
                    if failure is None and answer.prompt_cache and answer.all_tokens:
                        row.put_by(self._runner, answer.all_tokens, answer.prompt_cache)
                finally:  # the answer is there, whatever becomes of its cache
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
                left = generator.remove([uid], return_prompt_caches=uid not in self._reading)
                try:
                    for cache, ids in left.values():  # it may have ended at a stop text
                        row.put_by(self._runner, ids, cache)
                finally:
                    del self._active[uid]
                    self._reading.discard(uid)
                    row.end(cancelled)
        for row in self._waiting.copy():  # other threads add to it
            try:
                row.listener.check()
            except CancelledError as cancelled:
                self._waiting.remove(row)
                row.end(cancelled)
