"""A thread that owns an object: builds it, runs jobs on it, and drops it."""

import gc
import logging
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, TypeAlias, TypeVar

import mlx.core as mx

from mlx_onevision.errors import DiedError, OneVisionError, place_of

Owned = TypeVar("Owned")
Result = TypeVar("Result")

# At interpreter exit, how long a job that does not notice its cancellation is waited for.
PATIENCE_SECONDS = 10.0

# Without any step, while there is work: a group of layers of the largest model takes half a minute
# on the slowest Mac that holds it, and kernels that are compiled first as long again.
HANG_SECONDS = 180.0
LONGEST_LOOK = 2.0  # seconds between two looks that count

CLOSED = "the model has been closed; load it again"

_clearing = threading.Lock()

_Job: TypeAlias = tuple[Callable[[Owned], None], Callable[[DiedError], None]]

logger = logging.getLogger("mlx_onevision")


class Progress:
    """How far the thread has come.

    steps : layer groups, groups of tiles, chunks and tokens so far; written by one thread, read by
        any.
    """

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


class Worker(Generic[Owned]):
    """Builds an object with ``build`` on a new thread, raising what that raises, and keeps it until
    :meth:`close`. Every method may be called from any thread.

    progress : counts the steps of long jobs, as the object makes them.
    """

    def __init__(self, build: Callable[[], Owned], progress: Progress | None = None) -> None:
        self._jobs: _Jobs[Owned] = _Jobs(progress or Progress())
        self._watchdog = Watchdog(self._jobs.progress, lambda: self._jobs.under_way)
        self.closing = threading.Event()  # a long job should end early once it is set
        built: Future[None] = Future()
        # The thread does not refer to the worker, so that a forgotten one is collected and closed.
        self._thread = threading.Thread(
            target=_work, args=(build, built, self._jobs), name="mlx-onevision", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._jobs, self.closing)
        try:
            built.result()
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """False once a job has killed the thread."""
        return self._jobs.killer is None

    @property
    def hangs(self) -> bool:
        """Whether a job has not moved for :data:`HANG_SECONDS`, as far as anybody has looked."""
        return self._watchdog.hangs()

    def post(
        self, job: Callable[[Owned], None], lost: Callable[[DiedError], None] = lambda _: None
    ) -> None:
        """Queues ``job``, which must not raise: that would kill the thread.

        lost : called where the thread dies before the job's end.

        Raises:
            OneVisionError: when the worker has been closed.
            DiedError: when its thread has died.
        """
        if self.closing.is_set():
            raise OneVisionError(CLOSED)
        self._jobs.put((job, lost))

    def call(self, function: Callable[[Owned], Result]) -> Result:
        """Runs ``function`` after the queued jobs, and returns or raises what it does."""
        return self.submit(function).result()

    def submit(self, function: Callable[[Owned], Result]) -> "Future[Result]":
        """As :meth:`call`, but returns at once; not run if cancelled before it begins."""
        future: Future[Result] = Future()

        def run(owned: Owned) -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(owned))
                except BaseException as error:
                    future.set_exception(error)

        def lost(error: DiedError) -> None:
            if not future.done():
                future.set_exception(error)

        self.post(run, lost)
        return future

    def close(self, patience: float = PATIENCE_SECONDS) -> None:
        """Ends the thread after the job under way; queued jobs still run, and see ``closing``.

        patience : seconds that it is waited for.
        """
        if self._finalizer.detach():
            _stop(self._thread, self._jobs, self.closing, patience)


class Watchdog:
    """Whether somebody who counts their steps still moves while there is work.

    Only time in which it is looked at counts, a look every second or so: a process that was stopped
    for a while, or a machine that slept, does not hang.
    """

    def __init__(self, progress: Progress, is_working: Callable[[], bool]) -> None:
        self._progress, self._is_working = progress, is_working
        self._lock = threading.Lock()
        self._steps, self._looked, self._still = -1, 0.0, 0.0

    def hangs(self) -> bool:
        with self._lock:
            now, steps = time.monotonic(), self._progress.steps
            if steps != self._steps or not self._is_working():
                self._steps, self._still = steps, 0.0
            else:
                self._still += min(now - self._looked, LONGEST_LOOK)
            self._looked = now
            return self._still > HANG_SECONDS


