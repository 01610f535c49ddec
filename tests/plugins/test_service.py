"""What stands around a model: queue, limits, memory, and errors that stay with their request."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from faults import error_of

from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CheckpointError, OutOfMemoryError
from mlx_onevision.media import image as image_files
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.adapters.fake import MODEL_INFO, FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Media,
    ProgressEvent,
    TextEvent,
)
from mlx_onevision.plugins.service import service
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits, LoadedModel, Service

HELLO = GenerateRequest.ask("hello there")
SHAPES = Path(__file__).parents[2].joinpath("examples/shapes.png").read_bytes()
MP4 = b"\0\0\0\x18ftypisom"


def eventually(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_beyond_the_line_it_is_busy_at_once() -> None:
    limits = Limits(active=1, waiting=2)
    with FakeBackend(delay=0.05, pieces="abc", limits=limits) as backend:
        streams = [backend.generate(HELLO) for _ in range(3)]
        eventually(lambda: backend.info().active == 1)
        since = time.monotonic()
        for _ in range(20):
            assert error_of(backend.generate(HELLO)).code == "busy"
        assert time.monotonic() - since < 0.1
        assert (backend.info().active, backend.info().waiting) == (1, 2)
        # One that gives up its place in line leaves it to another.
        streams[1].cancel()
        other = backend.generate(HELLO)
        assert [s.result().text for s in (streams[0], streams[2], other)] == ["abc"] * 3


def test_they_are_served_in_order() -> None:
    ended: list[int] = []
    with FakeBackend(delay=0.01, limits=Limits(active=1, waiting=8)) as backend:
        streams = [backend.generate(HELLO) for _ in range(5)]

        def read(number: int) -> None:
            streams[number].result()
            ended.append(number)

        readers = [threading.Thread(target=read, args=[n]) for n in range(5)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(20)
    assert ended == sorted(ended)


def test_cancelled_work_stops() -> None:
    """Queued, loading and while it answers; what was not begun is never begun."""
    with FakeBackend(
        delay=0.02, pieces="a" * 500, load_seconds=0.2, limits=Limits(active=1)
    ) as backend:
        loading = backend.generate(HELLO)
        eventually(lambda: ProgressEvent("loading") in [next(loading), next(loading)])
        queued = backend.generate(HELLO)
        for stream in (queued, loading):
            since = time.monotonic()
            stream.cancel()
            assert error_of(stream).code == "cancelled" and time.monotonic() - since < 0.1
        eventually(lambda: backend.info().active == 0)
        assert backend.steps == 0
        stream = backend.generate(HELLO)
        while not isinstance(next(stream), TextEvent):
            pass
        stream.cancel()
        steps = backend.steps
        eventually(lambda: backend.info().active == 0)
        assert backend.steps <= steps + 2


def test_a_video_that_is_described_has_a_time_of_its_own() -> None:
    video = DescribeRequest(Media("video", data=MP4), segments=10.0)
    with FakeBackend(delay=0.1, limits=Limits(timeout=0.05)) as backend:
        assert len(backend.describe_video(video).result().segments) == 3
    with FakeBackend(delay=5, limits=Limits(video_timeout=0.1)) as backend:
        error = error_of(backend.describe_video(video))
        assert error.code == "cancelled" and "0.1 seconds" in error.message


def test_the_sooner_of_two_timeouts_counts() -> None:
    with FakeBackend(delay=5, limits=Limits(timeout=0.1)) as backend:
        assert "0.1 seconds" in error_of(backend.generate(HELLO)).message
        sooner = GenerateRequest.ask("hello", timeout=0.05)
        assert "0.05 seconds" in error_of(backend.generate(sooner)).message


def test_a_request_that_waits_runs_out_of_time_too() -> None:
    with FakeBackend(delay=0.5, limits=Limits(active=1)) as backend:
        first = backend.generate(HELLO)
        waiting = backend.generate(GenerateRequest.ask("hello", timeout=0.1))
        assert error_of(waiting).code == "cancelled"
        assert backend.info().waiting == 0
        first.cancel()


def test_more_than_the_limits_is_refused() -> None:
    with FakeBackend(limits=Limits(max_tokens=10)) as backend:
        error = error_of(backend.generate(GenerateRequest.ask("hello there", max_tokens=11)))
        assert error.code == "bad_request" and "10" in error.hint
        many = [Media("image", data=SHAPES)] * 17
        assert error_of(backend.generate(GenerateRequest.ask("a", *many))).code == "too_large"
        with pytest.raises(PluginError, match="17 images"):
            backend.embed(EmbedRequest(many))
    nonsense: list[dict[str, Any]] = [
        {"active": 0},
        {"waiting": -1},
        {"max_tokens": 0},
        {"timeout": -1},
    ]
    for given in nonsense:
        with pytest.raises(PluginError, match="limit"):
            Limits(**given)


def test_it_is_loaded_once_and_freed_when_idle() -> None:
    keep_alive = 0.8
    with FakeBackend(load_seconds=0.05, limits=Limits(keep_alive=keep_alive)) as backend:
        assert not backend.info().loaded and backend.loads == 0
        streams = [backend.generate(HELLO) for _ in range(5)]
        assert all(stream.result().text for stream in streams)
        assert backend.loads == 1 and backend.info().loaded
        loaded, took = False, keep_alive
        while took >= keep_alive:  # a busy machine may stand still for longer than that
            backend.generate(HELLO).result()
            time.sleep(0.4)
            began = time.monotonic()
            backend.generate(HELLO).result()  # which begins the time anew
            time.sleep(0.5)
            loaded, took = backend.info().loaded, time.monotonic() - began
        assert loaded
        loads = backend.loads
        eventually(lambda: not backend.info().loaded)
        backend.generate(HELLO).result()
        assert backend.loads == loads + 1


def test_it_is_freed_at_once_or_never() -> None:
    with FakeBackend(limits=Limits(keep_alive=0)) as backend:
        backend.generate(HELLO).result()
        eventually(lambda: not backend.info().loaded)
    with FakeBackend(limits=Limits(keep_alive=None)) as backend:
        backend.generate(HELLO).result()
        assert backend.info().loaded


def test_what_cannot_be_loaded_is_tried_again() -> None:
    backend = FakeBackend(load_seconds=0.05, fail_load=CheckpointError("a shard is missing; copy"))
    streams = [backend.generate(HELLO) for _ in range(3)]
    for stream in streams:
        error = error_of(stream)
        assert (error.code, error.message, error.hint) == (
            "model_not_found",
            "a shard is missing",
            "copy",
        )
    backend._fail_load = None
    assert backend.generate(HELLO).result().text
    backend.close()


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (PluginError("too_large", "much too large"), "too_large", "much too large"),
        (OutOfMemoryError("no memory left; close something"), "out_of_memory", "no memory left"),
        (MemoryError(), "out_of_memory", "too little memory"),
        (ValueError("/home/me/secret"), "internal", "ValueError"),
        (SystemExit(3), "internal", "SystemExit"),
    ],
)
def test_an_error_ends_its_request_only(
    raised: BaseException, code: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    with FakeBackend(pieces="abcd", fail_at=2, error=raised) as backend:
        stream = backend.generate(HELLO)
        events = list(stream)
        assert [e.delta for e in events if isinstance(e, TextEvent)] == ["a", "b"]
        error = error_of(backend.generate(HELLO))
        assert error.code == code and said in error.message and "secret" not in str(error)
        short = GenerateRequest.ask("hello", max_tokens=2)
        assert backend.generate(short).result().text == "ab"


def broken_load() -> LoadedModel:
    raise CheckpointError("a shard is missing")


@pytest.mark.parametrize("why", ["closed", "died", "not loaded"])
def test_an_error_keeps_nothing_of_its_request(why: str) -> None:
    """An exception keeps the frames that it went through, and what they hold."""
    backend = FakeBackend(die_at=0) if why == "died" else Service(broken_load, lambda: MODEL_INFO)
    if why == "closed":
        backend.close()

    def refused() -> weakref.ref[GenerateRequest]:
        request = GenerateRequest.ask("hello there")
        assert error_of(backend.generate(request)).message
        return weakref.ref(request)

    left = [refused() for _ in range(3)]
    eventually(lambda: gc.collect() >= 0 and all(request() is None for request in left))
    backend.close()


def refuse_threads(patch: pytest.MonkeyPatch, name: str) -> None:
    """As a system that has no thread left, for those of one name."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    patch.setattr(threading.Thread, "start", refuse)


