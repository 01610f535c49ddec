"""One thread builds, runs and drops an object; everybody else waits for answers."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from checkpoints import write

from mlx_onevision.api import load
from mlx_onevision.engine.request import ActiveRequest
from mlx_onevision.engine.worker import Progress, Worker
from mlx_onevision.errors import DiedError, OneVisionError


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


@pytest.mark.parametrize("busy", [False, True])
def test_what_comes_while_it_closes_is_refused_or_runs(busy: bool) -> None:
    """It is closed by another thread once a job has been found welcome, and before it is queued."""
    worker = Worker(Thing)
    held = threading.Event()
    if busy:
        worker.submit(lambda _: held.wait(20))
    closing = worker.closing

    class Late(threading.Event):
        def is_set(self) -> bool:
            before = closing.is_set()
            worker.close(patience=0.0 if busy else 20.0)
            return before

    worker.closing = Late()
    if busy:
        late = worker.submit(lambda _: 1)
        held.set()
        assert late.result(5) == 1
    else:
        with pytest.raises(OneVisionError, match="closed"):
            worker.submit(lambda _: 1).result(5)
    worker._thread.join(5)
    assert not worker._thread.is_alive()


class Killed(BaseException):
    """What no job may raise, and one does."""


@pytest.mark.parametrize("killer", [Killed, SystemExit, RuntimeError])
def test_a_job_that_kills_the_thread_is_told_to_all(
    killer: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Those that wait behind it, those that come later, and who is under way; nobody hangs."""
    worker = Worker(Thing)
    gone = weakref.ref(worker.call(lambda thing: thing))
    held = threading.Event()
    told: list[Exception] = []
    under_way = worker.submit(lambda _: held.wait(5))

    def kill(_: Thing) -> None:
        raise killer("at /secret/path")

    worker.post(kill, told.append)
    behind = [worker.submit(lambda _: 1) for _ in range(3)]
    assert worker.alive
    held.set()
    assert under_way.result(5) is True
    for future in behind:
        with pytest.raises(DiedError, match=killer.__name__) as raised:
            future.result(5)
        assert "secret" not in str(raised.value) and "; " in str(raised.value)
    assert not worker.alive and isinstance(told[0], DiedError)
    for ask in (worker.submit, worker.call, worker.post):
        with pytest.raises(DiedError):
            ask(lambda _: None)
    worker.close()
    assert not worker._thread.is_alive()
    gc.collect()
    assert gone() is None, "its object was kept, by the log or by an error"
    assert "has died" in caplog.text and killer.__name__ in caplog.text
    assert "secret" not in caplog.text and "test_thread:" in caplog.text


def test_what_is_not_wanted_any_more_is_not_begun() -> None:
    worker = Worker(Thing)
    held, ran = threading.Event(), []
    first = worker.submit(lambda _: held.wait(5))
    while not first.running():
        time.sleep(0.001)
    second = worker.submit(lambda _: ran.append(2))
    assert second.cancel() and not first.cancel()
    held.set()
    worker.call(lambda _: None)
    assert ran == [] and worker.alive
    worker.close()


def test_a_forgotten_worker_closes_itself() -> None:
    worker = Worker(Thing)
    thread = worker.call(lambda thing: thing.thread)
    del worker
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def looked_at(worker: Worker[Progress], seconds: float) -> list[bool]:
    """Whether it hangs, again and again."""
    found: list[bool] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found.append(worker.hangs)
        time.sleep(0.01)
    return found


CLOSING = """
import gc, threading
import mlx.core as mx
from mlx_onevision.engine.worker import Worker

class Network:
    def __init__(self):
        self.compiled = [self.piece(number) for number in range(100)]

    def piece(self, number):
        piece = mx.compile(lambda values: {"a": values * number, "b": values + len(vars(self))})
        piece(mx.zeros(3))
        return piece

def allocate():
    while True:
        [[] for _ in range(500)]

gc.set_threshold(20, 1, 1)
threading.Thread(target=allocate, daemon=True).start()
for _ in range(10):
    Worker(Network).close()
print("closed")
"""


def test_what_others_collect_while_a_thread_ends_does_not_hang() -> None:
    """The thread's compiled functions, in a cycle, are garbage by then."""
    command = [sys.executable, "-c", CLOSING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.stdout == "closed\n", done.stderr


def test_a_job_that_does_not_move_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does one that moves, however long it takes, nor a thread without work."""
    monkeypatch.setattr("mlx_onevision.engine.worker.HANG_SECONDS", 0.3)
    progress, held, stuck = Progress(), threading.Event(), threading.Event()

    def build() -> Progress:
        time.sleep(0.6)  # loading is no hang
        return progress

    def moves(progress: Progress) -> None:
        for _ in range(6):
            time.sleep(0.15)
            progress.step()

    worker = Worker(build, progress)
    assert not any(looked_at(worker, 0.6))
    moving = worker.submit(moves)
    assert not any(looked_at(worker, 0.6)) and moving.result(5) is None
    hanging = worker.submit(lambda _: (stuck.set(), held.wait(20)))
    assert stuck.wait(5) and not worker.hangs
    assert looked_at(worker, 0.6)[-1]
    assert worker.alive
    held.set()
    hanging.result(5)
    assert not worker.hangs
    worker.close()


def test_a_process_that_was_stopped_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_onevision.engine.worker.HANG_SECONDS", 0.5)
    monkeypatch.setattr("mlx_onevision.engine.worker.LONGEST_LOOK", 0.1)
    progress, held = Progress(), threading.Event()
    worker = Worker(lambda: progress, progress)
    under_way = worker.submit(lambda _: held.wait(20))
    for _ in range(3):
        assert not worker.hangs
        time.sleep(0.6)  # nobody looks
    assert looked_at(worker, 1)[-1]
    held.set()
    under_way.result(5)
    worker.close()


def test_answers_that_take_long_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load they are one job without an end; each token is a step of it."""
    monkeypatch.setattr("mlx_onevision.engine.worker.HANG_SECONDS", 2.0)
    accept = ActiveRequest.accept

    def slowly(active: ActiveRequest, token: int) -> None:
        time.sleep(0.1)
        accept(active, token)

    with load(write(tmp_path, tied=False)) as model:
        model.generate("warm", max_tokens=2)
        monkeypatch.setattr(ActiveRequest, "accept", slowly)
        stream = model.stream("a long story", max_tokens=40)
        healthy: list[bool] = []
        answered = threading.Thread(target=stream.result)
        answered.start()
        while answered.is_alive():
            healthy.append(model.healthy)
            time.sleep(0.05)
        assert len(stream.result().tokens) == 40 and all(healthy)
