"""64 open connections with requests of every kind: each gets its own answer, whoever is too much is
told so at once, and the server's health can be asked all the while.
"""

import asyncio
import time
from collections import Counter

from crowding import Heard, Peer, Question, command, percentile, questions, spread, table
from served import Client

CONNECTIONS = 64
PLACES = 16  # that serve has by default: 8 under way, 8 in line
PATIENCE = 120.0

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def alone(client: Client, asked: list[Question]) -> list[str]:
    """What each is answered when there is nobody else."""
    peer = await Peer(client.port).open()
    try:
        return [question.answer((await peer.ask(question.data)).body) for question in asked]
    finally:
        peer.close()


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


def test_a_crowd_of_every_kind() -> None:
    async def main(client: Client) -> None:
        asked = questions(CONNECTIONS)
        wanted = await alone(client, asked)
        assert len(set(wanted)) >= CONNECTIONS - CONNECTIONS // 6, "answers that tell nobody apart"
        peers = [await Peer(client.port).open() for _ in asked]
        refused: list[Heard] = []
        healthy: list[float] = []
        polling = asyncio.create_task(polled(client, healthy))
        began = time.monotonic()
        sent = [question.data for question in asked]
        found = await asyncio.gather(
            *(until_answered(p, data, refused) for p, data in zip(peers, sent, strict=True))
        )
        took = time.monotonic() - began
        polling.cancel()
        for peer in peers:
            peer.close()
        crossed = [
            question.kind
            for question, heard, answer in zip(asked, found, wanted, strict=True)
            if heard.status != 200 or question.answer(heard.body) != answer
        ]
        waits = [heard.until_status for heard in refused]
        table(
            f"{CONNECTIONS} connections, {PLACES} places",
            {
                "answered": f"{len(found)} in {took:.1f} s, {dict(Counter(q.kind for q in asked))}",
                "lost or crossed": f"{len(crossed)} {crossed}",
                "refused with 429, until its status": spread(waits),
                "/health": spread(healthy),
            },
        )
        assert crossed == []
        assert len(refused) >= CONNECTIONS - PLACES - 8
        assert all(int(heard.headers["retry-after"]) >= 1 for heard in refused)
        assert max(waits) <= 0.1
        assert percentile(healthy, 0.99) < 0.25

    with command("--model", "demo") as (_, client):
        asyncio.run(main(client))