class _Jobs(Generic[Owned]):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.under_way = False
        self._waiting: queue.SimpleQueue[_Job[Owned] | None] = queue.SimpleQueue()
        self._between = threading.Lock()  # a job is queued or refused, and never left lying
        self._over = False  # the thread has ended as it should
        self.killer: str | None = None  # a sentence on what killed the thread

    def put(self, job: _Job[Owned]) -> None:
        with self._between:
            if self.killer is not None:
                raise DiedError(self.killer)
            if self._over:
                raise OneVisionError(CLOSED)
            self._waiting.put(job)

    def stop(self) -> None:
        """Ends the thread behind the jobs that are queued. Without the lock, which the thread that
        collects a worker as garbage may hold.
        """
        self._waiting.put(None)

    def next(self) -> _Job[Owned] | None:
        """The next job, waited for; None once it is to end, and from then on none is queued."""
        while (job := self._waiting.get()) is None:
            with self._between:
                if self._waiting.empty():
                    self._over = True
                    return None
            self._waiting.put(None)  # what was queued while it was closed goes first
        return job

    def lose(self, error: BaseException, under_way: _Job[Owned] | None) -> None:
        """The thread dies of ``error``, which everybody who waits for it gets."""
        lost = [] if under_way is None else [under_way]
        with self._between:
            if isinstance(error, DiedError):
                self.killer = str(error)
            else:
                kind = type(error).__name__
                self.killer = f"what runs the model has died ({kind}); load it again"
            while not self._waiting.empty():
                job = self._waiting.get()
                lost += [] if job is None else [job]
        for _, end in lost:
            with suppress(BaseException):
                end(DiedError(self.killer))


def _work(build: Callable[[], Owned], built: Future[None], jobs: _Jobs[Owned]) -> None:
    try:
        _run(build, built, jobs)
    finally:
        _clear_streams()


def _clear_streams() -> None:
    """Here and now: a thread that ends with streams of its own aborts the process at its exit.

    Deadlock: this thread holds MLX's lock and needs the GIL; a thread that garbage-collects a
    compiled function holds the GIL and needs MLX's lock. So nothing is collected meanwhile.
    """
    mx.clear_cache()
    with _clearing:
        collects = gc.isenabled()
        gc.disable()
        try:
            mx.clear_streams()
        finally:
            if collects:
                gc.enable()


def _run(build: Callable[[], Owned], built: Future[None], jobs: _Jobs[Owned]) -> None:
    try:
        owned = build()
    except BaseException as error:
        built.set_exception(error)
        return
    built.set_result(None)
    del build, built
    job: _Job[Owned] | None = None
    try:
        while (job := jobs.next()) is not None:
            jobs.progress.step()
            jobs.under_way = True
            job[0](owned)
            jobs.under_way = False
            job = None
    except BaseException as error:
        if not isinstance(error, DiedError):
            name, place = type(error).__name__, place_of(error)
            logger.critical("the model's thread has died: %s at %s", name, place)
            # As text: a log that kept the error would keep the arrays that its frames hold. Only
            # for who asks for it: the error's words may hold a prompt or a path.
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("%s", "".join(traceback.format_exception(error)))
        jobs.lose(error, job)
        # Those who get the error would else hold the model, and free it at any time.
        traceback.clear_frames(error.__traceback__)


def _stop(
    thread: threading.Thread,
    jobs: _Jobs[Owned],
    closing: threading.Event,
    patience: float = PATIENCE_SECONDS,
) -> None:
    closing.set()
    jobs.stop()
    if thread is not threading.current_thread():
        thread.join(timeout=patience)
