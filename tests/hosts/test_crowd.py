"""64 open connections with requests of every kind: each gets its own answer, whoever is too much is
told so at once, and the server's health can be asked all the while.
"""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from crowding import (
    CHAT,
    EMBED,
    Heard,
    Peer,
    PromptRequest,
    command,
    percentile,
    questions,
    spread,
    table,
)
from served import Client, serving

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.service.service import Limits

pytestmark = pytest.mark.measured

CONNECTIONS = 64
PLACES = 16  # 8 under way, 8 in line
CROWDS = 9
PATIENCE = 120.0

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def alone(client: Client, asked: list[PromptRequest]) -> list[str]:
    """What each is answered when there is nobody else."""
    peer = await Peer(client.port).open()
    try:
        return [question.answer((await peer.ask(question.data)).body) for question in asked]
    finally:
        peer.close()


async def crowd(
    client: Client, asked: list[PromptRequest]
) -> tuple[list[Heard], list[Heard], float]:
    """All at once, each on a connection of its own: the answers, what was refused until then, and
    how long it took.
    """
    peers = [await Peer(client.port).open() for _ in asked]
    sent = [question.data for question in asked]
    refused: list[Heard] = []
    began = time.monotonic()
    try:
        found = await asyncio.gather(
            *(until_answered(p, data, refused) for p, data in zip(peers, sent, strict=True))
        )
    finally:
        for peer in peers:
            peer.close()
    return found, refused, time.monotonic() - began


async def once(client: Client, asked: list[PromptRequest]) -> list[Heard]:
    """All at once, and each only once."""
    peers = [await Peer(client.port).open() for _ in asked]
    sent = [question.data for question in asked]
    try:
        return await asyncio.gather(*(p.ask(data) for p, data in zip(peers, sent, strict=True)))
    finally:
        for peer in peers:
            peer.close()


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def identities(found: list[Heard]) -> list[bytes]:
    """The id that each answer has throughout."""
    ids = [re.search(rb'"id": ?"((?:chatcmpl|resp)[-_][0-9a-f]+)"', heard.body) for heard in found]
    return [match[1] for match in ids if match]


async def until_answered(peer: Peer, data: bytes, refused: list[Heard]) -> Heard:
    """The answer, asked for again as long as there are too many."""
    until = time.monotonic() + PATIENCE
    while (heard := await peer.ask(data)).status == 429:
        refused.append(heard)
        assert time.monotonic() < until, "it was refused for ever"
        await asyncio.sleep(float(heard.headers["retry-after"]))
    return heard


async def polled(client: Client, found: list[float], every: float = 0.02) -> None:
    """How long it takes to learn how the server is, again and again."""
    peer = await Peer(client.port).open()
    try:
        while True:
            heard = await peer.ask(HEALTH)
            assert heard.status == 200
            found.append(heard.seconds)
            await asyncio.sleep(every)
    finally:
        peer.close()


def crossed(asked: list[Any], found: list[Any], wanted: list[Any]) -> list[str]:
    """The kinds of those that were answered something else than when they were alone."""
    return [
        question.kind
        for question, heard, answer in zip(asked, found, wanted, strict=True)
        if heard.status != 200 or question.answer(heard.body) != answer
    ]


# Refuses every request at once, with two threads at work beside it, as a server has whose model is
# answering: what a crowd's refusals take on this machine, now, at the least.
BARE = """
import socket, threading
import numpy as np, uvicorn

async def app(scope, receive, send):
    headers = [(b"content-length", b"4"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": b"busy"})

def work():
    matrix = np.random.rand(160, 160)
    while True:
        matrix = matrix @ matrix
        matrix /= np.abs(matrix).max()

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off")).run([listening])
"""


@contextmanager
def bare_server() -> Iterator[Callable[[list[PromptRequest]], Awaitable[float]]]:
    """A function that has a crowd refused by it, and says how many seconds the slowest took. In
    between it stands still, and takes nothing from the server that is measured.
    """
    with subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        client = Client(int(server.stdout.readline()))
        server.send_signal(signal.SIGSTOP)

        async def refusals(asked: list[PromptRequest]) -> float:
            server.send_signal(signal.SIGCONT)
            found = await once(client, asked)
            server.send_signal(signal.SIGSTOP)
            return max(heard.until_status for heard in found)

        try:
            yield refusals
        finally:
            server.kill()


