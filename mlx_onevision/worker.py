"""The one thread that owns a model's arrays.

MLX arrays belong to the thread that made them. So a worker builds an object on a thread of its own,
runs every job on it there, one after another, and drops it there.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import mlx.core as mx

from mlx_onevision.errors import OneVisionError

Owned = TypeVar("Owned")
Result = TypeVar("Result")

# At interpreter exit, how long a job that does not notice its cancellation is waited for.
PATIENCE_SECONDS = 10.0


class Worker(Generic[Owned]):
    """Builds an object with ``build`` on a new thread and keeps it until :meth:`close`.

    Raises what ``build`` raises. Every method may be called from any thread.
    """

    def __init__(self, build: Callable[[], Owned]) -> None:
        self._jobs: queue.SimpleQueue[Callable[[Owned], None] | None] = queue.SimpleQueue()
        self.closing = threading.Event()
        """Set when the worker is told to stop; a long job should end early then."""
        built: Future[None] = Future()
        # The thread knows nothing of the worker, so that a forgotten worker is collected and
        # closed.
        self._thread = threading.Thread(
            target=_work,
            args=(build, built, self._jobs),
            name="mlx-onevision",
            daemon=True,
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._thread, self._jobs, self.closing)
        try:
            built.result()
        except BaseException:
            self.close()
            raise

    def post(self, job: Callable[[Owned], None]) -> None:
        """Queues ``job``, which must not raise.

        Raises:
            OneVisionError: when the worker has been closed.
        """
        if self.closing.is_set():
            raise OneVisionError("the model has been closed; load it again")
        self._jobs.put(job)

    def call(self, function: Callable[[Owned], Result]) -> Result:
        """Runs ``function`` after the jobs that are queued, and returns or raises what it does."""
        return self.submit(function).result()

    def submit(self, function: Callable[[Owned], Result]) -> "Future[Result]":
        """As :meth:`call`, but returns at once; the future has the result or the error."""
        future: Future[Result] = Future()
        self.post(lambda owned: _resolve(future, function, owned))
        return future

    def close(self) -> None:
        """Ends the thread after the job under way. Jobs still queued are run, to see
        ``closing``.
        """
        self._finalizer()


def _work(
    build: Callable[[], Owned],
    built: Future[None],
    jobs: "queue.SimpleQueue[Callable[[Owned], None] | None]",
) -> None:
    try:
        _run(build, built, jobs)
    finally:
        # Here and now: a thread that ends with streams of its own aborts the process at its exit.
        mx.clear_cache()
        mx.clear_streams()


def _run(
    build: Callable[[], Owned],
    built: Future[None],
    jobs: "queue.SimpleQueue[Callable[[Owned], None] | None]",
) -> None:
    try:
        owned = build()
    except BaseException as error:
        built.set_exception(error)
        return
    built.set_result(None)
    del build, built
    while (job := jobs.get()) is not None:
        job(owned)
        del job


def _stop(
    thread: threading.Thread,
    jobs: "queue.SimpleQueue[Callable[[Owned], None] | None]",
    closing: threading.Event,
) -> None:
    closing.set()
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(timeout=PATIENCE_SECONDS)


def _resolve(future: "Future[Result]", function: Callable[[Owned], Result], owned: Owned) -> None:
    try:
        future.set_result(function(owned))
    except BaseException as error:
        future.set_exception(error)
