# pyright: reportUnknownMemberType=false
"""Continuous batching: several requests at once on the inference thread, admitted as memory allows.
Each ends, fails and is cancelled by itself.

A lone request runs outside of a batch, where one sequence decodes faster (:mod:`runner`). A running
request is moved into the batch when another arrives.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx

from mlx_onevision.engine.decode import import_mlx_lm
from mlx_onevision.engine.kv_cache import first_positions
from mlx_onevision.engine.memory import wired
from mlx_onevision.engine.prefix_cache import LEAST_MATCH, common_prefix
from mlx_onevision.engine.request import ActiveRequest, Counters
from mlx_onevision.engine.rows import Rows
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.memory_sizes import RequestSize
from mlx_onevision.prompt.processor import Inputs


def serve(runner: Runner, waiting: deque[ActiveRequest]) -> None:
    """Answers everything in ``waiting``, and what is added to it meanwhile. Errors end requests; it
    raises where the thread cannot go on.
    """
    while waiting:
        active = waiting.popleft()
        try:
            if runner.memory.kv_bits is not None:  # mlx-lm cannot join such caches
                runner.run_alone(active)
            elif waiting or not runner.run_alone(active, lambda: bool(waiting)):
                waiting.appendleft(active)
                Batch(runner, waiting).run()
        except BaseException as error:  # nobody may be left waiting
            runner.raise_if_alone(error)
            active.end(error)
            while waiting:
                waiting.popleft().end(error)


class Batch:
    """Answers requests in the order of ``waiting``, to which any thread may add meanwhile.

    Requests are admitted while all together stay within ``runner.limit`` bytes; at least one
    request is always admitted, even beyond the limit. Up to ``memory.MAX_PREFILL_BATCH_SIZE``
    begin together, to hold few media.
    """

    def __init__(self, runner: Runner, waiting: deque[ActiveRequest]) -> None:
        self._runner = runner
        self._waiting = waiting
        self._rows = Rows(runner)
        self._newcomers: list[ActiveRequest] = []  # being encoded and prefilled
        self._beginning: Iterator[None] | None = None  # their prefill, between decode steps
        self._first: ActiveRequest | None = None  # whose size the steps were chosen for

    @property
    def requests(self) -> list[ActiveRequest]:
        """Those under way."""
        return [*self._rows.requests, *self._newcomers]

    def run(self) -> None:
        """Until every request has ended, or one is left that has not begun: that one runs alone. An
        error of no single request ends those under way with it; those that still wait go on.
        """
        mx.reset_peak_memory()
        while self._others_waiting():
            try:
                self._first = self._waiting[0]
                with wired(), self._runner.within_limit([self._first.size]):
                    while self.requests or self._others_waiting():
                        self._runner.progress.step()
                        if self._newcomers or not self.requests:
                            self._runner.sync()  # else decode steps say where there is something
                        self._drop_cancelled()
                        self._admit()
                        if not self.requests:
                            break  # none is left, or the next one needs smaller steps
                        self._step()
            except BaseException as error:  # nobody may be left waiting
                self._runner.raise_if_alone(error)
                if not self.requests and self._waiting:
                    self._newcomers = [self._waiting.popleft()]
                for active in self.requests:
                    active.end(error)
                self._newcomers = []
            finally:
                self._beginning, self._rows = None, Rows(self._runner)
                mx.clear_cache()

    def _others_waiting(self) -> bool:
        waiting = self._waiting.copy()  # other threads add to it
        return len(waiting) > 1 or any(active.is_paused for active in waiting)

    def _admit(self) -> None:
        if self._newcomers:
            return
        newcomers: list[ActiveRequest] = []
        for active in self._waiting.copy():  # other threads add to it
            if not self._has_room_for(active, newcomers):
                break
            newcomers.append(active)
        if newcomers:
            self._runner.make_room(self._sizes(newcomers))
            self._newcomers = newcomers
            self._beginning = self._begin()
            for _ in newcomers:
                self._waiting.popleft()

    def _has_room_for(self, active: ActiveRequest, newcomers: Sequence[ActiveRequest]) -> bool:
        others = [*self._rows.requests, *newcomers]
        if not others and active is self._first:
            return True
        beginning = sum(not other.is_paused for other in newcomers)
        if beginning >= memory.MAX_PREFILL_BATCH_SIZE or len(others) >= memory.MAX_BATCH_SIZE:
            return False
        runner, sizes = self._runner, self._sizes([*newcomers, active])
        return runner.memory.room(sizes, runner.model.budget, runner.limit) >= 0

    def _sizes(self, newcomers: Sequence[ActiveRequest]) -> list[RequestSize]:
        return [active.size for active in (*self._rows.requests, *newcomers)]

    def _step(self) -> None:
        """A group of tiles or a chunk of the newcomers, and a decode step of the others."""
        if self._beginning is not None:
            with self._runner.interruptible(self._check_newcomers):
                next(self._beginning, None)
        if not self._rows.requests:
            return
        eos = self._runner.checkpoint.generation_defaults.eos_token_ids
        ended: list[ActiveRequest] = []
        for active, token in self._rows.step():
            active.accept(token)
            last = active.produced >= active.max_tokens
            if active.is_cancelled:
                with suppress(CancelledError):
                    active.check()  # which may be the reason
            if last or token in eos or active.is_cancelled:
                ended.append(active)
        self._leave(ended)

    def _leave(self, ended: Sequence[ActiveRequest]) -> None:
        """Ends requests, and keeps their KV caches."""
        prefix = self._runner.prefix
        try:
            for active in ended:
                cache = self._rows.cache_of(active, len(active.ids))
                prefix.store_from_batch(active.ids, active.keys, cache)
        finally:  # the answers are there, whatever becomes of the caches
            for active in ended:
                active.end()
        self._rows.remove(ended)

    def _check_newcomers(self) -> None:
        """Raises CancelledError once all of them are cancelled."""
        self._runner.sync()
        for active in self._newcomers:
            with suppress(CancelledError):
                active.check()
                return
        raise CancelledError("the requests were cancelled")

    def _drop_cancelled(self) -> None:
        cancelled: list[ActiveRequest] = []
        for active in [*self.requests, *self._waiting.copy()]:  # other threads add to it
            try:
                active.check()
            except CancelledError as error:
                if active in self._newcomers:
                    self._newcomers.remove(active)
                elif active in self._waiting:
                    self._waiting.remove(active)
                else:
                    cancelled.append(active)
                    continue
                active.end(error)
        self._leave(cancelled)

    # How requests begin. At any pause some of them may be cancelled.

    def _begin(self) -> Iterator[None]:
        """Encodes and prefills the newcomers, and lets them join the others. Pauses after each
        group of tiles and each chunk.

        In the order of their ids those that begin alike are neighbours, and each goes on from the
        KV cache of the one before: what several begin with is read once.
        """
        runner, newcomers = self._runner, self._newcomers
        self._join([(active, active.cache) for active in newcomers if active.cache is not None])
        for active in newcomers.copy():
            with self._ending(active):
                active.hold(runner.model.bank, *runner.virtual_ids(active.request.inputs))
        yield from self._encode_together()
        ready: list[tuple[ActiveRequest, list[Any]]] = []
        before: tuple[list[int], list[Any]] = ([], [])
        ordered = sorted(newcomers, key=lambda active: active.ids)
        for active, following in zip(ordered, [*ordered[1:], None], strict=True):
            cache: list[Any] = []
            held = goal = 0
            with self._ending(active):
                active.begin(None)
                cache, held = self._source(active.ids, *before)
                active.counters.cached_tokens = held
                goal = self._goal(active.ids, held, following)
                for _ in runner.encode([self._unread(active, held)]):
                    yield
            if active not in newcomers:
                continue  # it failed, or was cancelled
            goes_on = 0 < held <= common_prefix(active.ids, before[0])
            before = ([], [])
            if goal > held and ready and not goes_on:
                # Join the finished requests now: the next prefill does not concern them.
                self._join(ready)
                ready = []
                yield
            with self._ending(active):
                for _ in runner.prefill(active.ids[:goal], cache):
                    yield
                    if active not in newcomers:
                        break
                before = (active.ids[: cache[0].offset], [*cache])
                ready.append((active, cache))
        before = ([], [])
        self._join(ready)

    def _encode_together(self) -> Iterator[None]:
        """Groups of tiles are filled from several requests. Errors are ignored here; `_begin`
        encodes each request again and reports the error to that request alone.
        """
        newcomers, count = self._newcomers, -1
        try:
            while count != len(newcomers):  # one was cancelled: again, for those that are left
                count = len(newcomers)
                prompts = [self._unread(active) for active in newcomers]
                for _ in self._runner.encode(prompts, import_mlx_lm):
                    yield
                    if count != len(newcomers):
                        break
        except Exception as error:
            self._runner.raise_if_alone(error)
        import_mlx_lm()

    def _unread(
        self, active: ActiveRequest, held: int | None = None
    ) -> tuple[Inputs, list[int], Counters]:
        """What :meth:`Runner.encode` takes; ``held`` : ids that a KV cache will hold."""
        ids = active.ids
        if held is None:
            held = max(self._runner.prefix.match(ids), self._rows.match(ids)[1])
        return active.request.inputs, ids[held:], active.counters

    def _source(self, ids: list[int], before: list[int], cache: list[Any]) -> tuple[list[Any], int]:
        """A KV cache to go on from, and how many of ``ids`` it holds: that of the request before, a
        kept one, or a copy of a running one.
        """
        last = len(ids) - 1
        alike, kept = min(common_prefix(before, ids), last), self._runner.prefix.match(ids)
        running, there = self._rows.match(ids)
        there = min(there, last)
        if max(alike, there, kept) < LEAST_MATCH or kept > max(alike, there):
            return self._runner.prefix.take(ids)
        if running is None or alike >= there:
            return first_positions(cache, alike), alike
        copied = self._rows.cache_of(running, there)
        mx.eval([layer.state[:2] for layer in copied])
        return copied, there

    def _goal(self, ids: list[int], held: int, following: ActiveRequest | None) -> int:
        """How many of ``ids`` are to be prefilled by themselves: all but the last where many are
        left, else what the following request begins with, too.
        """
        last = len(ids) - 1
        if last - held > memory.tail(self._runner.prefill_chunk):
            return last
        shared = 0 if following is None else min(common_prefix(ids, following.ids), last)
        return shared if shared - held >= LEAST_MATCH else held

    def _join(self, ready: Sequence[tuple[ActiveRequest, list[Any]]]) -> None:
        ready = [(active, cache) for active, cache in ready if active in self._newcomers]
        if ready:
            self._rows.join(ready)
        for active, _ in ready:
            self._newcomers.remove(active)
            active.cache = None

    @contextmanager
    def _ending(self, active: ActiveRequest) -> Generator[None]:
        """Ends the one request with what goes wrong."""
        try:
            yield
        except Exception as error:
            self._runner.raise_if_alone(error)
            if active in self._newcomers:
                self._newcomers.remove(active)
            active.end(error)
