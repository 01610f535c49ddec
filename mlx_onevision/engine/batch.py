"""Several requests at once on the inference thread: mlx-lm's continuous batching. Requests are
admitted as memory allows; each ends, fails and is cancelled by itself.

A lone request runs outside of a batch, where one sequence decodes faster (:mod:`runner`). A running
request is moved into the batch when another arrives.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_onevision.engine.request import ActiveRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.network import memory_budget as memory

if TYPE_CHECKING:
    from mlx_lm.generate import BatchGenerator


def serve(runner: Runner, waiting: deque[ActiveRequest]) -> None:
    """Answers everything in ``waiting``, and what comes to it meanwhile. Must not raise."""
    while waiting:
        active = waiting.popleft()
        try:
            if runner.memory.kv_bits is not None:  # mlx-lm's batches cannot take such caches
                runner.run_alone(active)
            elif waiting or not runner.run_alone(active, lambda: bool(waiting)):
                waiting.appendleft(active)
                Batch(runner, waiting).run()
        except BaseException as error:  # nobody may be left waiting
            active.end(error)
            while waiting:
                waiting.popleft().end(error)


class Batch:
    """Answers requests in the order of ``waiting``, to which any thread may add meanwhile.

    Requests are admitted while all together stay within ``runner.limit``; one always is.
    ``memory.prefill_batch`` of them are encoded and prefilled at once, to hold few media.
    """

    def __init__(self, runner: Runner, waiting: deque[ActiveRequest]) -> None:
        self._runner = runner
        self._waiting = waiting
        self._active: dict[int, ActiveRequest] = {}
        self._prefilling: set[int] = set()  # those of the active ones
        self._together = 1  # are encoded and prefilled at once, at most
        self._first: ActiveRequest | None = None  # for which the steps have been chosen

    def run(self) -> None:
        """Until every request has ended, or one is left that has not begun: that one runs alone. An
        error of no single request ends those under way with it; those that still wait go on.
        """
        mx.reset_peak_memory()
        while self._others_waiting():
            generator = None
            try:
                self._first = self._waiting[0]
                with self._runner.within_limit([self._first.size]):
                    generator = self._generator()
                    while self._active or self._others_waiting():
                        self._drop_cancelled(generator)
                        self._admit(generator)
                        if not self._active:
                            break  # none is left, or the next one needs smaller steps
                        self._step(generator)
            except BaseException as error:  # nobody may be left waiting
                failed = list(self._active.values())
                while generator is None and self._waiting:
                    failed.append(self._waiting.popleft())
                for active in failed:
                    active.end(error)
                self._active.clear()
                self._prefilling.clear()
            finally:
                if generator is not None:
                    generator.close()
                del generator  # and with it the caches
                mx.clear_cache()

    def _others_waiting(self) -> bool:
        waiting = self._waiting.copy()  # other threads add to it
        return len(waiting) > 1 or any(active.is_paused for active in waiting)

    def _generator(self) -> "BatchGenerator":
        from mlx_lm.generate import BatchGenerator

        chunk = self._runner.model.budget.chunk
        self._together, step_size = memory.prefill_batch(chunk, len(self._waiting))
        eos = self._runner.checkpoint.generation_defaults.eos_token_ids
        return BatchGenerator(
            self._runner.model,
            stop_tokens=[[token] for token in eos],
            completion_batch_size=memory.MAX_BATCH_SIZE,
            prefill_batch_size=self._together,
            prefill_step_size=step_size,
        )

    def _admit(self, generator: "BatchGenerator") -> None:
        newcomers: list[ActiveRequest] = []
        for active in self._waiting.copy():  # other threads add to it
            if not self._has_room_for(active, newcomers):
                break
            newcomers.append(active)
        begun = [active for active in newcomers if not active.is_paused]
        if newcomers:
            self._runner.make_room(self._sizes(newcomers))
        with self._runner.encoded_together(begun) if len(begun) > 1 else nullcontext():
            for active in newcomers:
                self._waiting.popleft()
                try:
                    active.check()
                    uid, prefilling = self._runner.insert(active, generator)
                except Exception as error:  # it cannot be encoded, or was cancelled
                    active.end(error)
                    continue
                self._active[uid] = active
                if prefilling:
                    self._prefilling.add(uid)

    def _has_room_for(self, active: ActiveRequest, newcomers: Sequence[ActiveRequest]) -> bool:
        others = [*self._active.values(), *newcomers]
        if not others and active is self._first:
            return True
        prefilling = len(self._prefilling) + sum(not other.is_paused for other in newcomers)
        if prefilling >= self._together or len(others) >= memory.MAX_BATCH_SIZE:
            return False
        runner, sizes = self._runner, self._sizes([*newcomers, active])
        return runner.memory.batch(sizes, runner.model.budget).total <= runner.limit

    def _sizes(self, newcomers: Sequence[ActiveRequest]) -> list[memory.RequestSize]:
        return [active.size for active in (*self._active.values(), *newcomers)]

    def _step(self, generator: "BatchGenerator") -> None:
        """A chunk of the prompts that are being prefilled, and a decode step of the others."""
        prefix = self._runner.prefix
        # Only then are all single ids sampled ones; see OneVision.decoding.
        decoding = nullcontext() if self._prefilling else self._runner.model.decoding()
        with decoding, self._runner.model.interruptible(self._check_all):
            prompts, answers = generator.next()
        self._prefilling -= {prompt.uid for prompt in prompts if prompt.end_of_prompt}
        for answer in answers:
            active, failure = self._active[answer.uid], None
            try:
                active.accept(answer.token)
            except Exception as error:  # in what makes text of it, or in its schema
                failure = error
                generator.remove([answer.uid])
            if failure is not None or answer.finish_reason is not None:
                try:
                    if failure is None and answer.prompt_cache and answer.all_tokens:
                        prefix.store_from_batch(answer.all_tokens, active.keys, answer.prompt_cache)
                finally:  # the answer is there, whatever becomes of its cache
                    del self._active[answer.uid]
                    active.end(failure)

    def _check_all(self) -> None:
        """Raises CancelledError once all are cancelled."""
        for active in self._active.values():
            with suppress(CancelledError):
                active.check()
                return
        raise CancelledError("the requests were cancelled")

    def _drop_cancelled(self, generator: "BatchGenerator") -> None:
        for uid, active in list(self._active.items()):
            try:
                active.check()
            except CancelledError as cancelled:
                left = generator.remove([uid], return_prompt_caches=uid not in self._prefilling)
                try:
                    for cache, ids in left.values():  # it may have ended at a stop string
                        self._runner.prefix.store_from_batch(ids, active.keys, cache)
                finally:
                    del self._active[uid]
                    self._prefilling.discard(uid)
                    active.end(cancelled)
        for active in self._waiting.copy():  # other threads add to it
            try:
                active.check()
            except CancelledError as cancelled:
                self._waiting.remove(active)
                active.end(cancelled)
