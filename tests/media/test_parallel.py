"""Work spread over cores: the order of results, the error that counts, and no deadlock."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from mlx_onevision.media import parallel
from mlx_onevision.media.parallel import parallel_map


@pytest.fixture(autouse=True, params=[1, 2, 4])
def on_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(parallel, "cores", lambda: request.param)
    parallel._pool.cache_clear()
    yield
    parallel._pool.cache_clear()


def test_results_are_in_the_order_of_the_items() -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (5 - number % 5))
        return number * 10

    assert parallel_map(work, range(12)) == list(range(0, 120, 10))
    assert parallel_map(work, iter(range(12)), most=2) == list(range(0, 120, 10))
    assert parallel_map(work, []) == []


def test_the_first_error_in_order_counts_and_nothing_runs_on() -> None:
    running = []

    def work(number: int) -> None:
        running.append(number)
        time.sleep(0.02 if number == 1 else 0)
        running.remove(number)
        if number:
            raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        parallel_map(work, range(9))
    assert running == []


def test_an_error_while_items_are_taken_ends_it() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise KeyError("enough")

    running = []

    def work(number: int) -> None:
        running.append(number)
        time.sleep(0.01)
        running.remove(number)

    with pytest.raises(KeyError, match="enough"):
        parallel_map(work, items())
    assert running == []


def test_no_more_items_than_allowed_are_ahead() -> None:
    lock, taken, done, most = threading.Lock(), [0], [0], [0]

    def items() -> Iterator[None]:
        for _ in range(20):
            with lock:
                taken[0] += 1
                most[0] = max(most[0], taken[0] - done[0])
            yield

    def work(_: None) -> None:
        time.sleep(0.002)
        with lock:
            done[0] += 1

    parallel_map(work, items(), most=3)
    assert most[0] <= 3


def test_it_can_be_called_within_itself() -> None:
    def outer(number: int) -> list[int]:
        return parallel_map(lambda other: number + other, range(6))

    assert parallel_map(outer, range(8)) == [list(range(n, n + 6)) for n in range(8)]


def test_threads_share_two_heaps() -> None:
    """Counted by glibc itself; another C library has no arenas, and prints none."""
    program = (
        "import ctypes, sys, threading\n"
        "from mlx_onevision.media.parallel import share_heaps\n"
        "share_heaps()\n"
        "barrier = threading.Barrier(8)\n"
        "threads = [threading.Thread(target=barrier.wait) for _ in range(8)]\n"
        "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
        "library = ctypes.CDLL(None)\n"
        "if hasattr(library, 'malloc_info'):\n"
        "    library.fdopen.restype = ctypes.c_void_p\n"
        "    file = ctypes.c_void_p(library.fdopen(1, b'w'))\n"
        "    library.malloc_info(0, file), library.fflush(file)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<heap nr=") == (2 if sys.platform == "linux" else 0)