def test_without_a_thread_to_load_the_next_request_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeBackend() as backend:
        with monkeypatch.context() as patch:
            refuse_threads(patch, "mlx-onevision-load")
            assert error_of(backend.generate(HELLO)).code == "internal"
            with pytest.raises(PluginError, match="RuntimeError"):
                backend.load()
        asked = GenerateRequest.ask("hello there", timeout=5)
        assert backend.generate(asked).result().text.startswith("hello")


def test_without_a_thread_to_free_the_model_is_kept_and_freed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "FREE_AGAIN_SECONDS", 0.2)
    closed: list[object] = []
    with FakeBackend(limits=Limits(keep_alive=None)) as backend:
        monkeypatch.setattr(FakeBackend._Model, "close", lambda model: closed.append(model))
        backend.load()
        with monkeypatch.context() as patch:
            refuse_threads(patch, "mlx-onevision-free")
            backend.unload()
            assert backend.info().loaded and not closed
            assert backend.generate(HELLO).result().text.startswith("hello")  # with the same model
            assert backend.loads == 1
        eventually(lambda: len(closed) == 1 and not backend.info().loaded)
        asked = GenerateRequest.ask("hello there", timeout=5)
        assert backend.generate(asked).result().text and backend.loads == 2


def test_unloaded_while_it_loads_it_is_freed_once_idle() -> None:
    with FakeBackend(load_seconds=0.2, limits=Limits(keep_alive=None)) as backend:
        stream = backend.generate(HELLO)
        eventually(lambda: ProgressEvent("loading") in [next(stream), next(stream)])
        eventually(lambda: backend._keeper._busy)
        backend.unload()
        assert stream.result().text.startswith("hello")  # who waited for it gets it
        eventually(lambda: not backend.info().loaded)
        backend.unload()  # of none: nothing, for the next one either
        backend.load()
        time.sleep(0.1)
        assert backend.info().loaded and backend.loads == 2


