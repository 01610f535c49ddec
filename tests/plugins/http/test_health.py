"""When what runs the model dies, every request fails at once; and when vectors are not wanted any
more, the work on them stops.
"""

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write
from faults import error_of

from mlx_onevision.api import load
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.request import ActiveRequest
from mlx_onevision.errors import CancelledError, DiedError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.conformance.subject import png
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import (
    EmbedRequest,
    EventStream,
    GenerateRequest,
    Media,
    TextEvent,
)
from mlx_onevision.plugins.service.service import Limits, Service

LONG = GenerateRequest.ask("a long story", max_tokens=4000, temperature=2.0, seed=1)
MANY = EmbedRequest([Media("image", data=png(9, 9, (n, 0, 0))) for n in range(16)])
PICTURES = [np.full((30, 40, 3), n, np.uint8) for n in range(10)]


class Killed(BaseException):
    """What nothing on the inference thread expects."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("checkpoint") / "model", tied=False)
    (folder / "generation_config.json").write_text("{}")  # a long answer is long
    return folder


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Once it is set, the thread dies in the middle of the answers under way."""
    die = threading.Event()
    deliver = ActiveRequest.accept

    def delivering(row: ActiveRequest, token: int) -> None:
        deliver(row, token)
        if die.is_set():
            raise Killed

    def serving(runner: Any, line: deque[ActiveRequest]) -> None:
        serve(runner, line)
        if die.is_set():
            raise Killed

    monkeypatch.setattr(ActiveRequest, "accept", delivering)
    monkeypatch.setattr("mlx_onevision.engine.engine.serve", serving)
    return die


def test_a_model_whose_thread_dies(folder: Path, deadly: threading.Event) -> None:
    model = load(folder)
    first = model.stream("a long story", max_tokens=4000, temperature=2.0)
    next(first)
    others = model.stream(batch=["hello", "there"], max_tokens=4000, temperature=2.0)
    with ThreadPoolExecutor(1) as pool:
        vectors = pool.submit(model.embed, PICTURES)
        assert model.healthy
        deadly.set()
        since = time.monotonic()
        for stream in (first, *others):
            with pytest.raises((Killed, DiedError)):
                stream.result()
        with pytest.raises(DiedError, match="Killed"):
            vectors.result(5)
    assert not model.healthy
    for ask in (
        lambda: model.generate("hello"),
        lambda: model.generate(batch=["a", "b"]),
        lambda: model.embed(PICTURES),
    ):
        with pytest.raises(DiedError, match="load it again"):
            ask()
    assert time.monotonic() - since < 3
    model.close()


def died(backend: Service, streams: list[EventStream[Any]], since: float) -> None:
    """All of them ended with an error, and whatever is asked now does, at once."""
    for stream in streams:
        error = error_of(stream)
        assert error.code == "internal" and "/" not in str(error)
    assert time.monotonic() - since < 2
    info = backend.info()
    assert not info.healthy and info.active == info.waiting == 0
    since = time.monotonic()
    for stream in (backend.generate(LONG), backend.stream_embed(MANY)):
        error = error_of(stream)
        assert error.code == "internal" and "died" in error.message and error.hint
    with pytest.raises(PluginError, match="died"):
        backend.embed(MANY)
    assert time.monotonic() - since < 0.3
    backend.unload()
    time.sleep(0.05)
    assert not backend.info().healthy and error_of(backend.generate(LONG)).code == "internal"


def test_a_service_over_it(folder: Path, deadly: threading.Event) -> None:
    """Those under way, those in line, and those that come later."""
    with open_engine(folder, limits=Limits(active=3, waiting=2)) as backend:
        streams: list[EventStream[Any]] = [backend.generate(LONG) for _ in range(4)]
        streams.append(backend.stream_embed(MANY))
        for stream in streams[:3]:
            while not isinstance(next(stream), TextEvent):
                pass
        assert backend.info().healthy
        deadly.set()
        died(backend, streams, time.monotonic())
    deadly.clear()
    with open_engine(folder) as backend:
        assert backend.generate(GenerateRequest.ask("hello", max_tokens=3)).result()
        assert backend.info().healthy


def test_a_fake_that_is_set_to_die() -> None:
    limits = Limits(active=2, waiting=2)
    with FakeBackend(pieces="abcdef", delay=0.02, die_at=4, limits=limits) as backend:
        short = GenerateRequest.ask("hello", max_tokens=3)
        assert backend.generate(short).result().text == "abc" and backend.info().healthy
        streams = [backend.generate(GenerateRequest.ask("hello")) for _ in range(4)]
        died(backend, streams, time.monotonic())


# Vectors that are not wanted any more.


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each group of tiles was begun; each has one tile, and takes a while."""
    begun: list[float] = []
    features, plan = OneVision.vision_features, memory.MemoryModel.plan

    def slow(model: OneVision, *given: Any) -> Any:
        begun.append(time.monotonic())
        time.sleep(0.05)
        return features(model, *given)

    monkeypatch.setattr(OneVision, "vision_features", slow)
    monkeypatch.setattr(
        memory.MemoryModel, "plan", lambda *given: replace(plan(*given), tile_group=1)
    )
    return begun


@pytest.mark.parametrize("space", ["vision", "joint"])
def test_the_device_stops_between_groups_of_tiles(
    folder: Path, groups: list[float], space: str
) -> None:
    model = load(folder)
    error = CancelledError("gone") if space == "joint" else PluginError("cancelled", "gone")
    unwanted: list[float] = []

    def check() -> None:
        if len(groups) >= 2:
            unwanted.append(time.monotonic())
            raise error

    with pytest.raises(type(error)):
        model.embed(PICTURES, space, check=check)
    assert time.monotonic() - unwanted[0] < 0.5
    time.sleep(0.15)
    assert len(groups) <= 3, "the device worked on"
    assert len(model.embed(PICTURES[:1], space).vectors) == 1
    model.close()


def idle_but(backend: Service, active: int) -> None:
    since = time.monotonic()
    while backend.info().active > active:
        assert time.monotonic() - since < 1
        time.sleep(0.005)


def test_a_backend_stops_within_a_second(folder: Path, groups: list[float]) -> None:
    """While the device works on them, and while it is busy with something else."""
    with open_engine(folder) as backend:
        stream = backend.stream_embed(MANY)
        until = time.monotonic() + 20
        while not groups and time.monotonic() < until:
            time.sleep(0.005)
        stream.cancel()
        idle_but(backend, 0)
        assert error_of(stream).code == "cancelled"
        time.sleep(0.15)
        begun = len(groups)
        assert begun <= 2
        with backend.generate(LONG) as busy:
            while not isinstance(next(busy), TextEvent):
                pass
            stream = backend.stream_embed(MANY)
            time.sleep(0.1)
            stream.cancel()
            idle_but(backend, 1)
            assert not busy.ended
        assert len(backend.embed(EmbedRequest(MANY.items[:2])).vectors) == 2
        assert len(groups) == begun + 2, "what was cancelled in line was worked on"
