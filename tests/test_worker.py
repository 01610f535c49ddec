"""One thread builds, runs and drops an object; everybody else waits for answers."""

import gc
import threading
import weakref

import pytest

from mlx_onevision.errors import OneVisionError
from mlx_onevision.worker import Worker


class Thing:
    def __init__(self) -> None:
        self.thread = threading.current_thread()


def test_everything_happens_on_one_thread() -> None:
    worker = Worker(Thing)
    home = worker.call(lambda thing: thing.thread)
    assert home is not threading.current_thread()
    seen: list[threading.Thread] = []
    callers = [
        threading.Thread(
            target=lambda: seen.append(worker.call(lambda _: threading.current_thread()))
        )
        for _ in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert seen == [home] * 8
    worker.close()


def test_failures_reach_the_caller_and_the_worker_goes_on() -> None:
    worker = Worker(Thing)
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda _: 1 / 0)
    assert worker.call(lambda _: 1) == 1
    worker.close()


def test_a_failed_build_is_raised_and_leaves_no_thread() -> None:
    before = threading.active_count()

    def build() -> None:
        raise OneVisionError("no such thing")

    with pytest.raises(OneVisionError, match="no such thing"):
        Worker(build)
    assert threading.active_count() == before


def test_closing_drops_the_object_and_refuses_more() -> None:
    worker = Worker(Thing)
    gone = weakref.ref(worker.call(lambda thing: thing))
    worker.close()
    gc.collect()
    assert gone() is None
    with pytest.raises(OneVisionError, match="closed"):
        worker.call(lambda _: None)
    worker.close()


def test_a_forgotten_worker_closes_itself() -> None:
    worker = Worker(Thing)
    thread = worker.call(lambda thing: thing.thread)
    del worker
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()