def test_nothing_is_left_behind() -> None:
    before = threading.active_count()
    backend = FakeBackend(delay=0.005)
    for number in range(30):
        stream = backend.generate(HELLO)
        if number % 3 == 0:
            stream.cancel()
        elif number % 3 == 1:
            stream.result()
    backend.close()
    eventually(lambda: threading.active_count() <= before + 1)  # the one aside
    eventually(lambda: not backend._channels)


# The engine, on a small random checkpoint.


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = write(tmp_path_factory.mktemp("checkpoint") / "model", tied=False)
    with open_engine(folder, limits=Limits(active=3, waiting=3)) as backend:
        yield backend


def asked(number: int = 0, **settings: Any) -> GenerateRequest:
    picture = Media("image", data=SHAPES)
    return GenerateRequest.ask(f"what is {number}", picture, max_tokens=6, **settings)


def test_defaults_are_for_requests_that_leave_them_out(tmp_path: Path) -> None:
    defaults: dict[str, Any] = {"temperature": 3.0, "seed": 3, "top_p": None}
    given: list[dict[str, Any]] = [{}, defaults, {"temperature": 0.0}, {"seed": 4}]
    with open_engine(write(tmp_path, tied=False), defaults=defaults) as backend:
        found = [backend.generate(asked(**settings)).result().text for settings in given]
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.parametrize("place", ["begin", "fill_bank", "virtual_ids"])
def test_a_fault_before_the_first_token_ends_its_request_only(
    engine: Service, place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    good = engine.generate(asked()).result().text
    real = getattr(Runner, place)
    faults = {"left": 0}

    def faulty(*given: Any, **named: Any) -> Any:
        if faults["left"]:
            faults["left"] -= 1
            raise RuntimeError("a fault of the device")
        return real(*given, **named)

    monkeypatch.setattr(Runner, place, faulty)
    for _ in range(2):
        faults["left"] = 1
        error = error_of(engine.generate(asked()))
        assert error.code == "internal" and "device" not in str(error)
        assert engine.generate(asked()).result().text == good
    assert engine.info().healthy


def test_an_image_that_comes_again_is_not_decoded_again(
    engine: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoded: list[str] = []
    real = image_files._decoded

    def counted(data: Any, about: Any, held: Any) -> Any:
        decoded.append(about.name)
        return real(data, about, held)

    monkeypatch.setattr(image_files, "_decoded", counted)
    data = SHAPES + b"of this test"  # nothing behind the image's end is looked at
    for text in ("what is it", "and where", "and why"):
        request = GenerateRequest.ask(text, Media("image", data=data), max_tokens=4)
        assert engine.generate(request).result().text
    assert decoded == ["the image given as bytes"]
    cut = GenerateRequest.ask("what", Media("image", data=SHAPES[:300]), max_tokens=4)
    for _ in range(2):
        assert error_of(engine.generate(cut)).code == "unsupported_media"
    policy = MediaPolicy(folders=[tmp_path], pixels=100)
    (tmp_path / "shapes.png").write_bytes(SHAPES)
    with open_engine("demo", policy=policy) as small:
        for medium in (
            Media("image", data=SHAPES),
            Media("image", path=str(tmp_path / "shapes.png")),
        ):
            error = error_of(small.generate(GenerateRequest.ask("what", medium, max_tokens=1)))
            assert error.code == "too_large"


def test_a_schema_is_refused_before_anything_is_read(
    engine: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = GenerateRequest.ask("a", Media("image", data=b"none"), json_schema='{"type": "frob"}')
    error = error_of(engine.generate(asked))
    assert (error.code, error.hint) == ("bad_request", "simplify it") and "frob" in error.message
    assert {"logprobs", "json_schema"} < set(engine.info().capabilities)
    monkeypatch.setattr("mlx_onevision.sampling.grammar.find_spec", lambda _: None)
    with open_engine("demo") as without:
        assert "json_schema" not in without.info().capabilities
    error = error_of(engine.generate(asked))
    assert error.code == "bad_request" and "mlx-onevision[structured]" in error.hint


def test_hosts_that_go_away_at_any_moment(engine: Service) -> None:
    """In line, while prepared, in the middle, unread: what comes after is answered as ever."""
    request = asked(1, temperature=1.0, seed=5)
    good = engine.generate(request).result().text
    endless = GenerateRequest.ask("hello", max_tokens=4000, temperature=2.0, seed=1)
    for round_ in range(10):
        since = time.monotonic()
        streams = [engine.generate(endless if n % 2 else request) for n in range(5)]
        for place in range(round_ % 5):
            next(streams[place])
        streams.clear()
        eventually(lambda: engine.info().active == engine.info().waiting == 0)
        assert time.monotonic() - since < 5
        assert engine.generate(request).result().text == good


def test_a_small_image_is_what_it_is(engine: Service) -> None:
    """Three pixels high, it could be taken for an array whose first axis holds the channels."""
    from io import BytesIO

    from PIL import Image

    picture = BytesIO()
    Image.new("RGB", (5, 3), "red").save(picture, "PNG")
    small = Media("image", data=picture.getvalue())
    found = engine.embed(EmbedRequest([small, Media("image", data=SHAPES)]))
    assert len(found.vectors) == 2


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    with open_engine("demo", policy=MediaPolicy(pixels=1000)) as backend:
        for ask in (
            lambda: backend.generate(asked()).result(),
            lambda: backend.embed(EmbedRequest([Media("image", data=SHAPES)])),
        ):
            with pytest.raises(PluginError, match="megapixels") as raised:
                ask()
            assert raised.value.code == "too_large"


def test_there_is_no_such_model() -> None:
    with open_engine("./nowhere") as backend:
        with pytest.raises(PluginError) as raised:
            backend.info()
        assert raised.value.code == "model_not_found"
        assert error_of(backend.generate(HELLO)).code == "model_not_found"
