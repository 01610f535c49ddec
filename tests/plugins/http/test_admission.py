"""Admission: a request over the limit is refused at once, and one that ends makes room."""

import asyncio
import http.client
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from crowding import CHAT, Peer, PromptRequest
from served import Client, serving, wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.settings import ServerSettings


def question(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


LONG = question("word " * 1000)


@pytest.fixture
def client() -> Iterator[Client]:
    with serving(FakeBackend(delay=0.02), ServerSettings(admission_limit=2)) as found:
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
            question("hi", n=2),
            question("hi", model="another"),
        ]
        try:
            for number in range(120):
                heard = await peer.ask(PromptRequest("", CHAT, asked[number % 4]).data)
                assert heard.status == (200, 200, 400, 404)[number % 4], heard
        finally:
            peer.close()

    with serving(FakeBackend(), ServerSettings(admission_limit=1)) as client:
        asyncio.run(main(client))


def test_a_body_that_does_not_come_takes_no_place() -> None:
    settings = ServerSettings(admission_limit=1, header_timeout=5)
    with serving(FakeBackend(), settings) as client:
        slow = client.begin("POST", CHAT, b"{", {"Content-Length": "100"})
        assert client.chat("hi").status == 200
        slow.close()
