"""Concurrency and ends: many hosts at once; cancelled before, while and after; out of time;
unloaded; closed.
"""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from mlx_onevision.plugins import interface
from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.interface import Backend, DoneEvent, EmbedRequest, GenerateRequest

THREADS = 6


class Concurrency(Subject):
    """Many requests at once, from threads and from asyncio."""

    def test_every_thread_gets_its_own_answer(self, backend: Backend) -> None:
        requests = [self.question(backend, number) for number in range(THREADS)]
        alone = [self.answered(backend, request).text for request in requests]
        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(partial(self.answered, backend), requests))
        assert [result.text for result in together] == alone

    def test_one_that_fails_does_not_disturb_the_others(self, backend: Backend) -> None:
        request = self.question(backend)
        alone = self.answered(backend, request).text
        broken = GenerateRequest.ask("What is it?", interface.Media("image", data=b"no image"))
        for _ in range(3):
            streams = [backend.generate(r) for r in (request, broken, request, broken)]
            good, bad = streams[::2], streams[1::2]
            for stream in bad:
                assert self.refused(stream).code in ("unsupported_media", "busy")
            for stream in good:
                last = list(stream)[-1]
                if isinstance(last, interface.ErrorEvent):
                    assert last.code == "busy"
                else:
                    assert stream.result().text == alone

    def test_vectors_while_it_answers(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        items = [self.image(1), self.image(2)]
        alone = backend.embed(EmbedRequest(items)).vectors
        stream = backend.generate(self.long_request(max_tokens=60))
        self.started(stream)
        for vector, same in zip(backend.embed(EmbedRequest(items)).vectors, alone, strict=True):
            assert vector == pytest.approx(same, abs=1e-4)
        assert isinstance(list(stream)[-1], DoneEvent)

    def test_read_from_another_thread_than_asked(self, backend: Backend) -> None:
        stream = backend.generate(self.question(backend))
        found: list[interface.GenerateResult] = []
        reader = threading.Thread(target=lambda: found.append(stream.result()))
        reader.start()
        reader.join(self.answer_timeout)
        assert found == [stream.result()]

    def test_asyncio(self, backend: Backend) -> None:
        """Answers side by side, and the loop is never held up."""
        requests = [self.question(backend, number) for number in range(3)]
        alone = [self.answered(backend, request).text for request in requests]

        async def read(request: GenerateRequest) -> str:
            text = ""
            async with backend.generate(request) as stream:
                async for event in stream:
                    text += event.delta if isinstance(event, interface.TextEvent) else ""
                assert (await stream.aresult()).text == text
            return text

        async def ticks(gaps: list[float]) -> None:
            before = time.monotonic()
            while True:
                await asyncio.sleep(0.01)
                gaps.append(time.monotonic() - before)
                before = time.monotonic()

        async def main() -> None:
            gaps: list[float] = []
            ticking = asyncio.create_task(ticks(gaps))
            texts = await asyncio.gather(*map(read, requests))
            ticking.cancel()
            assert texts == alone
            assert max(gaps, default=0.0) < 1.0, "the event loop was held up"

        asyncio.run(main())

    def test_a_cancelled_task_cancels_its_request(self, backend: Backend) -> None:
        async def main() -> None:
            stream = backend.generate(self.long_request())
            began = asyncio.Event()

            async def read() -> None:
                async for event in stream:
                    if isinstance(event, interface.TextEvent):
                        began.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(began.wait(), self.answer_timeout)
            since = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not stream.ended:
                assert time.monotonic() - since <= self.cancel_timeout
                await asyncio.sleep(0.01)

        asyncio.run(main())
        self.wait_until_idle(backend)

    def test_a_crowd(self, backend: Backend) -> None:
        """Each is taken or refused as busy, at once; all can be cancelled; then it goes on."""
        since = time.monotonic()
        streams = [backend.generate(self.long_request(seed=n)) for n in range(self.crowd)]
        assert time.monotonic() - since <= self.cancel_timeout, "asking takes too long"

        def served() -> bool:
            busy = backend.info().active + backend.info().waiting
            return busy >= 1 or any(stream.ended for stream in streams)

        self.wait_for(served, "nobody is served")
        since = time.monotonic()
        for stream in streams:
            stream.cancel()
        for stream in streams:
            events = list(stream)
            self.check_order(events)
            last = events[-1]
            assert isinstance(last, DoneEvent) or (
                isinstance(last, interface.ErrorEvent) and last.code in ("busy", "cancelled")
            ), last
        assert time.monotonic() - since <= self.cancel_timeout
        self.wait_until_idle(backend)
        assert self.answered(backend, self.question(backend)).text


class Cancellation(Subject):
    """Requests that end early, and the end of the backend."""

    def test_cancelled_at_once(self, backend: Backend) -> None:
        stream = backend.generate(self.long_request())
        since = time.monotonic()
        stream.cancel()
        self.check_cancelled(stream, since)
        self.wait_until_idle(backend)

    def test_cancelled_while_it_answers(self, backend: Backend) -> None:
        stream = backend.generate(self.long_request())
        assert isinstance(self.started(stream)[-1], interface.TextEvent)
        since = time.monotonic()
        stream.cancel()
        stream.cancel()
        self.check_cancelled(stream, since)
        self.wait_until_idle(backend)

    def test_cancelled_after_its_end_nothing_changes(self, backend: Backend) -> None:
        stream = backend.generate(self.question(backend))
        result = stream.result()
        stream.cancel()
        assert stream.result() == result
        assert isinstance(list(stream)[-1], DoneEvent)

    def test_cancelled_in_the_queue_or_while_prepared(self, backend: Backend) -> None:
        """The last of several goes; the first does not notice."""
        streams = [backend.generate(self.long_request(seed=n)) for n in range(4)]
        try:
            assert isinstance(self.started(streams[0])[-1], interface.TextEvent)
            since = time.monotonic()
            streams[-1].cancel()
            last = list(streams[-1])[-1]
            assert isinstance(last, interface.ErrorEvent) and last.code in ("cancelled", "busy")
            assert time.monotonic() - since <= self.cancel_timeout
            assert isinstance(next(streams[0]), interface.TextEvent)
        finally:
            for stream in streams:
                stream.cancel()
        self.wait_until_idle(backend)

    def test_closing_the_iterator_cancels(self, backend: Backend) -> None:
        stream = backend.generate(self.long_request())
        self.started(stream)
        since = time.monotonic()
        stream.close()
        assert list(stream) == []
        self.raises("cancelled", stream.result)
        assert time.monotonic() - since <= self.cancel_timeout
        self.wait_until_idle(backend)

    def test_leaving_with_cancels(self, backend: Backend) -> None:
        with backend.generate(self.long_request()) as stream:
            self.started(stream)
        assert stream.ended and list(stream) == []
        self.wait_until_idle(backend)

    def test_a_forgotten_stream_is_cancelled(self, backend: Backend) -> None:
        self.started(backend.generate(self.long_request()))
        gc.collect()
        since = time.monotonic()
        self.wait_until_idle(backend)
        assert time.monotonic() - since <= 2 * self.cancel_timeout

    def test_time_runs_out(self, backend: Backend) -> None:
        since = time.monotonic()
        error = self.refused(backend.generate(self.long_request(timeout=0.3)))
        assert error.code == "cancelled" and "0.3" in error.message
        assert 0.25 <= time.monotonic() - since <= 0.3 + self.cancel_timeout
        self.wait_until_idle(backend)

    def test_time_runs_out_for_vectors(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        with backend.generate(self.long_request()) as stream:  # the model has something else to do
            self.started(stream)
            since = time.monotonic()
            try:
                backend.embed(EmbedRequest([self.image(n) for n in range(8)], timeout=0.001))
            except interface.PluginError as error:
                assert error.code == "cancelled"
            assert time.monotonic() - since <= self.cancel_timeout
        self.wait_until_idle(backend)

    def test_the_next_request_is_served(self, backend: Backend) -> None:
        """After everything above, answers are what they are in a new one."""
        request = self.question(backend)
        stream = backend.generate(self.long_request())
        self.started(stream)
        stream.cancel()
        after = self.answered(backend, request).text
        with self.open_backend() as other:
            assert self.answered(other, request).text == after

    def test_unloaded_and_loaded_again(self) -> None:
        with self.open_backend() as backend:
            before = self.answered(backend, self.question(backend)).text
            backend.unload()
            backend.unload()
            self.check_unloaded(backend)
            assert self.answered(backend, self.question(backend)).text == before

    def test_unloading_waits_for_what_is_under_way(self) -> None:
        with self.open_backend() as backend:
            stream = backend.generate(self.long_request(max_tokens=20))
            self.started(stream)
            backend.unload()
            assert isinstance(list(stream)[-1], DoneEvent)
            self.check_unloaded(backend)

    def test_the_end_of_the_backend(self) -> None:
        backend = self.open_backend()
        done = backend.generate(self.question(backend))
        result = done.result()
        under_way = backend.generate(self.long_request())
        self.started(under_way)
        since = time.monotonic()
        backend.close()
        backend.close()
        self.check_cancelled(under_way, since)
        assert done.result() == result and isinstance(list(done)[-1], DoneEvent)
        assert self.refused(backend.generate(self.long_request())).hint
        self.raises(None, lambda: backend.embed(EmbedRequest([self.image()])))

    def test_closed_before_it_was_asked(self) -> None:
        backend = self.open_backend()
        backend.close()
        assert self.refused(backend.generate(self.long_request())).message

    def test_the_backend_in_a_with(self) -> None:
        with self.open_backend() as backend:
            backend.generate(self.question(backend)).result()
        assert self.refused(backend.generate(self.long_request())).message
