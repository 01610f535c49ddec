"""Admission: a request over the limit is refused at once, and one that ends makes room."""

import asyncio
import http.client
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Self

import openai
import pytest
from crowding import CHAT, Peer, PromptRequest
from served import Client, image, serving, text, video, wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.errors import to_http_error
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend, GenerateRequest
from mlx_onevision.plugins.service.base import RequestQueue
from mlx_onevision.plugins.service.service import Limits


def question(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


LONG = question("word " * 1000)
ONE = Limits(active=1, waiting=0)


@pytest.fixture
def client() -> Iterator[Client]:
    with serving(FakeBackend(delay=0.02, limits=Limits(active=1, waiting=1))) as found:
        yield found


def taken(client: Client) -> int:
    health = client.ask("GET", "/health").json
    return health["active"] + health["waiting"]


def test_the_one_after_the_last(client: Client) -> None:
    with (
        closing(client.begin("POST", CHAT, LONG)),
        closing(client.begin("POST", CHAT, {**LONG, "stream": True})),
    ):
        wait_for(lambda: taken(client) == 2)
        # Refused before it is looked into: it is no request at all.
        connection = client.begin("POST", CHAT, b"nothing")
        for path in (CHAT, "/v1/embeddings", "/v1/responses", "/v1/video/describe"):
            reply = connection.getresponse()
            error = reply.read()
            assert reply.status == 429 and reply.getheader("Retry-After") == "1"
            assert b"rate_limit_exceeded" in error and b"try again in a moment" in error
            connection.request("POST", path, b"nothing", {"Content-Type": "application/json"})
        assert connection.getresponse().status == 429  # all on one connection, which is kept
        connection.close()
        assert client.ask("GET", "/v1/models").status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_place_is_free_when_its_client_leaves(client: Client, stream: bool) -> None:
    streams: list[http.client.HTTPConnection] = []
    for _ in range(3):
        streams = [client.begin("POST", CHAT, {**LONG, "stream": stream}) for _ in range(2)]
        wait_for(lambda: taken(client) == 2)
        for one in streams:
            one.close()
        wait_for(lambda: taken(client) == 0)
    wait_for(lambda: client.chat("hi").status == 200)


def test_one_after_another_are_never_too_many() -> None:
    """Who asks again as soon as the answer is there finds the place free, whatever came of it."""

    async def main(client: Client) -> None:
        peer = await Peer(client.port).open()
        asked = [
            question("hi"),
            question("hi", stream=True),
            question("hi", n=9),
            question("hi", model="another"),
        ]
        try:
            for number in range(120):
                heard = await peer.ask(PromptRequest("", CHAT, asked[number % 4]).data)
                assert heard.status == (200, 200, 400, 404)[number % 4], heard
        finally:
            peer.close()

    with serving(FakeBackend(limits=ONE)) as client:
        asyncio.run(main(client))


def test_a_body_that_does_not_come_takes_no_place() -> None:
    with serving(FakeBackend(limits=ONE), ServerSettings(header_timeout=5)) as client:
        slow = client.begin("POST", CHAT, b"{", {"Content-Length": "100"})
        assert client.chat("hi").status == 200
        slow.close()


def test_requests_that_came_another_way_are_counted() -> None:
    """One of the program around the server, or a job that goes on after its answer: what comes then
    is refused before it is parsed.
    """
    backend = FakeBackend(delay=0.05, pieces="a" * 2000, limits=ONE)
    with serving(backend) as client:
        with backend.generate(GenerateRequest.ask("a long answer")):
            assert client.ask("POST", CHAT, b"nothing").status == 429
        wait_for(lambda: taken(client) == 0)
        job = client.ask("POST", "/v1/video/jobs", {"video": video()["video_url"]})
        assert job.status == 202
        assert client.ask("POST", CHAT, b"nothing").status == 429
        client.ask("DELETE", job.json["poll"])
        wait_for(lambda: taken(client) == 0)
        assert client.ask("POST", CHAT, b"nothing").status == 400


def test_as_many_as_an_openai_client_starts_are_answered() -> None:
    """With its default retries, each with an image; nobody is refused, and who waits has no thread
    of its own.
    """
    threads: list[int] = []

    async def main(client: Client) -> None:
        async with openai.AsyncOpenAI(base_url=client.url, api_key="unused") as asked:

            async def one(number: int) -> None:
                content: Any = [image(), text(f"number {number}")]
                said = await asked.chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": content}]
                )
                threads.append(threading.active_count())
                assert said.choices[0].message.content == f"number {number} [1 image][0 videos]"

            await asyncio.gather(*map(one, range(40)))

    backend = FakeBackend(delay=0.002, limits=Limits(active=8, waiting=512))
    with serving(backend, ServerSettings(max_held_bytes=1 << 20)) as client:
        before = threading.active_count()
        asyncio.run(main(client))
        counted = client.ask("GET", "/metrics").body.decode()
    assert 'status="429"' not in counted and 'status="5' not in counted
    assert max(threads) - before < 8 + 64 + 20


def test_when_to_try_again_is_how_long_requests_take() -> None:
    queue = RequestQueue(1, 0)
    for seconds in (0.0, 7.5):
        slot = queue.enter()
        with pytest.raises(PluginError) as busy:
            queue.enter()
        assert busy.value.retry_after == 1
        slot.since -= seconds
        queue.release(slot)
    queue.enter()
    with pytest.raises(PluginError) as busy:
        queue.enter()
    assert busy.value.retry_after == 2  # a fifth of the last one
    refused = to_http_error(busy.value).response()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")


def test_a_place_is_kept_for_a_body_that_is_being_parsed() -> None:
    queue = RequestQueue(1, 1)
    for _ in range(2):
        with queue.reserved(), queue.reserved(), pytest.raises(PluginError, match="2 wait"):
            queue.enter()
    with queue.reserved():
        queue.enter()
        with pytest.raises(PluginError, match="1 requests are under way and 1 wait"):
            queue.enter()
    queue.enter()  # what it was kept for
    with pytest.raises(PluginError), queue.reserved():
        pass


def test_a_backend_that_only_the_contract_describes_refuses_itself() -> None:
    """It has nothing but the methods of the contract, so a body is parsed first."""

    class Other:
        def __init__(self, backend: Backend) -> None:
            self._backend = backend

        def __getattr__(self, name: str) -> Any:
            if not hasattr(Backend, name):
                raise AttributeError(name)
            return getattr(self._backend, name)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self._backend.close()

    other: Any = Other(FakeBackend(delay=0.02, limits=ONE))
    with serving(other) as client:
        assert client.chat("hi").status == 200
        with closing(client.begin("POST", CHAT, LONG)):
            wait_for(lambda: taken(client) == 1)
            assert client.ask("POST", CHAT, b"nothing").status == 400
            reply = client.chat("hi")
            assert reply.status == 429 and reply.headers["retry-after"] == "1"
