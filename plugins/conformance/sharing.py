"""Many hosts at once: threads, asyncio, crowds, and one whose request goes wrong."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.interface import (
    Backend,
    DoneEvent,
    EmbedRequest,
    ErrorEvent,
    GenerateRequest,
    GenerateResult,
    Media,
    TextEvent,
)

THREADS = 6


class Sharing(Subject):
    def test_every_thread_gets_its_own_answer(self, backend: Backend) -> None:
        requests = [self.question(backend, number) for number in range(THREADS)]
        alone = [self.answered(backend, request).text for request in requests]
        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(lambda request: self.answered(backend, request), requests))
        assert [result.text for result in together] == alone

    def test_one_that_fails_does_not_disturb_the_others(self, backend: Backend) -> None:
        request = self.question(backend)
        alone = self.answered(backend, request).text
        broken = GenerateRequest.ask("What is it?", Media("image", data=b"no picture"))
        for _ in range(3):
            streams = [backend.generate(r) for r in (request, broken, request, broken)]
            good, bad = streams[::2], streams[1::2]
            for stream in bad:
                assert self.refused(stream).code in ("unsupported_media", "busy")
            for stream in good:
                last = list(stream)[-1]
                if isinstance(last, ErrorEvent):
                    assert last.code == "busy"
                else:
                    assert stream.result().text == alone

    def test_vectors_while_it_answers(self, backend: Backend) -> None:
        if not self.claims(backend, "embed", "images"):
            return
        items = [self.picture(1), self.picture(2)]
        alone = backend.embed(EmbedRequest(items)).vectors
        stream = backend.generate(self.long_request(max_tokens=60))
        self.started(stream)
        for vector, same in zip(backend.embed(EmbedRequest(items)).vectors, alone, strict=True):
            assert vector == pytest.approx(same, abs=1e-4)
        assert isinstance(list(stream)[-1], DoneEvent)

    def test_read_from_another_thread_than_asked(self, backend: Backend) -> None:
        stream = backend.generate(self.question(backend))
        found: list[GenerateResult] = []
        reader = threading.Thread(target=lambda: found.append(stream.result()))
        reader.start()
        reader.join(self.patience)
        assert found == [stream.result()]

    def test_asyncio(self, backend: Backend) -> None:
        """Answers side by side, and the loop is never held up."""
        requests = [self.question(backend, number) for number in range(3)]
        alone = [self.answered(backend, request).text for request in requests]

        async def read(request: GenerateRequest) -> str:
            text = ""
            async with backend.generate(request) as stream:
                async for event in stream:
                    text += event.delta if isinstance(event, TextEvent) else ""
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
                    if isinstance(event, TextEvent):
                        began.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(began.wait(), self.patience)
            since = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not stream.ended:
                assert time.monotonic() - since <= self.soon
                await asyncio.sleep(0.01)

        asyncio.run(main())
        self.wait_until_idle(backend)

    def test_a_crowd(self, backend: Backend) -> None:
        """Each is taken or refused as busy, at once; all can be cancelled; then it goes on."""
        since = time.monotonic()
        streams = [backend.generate(self.long_request(seed=n)) for n in range(self.crowd)]
        assert time.monotonic() - since <= self.soon, "asking takes too long"
        self.wait_for(
            lambda: (
                any(stream.ended for stream in streams)
                or backend.info().active + backend.info().waiting >= 1
            ),
            "nobody is served",
        )
        since = time.monotonic()
        for stream in streams:
            stream.cancel()
        for stream in streams:
            events = list(stream)
            self.check_order(events)
            last = events[-1]
            assert isinstance(last, DoneEvent) or (
                isinstance(last, ErrorEvent) and last.code in ("busy", "cancelled")
            ), last
        assert time.monotonic() - since <= self.soon
        self.wait_until_idle(backend)
        assert self.answered(backend, self.question(backend)).text
