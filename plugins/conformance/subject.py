"""The backend that is tested, and what the tests ask and check with."""

import json
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import pytest

from mlx_onevision.plugins import interface
from mlx_onevision.plugins.contract.wire import Record
from mlx_onevision.plugins.interface import Backend, GenerateRequest, GenerateResult, PluginError

Finished = TypeVar("Finished")


def through_json(record: Record, read: Callable[[Any], Record] | None = None) -> Any:
    """The record, written as JSON and read again, by its class unless ``read`` is given."""
    return (read or record.from_dict)(json.loads(json.dumps(record.to_dict())))


def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """An image of one colour, written with the standard library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = (b"\0" + bytes(colour) * width) * height
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class Subject:
    """What a subclass declares of its backend."""

    video: ClassVar[bytes | None] = None
    """A video of some seconds; needed by a backend that takes videos."""
    answer_timeout: ClassVar[float] = 60.0
    """Seconds after which the suite gives an answer up."""
    cancel_timeout: ClassVar[float] = 2.0
    """Seconds within which a cancelled request ends."""
    crowd: ClassVar[int] = 32
    """Requests at once, of which some may be refused as busy."""
    can_unload: ClassVar[bool] = True
    """Whether ``unload`` frees the model. False where it is somebody else's, as behind a wire: then
    it must change nothing."""

    @classmethod
    def open_backend(cls) -> Backend:
        """A new backend, ready to be asked."""
        raise NotImplementedError("return the backend that is to be tested")

    def long_request(self, **settings: Any) -> GenerateRequest:
        """One that is answered for some seconds, so that it can be stopped in the middle."""
        long = {"max_tokens": 2000, "temperature": 1.0, "seed": 1, **settings}
        return GenerateRequest.ask("Tell a very long story about everything there is.", **long)

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[Backend]:
        """One for all tests that leave it as it was."""
        with cls.open_backend() as backend:
            yield backend

    @pytest.fixture(autouse=True)
    def fail_when_stuck(self) -> Iterator[None]:
        """A test that waits for what never comes fails, and the next one runs."""

        def give_up(*_: object) -> None:
            pytest.fail(f"nothing has come for {2 * self.answer_timeout:g} seconds")

        if threading.current_thread() is not threading.main_thread():  # where no signal arrives
            yield
            return
        before = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, 2 * self.answer_timeout)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def claims(self, backend: Backend, *capabilities: interface.Capability) -> bool:
        return set(capabilities) <= set(backend.info().capabilities)

    def image(self, number: int = 0) -> interface.Media:
        return interface.Media("image", data=png(64, 48, (40 * number % 256, 90, 200)))

    def whole_video(self) -> interface.Media:
        assert self.video is not None, "a backend that takes videos needs one: set `video`"
        return interface.Media("video", data=self.video)

    def question(self, backend: Backend, number: int = 0) -> GenerateRequest:
        """One of several that have answers of their own, short and always the same."""
        media = [self.image(number)] if self.claims(backend, "images") else []
        return GenerateRequest.ask(
            f"What is in the image, number {number}?", *media, max_tokens=12, temperature=0.0
        )

    def answered(self, backend: Backend, request: GenerateRequest) -> GenerateResult:
        """The answer, asked for again while the backend is busy."""
        until = time.monotonic() + self.answer_timeout
        while True:
            try:
                return backend.generate(request).result()
            except PluginError as error:
                if error.code != "busy" or time.monotonic() > until:
                    raise
            time.sleep(0.05)

    def started(self, stream: interface.EventStream[Any]) -> list[interface.Event]:
        """The events up to the first text."""
        events: list[interface.Event] = []
        for event in stream:
            events.append(event)
            if isinstance(event, interface.TextEvent | interface.DoneEvent | interface.ErrorEvent):
                break
        return events

    def refused(self, stream: interface.EventStream[Any]) -> PluginError:
        """The error that a stream ends with; its result raises the same."""
        last = list(stream)[-1]
        assert isinstance(last, interface.ErrorEvent), f"it ended with {last}"
        raised = self.raises(last.code, stream.result)
        assert str(raised) == str(last.error)
        self.check_sentence(last.error)
        return last.error

    def raises(self, code: interface.Code | None, function: Callable[[], object]) -> PluginError:
        """The error that a call raises, of a code unless that is None."""
        with pytest.raises(PluginError) as raised:
            function()
        assert code in (None, raised.value.code), raised.value
        return raised.value

    def finished(
        self, stream: interface.EventStream[Any], kind: type[Finished]
    ) -> tuple[list[interface.Event], Finished]:
        """All events of a stream, in order, and the result that it ends with."""
        events = list(stream)
        self.check_order(events)
        last = events[-1]
        assert isinstance(last, interface.DoneEvent), f"it ended with {last}"
        assert isinstance(last.result, kind)
        return events, last.result

    def check_sentence(self, error: PluginError) -> None:
        """One sentence for a person, and nothing of the backend's inside."""
        for text in (error.message, error.hint):
            assert "\n" not in text and "Traceback" not in text and len(text) <= 300
            assert not text.endswith(".")
        assert error.message

    def check_order(self, events: Sequence[interface.Event]) -> None:
        """One end, at the end; the usage before it, if at all."""
        ends = [isinstance(event, interface.DoneEvent | interface.ErrorEvent) for event in events]
        assert ends.index(True) == len(events) - 1, f"the end is not at the end: {events}"
        usages = [isinstance(event, interface.UsageEvent) for event in events]
        assert sum(usages) <= 1 and True not in usages[:-2], "usage comes right before the end"

    def wait_for(self, what: Callable[[], bool], why: str) -> None:
        until = time.monotonic() + self.answer_timeout
        while not what():
            assert time.monotonic() < until, why
            time.sleep(0.01)

    def wait_until_idle(self, backend: Backend) -> None:
        self.wait_for(
            lambda: (info := backend.info()).active == info.waiting == 0,
            f"requests are still under way: {backend.info()}",
        )

    def check_cancelled(self, stream: interface.EventStream[Any], since: float) -> None:
        """It was cancelled at ``since``, and has ended within ``cancel_timeout``."""
        error = self.refused(stream)
        assert error.code == "cancelled"
        assert time.monotonic() - since <= self.cancel_timeout, "it took too long to end"

    def check_unloaded(self, backend: Backend) -> None:
        if self.can_unload:
            self.wait_for(lambda: not backend.info().loaded, "it stays loaded")
        else:
            assert backend.info().loaded, "it was said not to be unloaded"
