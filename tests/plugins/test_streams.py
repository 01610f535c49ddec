"""Event streams: from any thread to any other, to asyncio, and what is left of them."""

import asyncio
import gc
import threading
import time
from typing import Any

import pytest

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import (
    DoneEvent,
    ErrorEvent,
    Event,
    GenerateResult,
    ProgressEvent,
    TextEvent,
)
from mlx_onevision.plugins.contract.streams import Channel

DONE = DoneEvent(GenerateResult("ab", "stop"))


def filled(*events: Event) -> Channel:
    channel = Channel()
    for event in events:
        assert channel.put(event)
    return channel


def eventually(what: Any) -> None:
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_nothing_comes_after_the_end() -> None:
    channel = filled(TextEvent("a"), DONE)
    assert not channel.put(TextEvent("b")) and not channel.fail(PluginError("busy", "no"))
    stream = channel.stream()
    assert list(stream) == [TextEvent("a"), DONE]
    assert stream.result() == DONE.result


def test_an_error_is_the_last_event_and_the_result_raises_it() -> None:
    channel = filled(TextEvent("a"), ErrorEvent("too_large", "much too large", "shrink it"))
    stream = channel.stream()
    assert isinstance(list(stream)[-1], ErrorEvent)
    for _ in range(2):
        with pytest.raises(PluginError, match="much too large; shrink it") as raised:
            stream.result()
        assert raised.value.code == "too_large"


def test_looking_at_one_event_ends_nothing() -> None:
    channel = filled(ProgressEvent("queued"), TextEvent("a"), TextEvent("b"))
    stream = channel.stream()
    assert next(stream) == ProgressEvent("queued")
    for event in stream:
        assert event == TextEvent("a")
        break
    assert not channel.ended and next(stream) == TextEvent("b")


def test_a_reader_waits_for_a_writer() -> None:
    channel = Channel()
    stream = channel.stream()
    found: list[Event] = []
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    for letter in "ab":
        time.sleep(0.01)
        channel.put(TextEvent(letter))
    channel.put(DONE)
    reader.join(10)
    assert found == [TextEvent("a"), TextEvent("b"), DONE]


def test_the_end_is_told_once_to_whoever_asked() -> None:
    channel, told = Channel(), []
    channel.at_end(lambda: told.append("early"))
    stream = channel.stream()
    stream.cancel()
    stream.close()
    channel.at_end(lambda: told.append("late"))
    assert told == ["early", "late"]
    with pytest.raises(PluginError, match="cancelled"):
        channel.check()


def test_a_forgotten_stream_ends_its_channel() -> None:
    channel = filled(TextEvent("a"))
    for _ in channel.stream():
        break
    gc.collect()
    eventually(lambda: channel.ended)


def test_a_forgotten_circle_ends_its_channel() -> None:
    """Collected at any moment, in the very thread that writes."""
    channels = [Channel() for _ in range(200)]
    for channel in channels:
        circle: list[Any] = [channel.stream()]
        circle.append(circle)
        del circle
        for letter in "abc":
            channel.put(TextEvent(letter))
    gc.collect()
    eventually(lambda: all(channel.ended for channel in channels))


def test_asyncio_reads_what_a_thread_writes() -> None:
    async def main() -> None:
        channel = Channel()
        stream = channel.stream()

        def write() -> None:
            for _ in range(50):
                channel.put(TextEvent("a"))
                time.sleep(0.001)
            channel.put(DONE)

        writer = threading.Thread(target=write)
        writer.start()
        other = asyncio.create_task(stream.aresult())
        events = [event async for event in stream]
        assert events == [TextEvent("a")] * 50 + [DONE]
        assert await other == DONE.result
        writer.join()

    asyncio.run(main())


def test_a_cancelled_wait_cancels_the_request() -> None:
    async def main(method: str) -> bool:
        channel = Channel()
        stream = channel.stream()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(getattr(stream, method)(), 0.01)
        return channel.ended

    for method in ("__anext__", "aresult"):
        assert asyncio.run(main(method))


def test_a_loop_that_is_gone_is_not_waited_for() -> None:
    channel = Channel()
    stream = channel.stream()
    loop = asyncio.new_event_loop()
    task = loop.create_task(stream.aresult())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.call_soon(loop.stop)
    loop.run_forever()
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    assert not channel.put(DONE)  # the cancelled task has ended it


def test_async_with_closes() -> None:
    async def main() -> None:
        channel = filled(TextEvent("a"))
        async with channel.stream() as stream:
            assert await anext(stream) == TextEvent("a")
        assert channel.ended
        assert [event async for event in stream] == []
        await stream.aclose()

    asyncio.run(main())
