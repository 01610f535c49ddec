"""The thread that does what must not hold up others, and what is due later."""

import gc
import logging
import threading
import time
import weakref

import pytest

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.streams import Background, Channel
from mlx_onevision.plugins.interface import GenerateRequest
from mlx_onevision.plugins.service.base import RequestQueue
from mlx_onevision.plugins.service.service import Limits


@pytest.fixture
def background() -> Background:
    background = Background()
    background.start()
    return background


def test_what_is_wanted_soon_is_done_in_order_and_elsewhere(background: Background) -> None:
    done: list[tuple[int, str]] = []
    last = threading.Event()
    for number in range(100):
        background.call_soon(lambda n=number: done.append((n, threading.current_thread().name)))
    background.call_soon(last.set)
    assert last.wait(10)
    assert done == [(number, "mlx-onevision-background") for number in range(100)]


def test_what_is_due_later_is_done_by_its_time(background: Background) -> None:
    done: list[tuple[float, float]] = []
    began, last = time.monotonic(), threading.Event()
    for seconds in (0.3, 0.1, 1e12, 0.2, 0.0):
        background.call_later(seconds, lambda s=seconds: done.append((s, time.monotonic() - began)))
    background.call_later(0.4, last.set)
    assert last.wait(10)
    assert [seconds for seconds, _ in done] == [0.0, 0.1, 0.2, 0.3]
    assert all(after >= seconds for seconds, after in done)


def test_a_cancelled_timer_holds_nothing(background: Background) -> None:
    class Answer:
        def drop(self) -> None:
            raise AssertionError("it was cancelled")

    answer = Answer()
    seen = weakref.ref(answer)
    timer = background.call_later(0.05, answer.drop)
    del answer
    timer.cancel()
    gc.collect()
    assert seen() is None
    after = threading.Event()
    background.call_later(0.1, after.set)
    assert after.wait(10)


def test_one_failure_ends_nothing_else(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("no")

    after = threading.Event()
    with caplog.at_level(logging.ERROR):
        background.call_soon(fail)
        background.call_later(0.05, fail)
        background.call_later(0.1, after.set)
        assert after.wait(10)
    assert len(caplog.records) == 2


def test_an_ended_request_is_not_kept_until_its_time_is_over() -> None:
    channel = Channel()
    seen = weakref.ref(channel)
    channel.limit(3600.0, None)
    channel.fail(PluginError("internal", "it has ended"))
    del channel
    gc.collect()
    assert seen() is None


def test_starting_a_request_does_not_wait_for_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def slow(thread: threading.Thread) -> None:
        if thread.name == "mlx-onevision-request":
            time.sleep(0.2)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", slow)
    with FakeBackend(pieces="abc") as backend:
        since = time.monotonic()
        stream = backend.generate(GenerateRequest.ask("hello"))
        assert time.monotonic() - since < 0.1
        assert stream.result().text == "abc"


def test_where_no_thread_is_left_the_request_fails_and_the_next_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with FakeBackend(pieces="abc", limits=Limits(active=1, waiting=0)) as backend:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", none_left)
            with pytest.raises(PluginError, match="RuntimeError") as caught:
                backend.generate(GenerateRequest.ask("hello")).result()
        assert caught.value.code == "internal"
        assert backend.info().active == 0
        assert backend.generate(GenerateRequest.ask("hello")).result().text == "abc"


@pytest.mark.parametrize("readers", [1, 2])
def test_so_many_hold_a_slot_in_order_and_who_leaves_makes_room(readers: int) -> None:
    queue, lock, left = RequestQueue(readers, 12), threading.Lock(), threading.Event()
    channels = [Channel() for _ in range(12)]
    inside, order, most, gone = set[int](), list[int](), 0, list[int]()

    def read(number: int) -> None:
        nonlocal most
        try:
            with queue.slot(channels[number]):
                with lock:
                    inside.add(number)
                    order.append(number)
                    most = max(most, len(inside))
                left.wait(10)
                time.sleep(0.005)
                with lock:
                    inside.remove(number)
        except PluginError as error:
            assert error.code == "cancelled"
            gone.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
        time.sleep(0.005)
    channels[11].fail(PluginError("cancelled", "it has gone"))
    left.set()
    for thread in threads:
        thread.join(10)
    assert (most, inside, gone) == (readers, set(), [11])
    assert sorted(order) == list(range(11))
    if readers == 1:
        assert order == list(range(11))