def test_a_crowd_of_every_kind() -> None:
    """First all of them until each has its answer; then, again and again, all at once and only
    once. The machine may be busy with something else for a moment, so of the slowest refusals of
    these crowds the middle one counts. They take a tenth of a second at most; on a machine that is
    slow just now, four times as long as those of a bare server in between.
    """
    healthy: list[float] = []
    slowest: list[float] = []
    again: list[float] = []
    bare: list[float] = []

    async def main(
        client: Client, refusals: Callable[[list[PromptRequest]], Awaitable[float]]
    ) -> None:
        asked = questions(CONNECTIONS)
        wanted = await alone(client, asked)
        assert len(set(wanted)) >= CONNECTIONS - CONNECTIONS // 6, "answers that tell nobody apart"
        polling = asyncio.create_task(polled(client, healthy))
        found, refused, took = await crowd(client, asked)
        wrong = crossed(asked, found, wanted)
        again.extend(heard.until_status for heard in refused)  # while the model works for others
        slowest.append(max(again))
        table(
            f"{CONNECTIONS} connections, {PLACES} places",
            {
                "answered": f"{len(found)} in {took:.1f} s",
                "of these": str(dict(Counter(question.kind for question in asked))),
                "lost or crossed": f"{len(wrong)} {wrong}",
                "429, until its status": spread(again),
            },
        )
        assert wrong == []
        assert len(set(identities(found))) == sum(q.path != EMBED for q in asked)
        waits: list[float] = []
        for _ in range(CROWDS):
            bare.append(await refusals(asked))
            found = await once(client, asked)
            served = [n for n, heard in enumerate(found) if heard.status != 429]
            pick = [[several[n] for n in served] for several in (asked, found, wanted)]
            assert crossed(*pick) == []
            surplus = [heard for heard in found if heard.status == 429]
            assert len(surplus) >= CONNECTIONS - 2 * PLACES
            assert all(int(heard.headers["retry-after"]) >= 1 for heard in surplus)
            waits += [heard.until_status for heard in surplus]
            slowest.append(max(heard.until_status for heard in surplus))
        polling.cancel()
        table(
            f"{CROWDS} times all at once",
            {
                "429, until its status": spread(waits),
                "the slowest of each time": spread(slowest),
                "/health, all the while": spread(healthy),
                "the slowest of a bare server": spread(bare),
            },
        )

    with bare_server() as refusals, command("--model", "demo", "--queue", "8") as (_, client):
        asyncio.run(main(client, refusals))
    limit = max(0.1, 4 * percentile(bare, 0.5))
    assert percentile(again, 0.9) <= limit
    assert percentile(slowest, 0.5) <= limit
    assert percentile(healthy, 0.99) < 0.25


def test_a_crowd_that_says_what_it_was_asked() -> None:
    """Every client has a word of its own, which the fake repeats to it and to nobody else."""

    async def main(client: Client) -> None:
        asked = [
            PromptRequest("text", CHAT, {"messages": [said(f"word{n} {n}")], "stream": n % 2 == 0})
            for n in range(CONNECTIONS)
        ]
        for _ in range(5):
            found, refused, _ = await crowd(client, asked)
            assert refused
            for number, (question, heard) in enumerate(zip(asked, found, strict=True)):
                text = question.answer(heard.body)
                assert text == f"word{number} {number} [0 images][0 videos]"
            assert len(set(identities(found))) == CONNECTIONS

    # So few, and so slow, that the crowd is too much however slowly it arrives.
    fake = FakeBackend(delay=0.02, limits=Limits(active=8, waiting=8))
    with serving(fake) as client:
        asyncio.run(main(client))


def test_an_answer_does_not_wait_to_be_acknowledged() -> None:
    """A head and a body in two packets, on a connection that is kept, are 40 ms each time where the
    second waits for the client's kernel.
    """

    async def main(client: Client) -> list[float]:
        peer = await Peer(client.port).open()
        try:
            return [(await peer.ask(HEALTH)).seconds for _ in range(50)]
        finally:
            peer.close()

    with serving(FakeBackend()) as client:
        took = asyncio.run(main(client))
    assert percentile(took, 0.5) < 0.02
