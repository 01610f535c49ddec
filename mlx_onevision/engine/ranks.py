"""One model among the ranks of ``mlx.launch``: rank 0 leads, the others follow.

All ranks run the same code of the inference thread, and so meet in the same sums and gathers. What
that code asks of time or of other threads (which requests have come, which are cancelled, whether
the model is being closed) are *events*: posted on rank 0 by any thread, and applied on the
inference thread of every rank at the same place, in :meth:`Ranks.sync`. A decode step does without
a sum of its own for that: the one that hands out rank 0's tokens says whether there are events.

What goes wrong on one rank alone leaves the others in a sum that it will never join. So it ends the
process; MLX then fails that sum on its neighbours, which end as well.
"""

import atexit
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from itertools import starmap
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_onevision.distributed import Links, all_sum, gather_texts, prefix
from mlx_onevision.engine import parcel
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.jobs import Job
from mlx_onevision.engine.request import ActiveRequest, PromptRequest, as_package_error
from mlx_onevision.engine.runner import Runner
from mlx_onevision.engine.worker import Watchdog
from mlx_onevision.errors import CancelledError, DiedError, OneVisionError, RequestError, sentence
from mlx_onevision.sampling.sampler import Sampling

Task = ActiveRequest | Job

# Ranks without work meet so often; the first time after a while waits for it. They sleep between,
# for MLX's ring keeps a core busy while it waits.
LONGEST_PAUSE = 0.05
WATCH_SECONDS = 0.5  # between two looks at the connections to other ranks
# That a process has to say what happened, and to answer its clients, before it is ended.
GRACE_SECONDS = 3.0

STUCK = "a rank does not move any more"
LOST = "another rank has ended or cannot be reached any more"
RESTART = "so all ranks end; start them again"

SERVE, JOB, CANCEL, CLOSE = "serve", "job", "cancel", "close"

logger = logging.getLogger("mlx_onevision")


def lost(error: BaseException) -> DiedError | None:
    """What to raise where MLX's ring has lost another rank; None for any other error."""
    return DiedError(f"{LOST}, {RESTART}") if "peer was lost" in str(error) else None


def compare(group: mx.distributed.Group, settings: Mapping[str, str]) -> None:
    """RequestError, on every rank, where one of them has other settings than rank 0."""
    first, *others = map(json.loads, gather_texts(json.dumps(settings), group))
    for number, other in enumerate(others, 1):
        for name, ours in first.items():
            if other.get(name) != ours:
                raise RequestError(
                    f"rank {number} has {name} {other.get(name)}, and rank 0 has {ours}; "
                    "give every rank the same"
                )


