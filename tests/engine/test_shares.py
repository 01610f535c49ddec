"""Several models in one process: what each may use of the device's memory."""

import gc
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write
from hostile.sizes import cases

from mlx_onevision.api import Model, load
from mlx_onevision.engine import engine, memory, runner
from mlx_onevision.engine.memory import Share, Shares, shares
from mlx_onevision.engine.worker import Worker
from mlx_onevision.errors import OutOfMemoryError


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Shares:
    """No models that other tests have left."""
    gc.collect()
    monkeypatch.setattr(shares, "_shares", [])
    return shares


def device(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    for module in (memory, engine, runner):
        monkeypatch.setattr(module, "working_set", lambda: nbytes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tied=False)


def test_all_together_never_plan_for_more_than_there_is() -> None:
    rng = random.Random(1)
    for _ in range(cases(200, 2000)):
        total, found = rng.randint(1, 1000), list[Share]()
        divided = Shares(lambda total=total: total)
        while len(found) < 6:
            weights = rng.randint(0, total // 4)
            most = rng.choice([total, rng.randint(weights, total)])
            share = Share(weights, most, lambda: None)
            if divided.limit(share) < weights:
                break
            divided.join(share)
            found.append(share)
        limits = {share: divided.limit(share) for share in found}
        free = total - sum(limits.values())
        assert free >= 0
        for share, limit in limits.items():
            assert share.weights <= limit <= share.most
            # What is left over, beyond rounding, nobody may use.
            assert free < len(found) or limit == share.most
        for share in found[1:]:
            divided.leave(share)
        assert not found or divided.limit(found[0]) == found[0].most


def test_a_model_alone_has_its_own_limit_or_what_there_is() -> None:
    for total, weights, most in ((10, 4, 6), (10, 6, 4), (10, 12, 20), (10, 0, 10)):
        assert Shares(lambda t=total: t).limit(Share(weights, most, print)) == min(most, total)


def test_a_model_has_what_others_leave(
    folder: Path, alone: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder) as first:
        weights = first._engine.memory.weights
        least = first._engine.memory.shortest.total
    total = 2 * weights + 29 * (least - weights) // 10
    device(monkeypatch, total)
    photo = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)

    def planned(model: Model) -> int:
        return model._engine._worker.call(lambda runner: runner.limit)

    with load(folder) as first:
        assert planned(first) == first._engine.memory_limit == total
        answer = first.generate("what is this", images=[photo], max_tokens=4).tokens
        with load(folder) as second:
            for model in (first, second):
                assert planned(model) == model._engine.memory_limit == total // 2
            kept = first._engine._worker.call(lambda r: r.prefix.nbytes + r.model.bank.nbytes)
            assert kept <= total // 2 - weights
            assert second.generate("what is this", images=[photo], max_tokens=4).tokens == answer
            words = "or close another: those of this process hold"
            with pytest.raises(OutOfMemoryError, match=f"the model needs .* limit is .*{words}"):
                load(folder)
            assert len(alone._shares) == 2
            # Closing others would not help where a model's own limit is the cause.
            with pytest.raises(OutOfMemoryError, match=r"the limit is [^,]*$"):
                load(folder, memory_limit=weights / 1e9)
            # Two tokens a word, and the template's.
            text = "one " * (first._engine.memory.longest(30_000, total // 2) // 2 + 20)
            with pytest.raises(OutOfMemoryError, match=f"but the limit is .*{words}"):
                first.generate(text, max_tokens=1)
        assert first._engine.memory_limit == total
        assert first.generate(text, max_tokens=1).finish_reason == "length"
        assert planned(first) == total
        # One that nobody has closed, and nobody refers to any more.
        second = load(folder)
        assert first._engine.memory_limit == total // 2
        del second, model
        gc.collect()
        assert first._engine.memory_limit == total


def test_two_that_are_loaded_at_once_know_of_each_other(
    folder: Path, alone: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder) as first:
        least = first._engine.memory.shortest.total
    device(monkeypatch, 12 * least // 10)
    weights, admitted = threading.Event(), threading.Event()
    read, found = engine.load_checkpoint, list[Model]()

    def slowly(*arguments: Any, admit: Callable[[Any], None], **options: Any) -> Any:
        def admit_then_wait(planned: Any) -> None:
            admit(planned)
            admitted.set()
            assert weights.wait(60)

        return read(*arguments, admit=admit_then_wait, **options)

    monkeypatch.setattr(engine, "load_checkpoint", slowly)
    thread = threading.Thread(target=lambda: found.append(load(folder)), daemon=True)
    thread.start()
    assert admitted.wait(60)
    with pytest.raises(OutOfMemoryError, match="or close another"):  # and reads no weights
        load(folder)
    assert len(alone._shares) == 1
    weights.set()
    thread.join(60)
    assert found[0]._engine.memory_limit == 12 * least // 10
    found.pop().close()
    assert not alone._shares


def test_another_may_join_while_one_is_loaded(
    folder: Path, alone: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its weights are read there is nothing to plan anew, and no error."""
    with load(folder) as first:
        least = first._engine.memory.shortest.total
    device(monkeypatch, total := 4 * least)
    weights, reading = threading.Event(), threading.Event()
    read, found = engine.load_checkpoint, list[Model]()

    def slowly(*arguments: Any, **options: Any) -> Any:
        loaded = read(*arguments, **options)
        if not reading.is_set():
            reading.set()
            assert weights.wait(60)
        return loaded

    monkeypatch.setattr(engine, "load_checkpoint", slowly)
    thread = threading.Thread(target=lambda: found.append(load(folder)), daemon=True)
    thread.start()
    assert reading.wait(60)
    with load(folder) as second:
        assert second._engine.memory_limit == total // 2
        weights.set()
        thread.join(60)
        with found.pop() as first:
            assert first._engine._worker.call(lambda runner: runner.limit) == total // 2
    assert not alone._shares


def test_another_may_join_when_one_has_been_built(
    folder: Path, alone: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread has made its plan by then, and makes another for the part that is left."""
    with load(folder) as first:
        least = first._engine.memory.shortest.total
    device(monkeypatch, total := 4 * least)
    built, joined = threading.Event(), threading.Event()
    found = list[Model]()

    class Slow(Worker[Any]):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            if not built.is_set():
                built.set()
                assert joined.wait(60)

    monkeypatch.setattr(engine, "Worker", Slow)
    thread = threading.Thread(target=lambda: found.append(load(folder)), daemon=True)
    thread.start()
    assert built.wait(60)
    with load(folder):
        joined.set()
        thread.join(60)
        with found.pop() as first:
            assert first._engine._worker.call(lambda runner: runner.limit) == total // 2


def test_a_load_that_fails_leaves_its_memory_to_others(
    folder: Path, alone: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "Runner", fail)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert not alone._shares


def test_a_limit_of_its_own_leaves_the_rest_to_the_others(
    folder: Path, alone: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder) as first:
        weights, least = first._engine.memory.weights, first._engine.memory.shortest.total
    device(monkeypatch, total := 10 * least)
    with load(folder, memory_limit=1.2 * least / 1e9) as small, load(folder) as large:
        assert small._engine.memory_limit == int(1.2 * least)
        assert large._engine.memory_limit == total - int(1.2 * least)
        done = threading.Barrier(3)

        def ask(model: Model) -> None:
            for _ in range(3):
                model.generate("hello", max_tokens=4)
            done.wait(60)

        for model in (small, large):
            threading.Thread(target=ask, args=[model], daemon=True).start()
        done.wait(60)
    assert weights < least