class Ranks:
    """What a rank's inference thread runs, and on rank 0 the queue of its work.

    group : the ranks. closing : set on rank 0 when the model is to be closed.
        ``self.closing`` is set on every rank, when all know of it.
    """

    def __init__(self, group: mx.distributed.Group, closing: threading.Event) -> None:
        self.closing = threading.Event()
        self.ended: Future[None] = Future()
        self._group, self._leads, self._asked = group, group.rank() == 0, closing
        self._parent = os.getppid()
        self._numbers = itertools.count()
        self._posted: deque[tuple[str, list[Task]]] = deque()  # rank 0's, not applied yet
        self._order = threading.RLock()  # a stream may be collected within it, and is cancelled
        self._over: OneVisionError | None = None
        # The inference thread's.
        self._tasks: WeakValueDictionary[int, Task] = WeakValueDictionary()
        self._waiting: deque[ActiveRequest] = deque()
        self._jobs: deque[Callable[[Runner], None]] = deque()

    # Rank 0, from any thread.

    def submit(self, requests: Sequence[ActiveRequest]) -> None:
        """Starts requests, which run together."""
        for active in requests:
            active.cancelling = self._cancel
        self._post(SERVE, requests)

    def compute(self, job: Job) -> None:
        self._post(JOB, [job])

    def _cancel(self, task: Task) -> None:
        try:
            self._post(CANCEL, [task])
        except OneVisionError:
            pass  # it has ended with all the others

    def _post(self, kind: str, tasks: Sequence[Task]) -> None:
        with self._order:
            if self._over is not None:
                raise type(self._over)(str(self._over))  # each thread has its own
            if self._asked.is_set():
                raise OneVisionError("the model has been closed; load it again")
            for task in tasks if kind != CANCEL else ():
                task.number = next(self._numbers)
            self._posted.append((kind, list(tasks)))

    # Every rank, on its inference thread.

    def run(self, runner: Runner) -> None:
        """Answers what is posted, until the model is closed. DiedError where ranks were lost."""
        runner.ranks = self
        # They meet all the time, with or without work: one that hangs stops all.
        watched = Links(), Watchdog(runner.progress, lambda: True)
        threading.Thread(target=self._watch, args=watched, daemon=True).start()
        idle_since = time.monotonic()
        try:
            while self._jobs or not self.closing.is_set():
                runner.sync()
                if self._jobs:
                    self._jobs.popleft()(runner)
                    idle_since = time.monotonic()
                elif not self.closing.is_set():
                    time.sleep(min(LONGEST_PAUSE, (time.monotonic() - idle_since) / 10))
        except BaseException as error:
            raise self._lose(error) from error
        self._end(OneVisionError("the model has been closed; load it again"))
        self.ended.set_result(None)

    def sync(self) -> None:
        """Applies rank 0's events. All ranks must call it at the same place."""
        events = self._taken()
        data = parcel.pack([self._described(*event) for event in events]) if events else b""
        size = int(self._summed(np.array([len(data)], np.int32))[0])
        if not size:
            return
        words = np.zeros(-(-size // 4), np.uint32)  # a quarter of the values of a sum of bytes
        words.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        sent = self._summed(words).view(np.uint8)[:size]
        # One after another: a request may have come together with its cancellation.
        received = events if self._leads else starmap(self._received, parcel.unpack(sent.data))
        for event in received:
            self._apply(*event)

    def share(self, tokens: mx.array) -> mx.array:
        """Rank 0's tokens (n,) for every rank, and whether there are events: int32 (n + 1,)."""
        events = bool(self._posted) or self._asked.is_set() or os.getppid() != self._parent
        both = mx.concatenate([tokens.astype(mx.int32), mx.array([int(events)], mx.int32)])
        # Those of the others are multiplied by 0, and not left out: all ranks must compute the
        # step, which is full of sums over them.
        return all_sum(both * int(self._leads), self._group)

    def heed(self, events: int) -> None:
        """Given what came with the tokens: applies events where there are any."""
        if events:
            self.sync()

    def checking(self, job: Job) -> Callable[..., None]:
        """Raises CancelledError once the job is cancelled, or the model is being closed."""

        def check(*_: object) -> None:
            if self._leads and job.refused():
                self._cancel(job)
            self.sync()
            if job.is_cancelled or self.closing.is_set():
                raise CancelledError("the request was cancelled")

        return check

    def raise_if_alone(self, error: BaseException) -> None:
        """DiedError where what went wrong may have gone wrong on this rank alone."""
        if isinstance(error, DiedError) or not isinstance(error, OneVisionError):
            raise self._died(error) from error

    def _taken(self) -> list[tuple[str, list[Task]]]:
        if not self._leads:
            return []
        if os.getppid() != self._parent:
            raise DiedError("mlx.launch has ended, and so does what it started")
        with self._order:
            events: list[tuple[str, list[Task]]] = []
            while self._posted:
                events.append(self._posted.popleft())
            if self._asked.is_set() and not self.closing.is_set():
                events.append((CLOSE, []))
        return events

    def _summed(self, values: NDArray[Any]) -> NDArray[Any]:
        """Rank 0's values, which those of the others, all 0, are added to."""
        return np.array(all_sum(mx.array(values), self._group), values.dtype)

    def _apply(self, kind: str, tasks: list[Task]) -> None:
        if kind == CLOSE:
            self.closing.set()
        for task in tasks:
            if kind == CANCEL:
                task.cancel_now()
                continue
            self._tasks[task.number] = task
            if isinstance(task, ActiveRequest):
                self._waiting.append(task)
            else:
                if task.in_turn:  # what comes later waits behind it
                    self._waiting = deque()
                self._jobs.append(partial(task.run, check=self.checking(task)))
        if kind == SERVE:
            self._jobs.append(partial(serve, waiting=self._waiting))

    def _described(self, kind: str, tasks: list[Task]) -> tuple[str, list[list[Any]]]:
        """An event as it is sent to other ranks. They need no text, only ids, and take rank 0's."""
        sent: list[list[Any]] = []
        for task in tasks:
            sent.append([task.number])
            if kind == SERVE and isinstance(task, ActiveRequest):
                sent[-1] += [task.request.inputs, task.max_tokens]
            elif kind == JOB and isinstance(task, Job):
                sent[-1] += [task.name, task.arguments]
        return kind, sent

    def _received(self, kind: str, sent: list[list[Any]]) -> tuple[str, list[Task]]:
        tasks: list[Task] = []
        for number, *rest in sent:
            if kind == CANCEL:
                tasks += [task for task in [self._tasks.get(number)] if task is not None]
                continue
            if kind == SERVE:
                inputs, max_tokens = rest
                request = PromptRequest(inputs, Sampling(), max_tokens)
                task = ActiveRequest(request, NoText(), max_tokens, (), self.closing)
            else:
                task = Job(*rest)
            task.number = number
            tasks.append(task)
        return kind, tasks

    def _watch(self, links: Links, watchdog: Watchdog) -> None:
        """Ends the process where another rank has ended, or any hangs."""
        while not self.closing.wait(WATCH_SECONDS):
            hangs = watchdog.hangs()
            if hangs or links.lost():
                self._lose(DiedError(f"{STUCK if hangs else LOST}, {RESTART}"))
                return

    def _lose(self, error: BaseException) -> DiedError:
        """This rank cannot go on. Everybody who waits for it gets an error."""
        died = self._died(error)
        with suppress(InvalidStateError):  # for another thread has found it, too
            self.ended.set_exception(DiedError(str(died)))
            # The inference thread may wait for ever, and MLX for it.
            atexit.register(_exit_at_once)
            threading.Thread(target=_end_process, args=[str(died)], daemon=True).start()
        self._end(died)
        return died

    def _end(self, error: OneVisionError) -> None:
        """Nothing is taken any more, and what is left ends."""
        with self._order:
            self._over = error
            left = {task for _, tasks in self._posted for task in tasks}
            self._posted.clear()
        # Not ``values()``, as the inference thread may add to them meanwhile.
        for task in left | {reference() for reference in self._tasks.valuerefs()}:
            if task is None:
                continue
            try:
                task.end(type(error)(str(error)))
            except BaseException as other:  # the others' readers wait, too
                logger.debug("%s", other)

    def _died(self, error: BaseException) -> DiedError:
        if isinstance(error, DiedError):
            return error
        found = as_package_error(error)
        why = sentence(found) if isinstance(found, Exception) else type(found).__name__
        return lost(error) or DiedError(f"{why}, {RESTART}")


class NoText:
    """A tokenizer for ranks that need no text."""

    def token_bytes(self, token_id: int) -> bytes:
        return b""


def _end_process(why: str) -> NoReturn:
    """A process that lives on would leave the others waiting."""
    time.sleep(GRACE_SECONDS)
    sys.stderr.write(f"error: {prefix()}{why}\n")
    _exit_at_once()


def _exit_at_once() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
