"""A server under all kinds of requests at once, for long: every good one gets its own answer, and
nothing grows: memory, threads, descriptors, arrays.
"""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crowding import CHAT, EMBED, RESPONSES, Heard, Peer, PromptRequest, command, questions, table
from hostile.sizes import cases
from served import Client, wait_for

REQUESTS = cases(300, 10_000)
WARM = max(200, min(500, REQUESTS // 3))
WORKERS = 8
MEGABYTES = 10  # that memory may rise by after the first requests

# What a server's own process says of itself, when it gets SIGUSR1.
PROGRAM = """
import gc, json, os, signal, sys, threading
import mlx.core as mx
def report(*_):
    gc.collect()
    arrays = {id(r) for o in gc.get_objects() for r in gc.get_referents(o) if type(r) is mx.array}
    names = sorted(thread.name for thread in threading.enumerate())
    found = {"arrays": len(arrays), "threads": len(names), "names": names}
    found |= {"descriptors": len(os.listdir("/dev/fd")), "active": mx.get_active_memory()}
    with open(os.environ["REPORT"] + ".part", "w") as file:
        json.dump(found, file)
    os.replace(os.environ["REPORT"] + ".part", os.environ["REPORT"])
signal.signal(signal.SIGUSR1, report)
from mlx_onevision.__main__ import main
sys.argv[0] = "mlx-onevision"
main()
"""

HEAD = "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def posted(path: str, body: bytes) -> bytes:
    return f"{HEAD.format(path)}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chat(*content: object, **fields: object) -> bytes:
    messages = [{"role": "user", "content": list(content)}]
    return posted(CHAT, json.dumps({"messages": messages, **fields}).encode())


def shown(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


MALFORMED = [
    posted(CHAT, b"{"),
    posted(CHAT, b'{"messages": []}'),
    posted(CHAT, b"\xff\xfe"),
    posted(EMBED, b'{"input": [[[[]]]]}'),
    chat(shown("data:image/png;base64,AAAA")),
    chat(shown("file:///etc/passwd")),
    chat(shown("http://127.0.0.1:9/")),
    chat({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}),
    chat({"type": "text", "text": "hi"}, temperature=-1),
    chat({"type": "text", "text": "hi"}, max_tokens=0),
    chat({"type": "text", "text": "hi"}, logit_bias={"a": 1}),
    b"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
]


@dataclass
class Soak:
    """70 % text, 25 % images, 5 % videos; of all, 10 % are cancelled, 5 % malformed, and 1 % never
    read.
    """

    client: Client
    asked: dict[str, list[tuple[PromptRequest, str]]]
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    silent: list[socket.socket] = field(default_factory=list)

    def drawn(self) -> tuple[PromptRequest, str]:
        kind = self.rng.choices(("text", "image", "video"), (70, 25, 5))[0]
        return self.rng.choice(self.asked[kind])

    async def run(self, count: int) -> None:
        todo = iter(range(count))
        await asyncio.gather(*(self.work(todo) for _ in range(WORKERS)))
        for one in self.silent:
            one.close()
        self.silent = []

    async def work(self, todo: Iterator[int]) -> None:
        peer = await Peer(self.client.port).open()
        for _ in todo:
            request, wanted = self.drawn()
            kind = self.rng.choices(
                ("good", "cancelled", "malformed", "never read"), (84, 10, 5, 1)
            )[0]
            self.counts[kind if kind != "good" else request.kind] += 1
            if kind == "good":
                self.check(request, wanted, await peer.ask(request.data))
            elif kind == "malformed":
                heard = await peer.ask(self.rng.choice(MALFORMED))
                if not 400 <= heard.status < 500 or b"Traceback" in heard.body:
                    self.wrong.append(f"{heard.status} {heard.body[:200]!r}")
                peer.close()
                peer = await Peer(self.client.port).open()
            elif kind == "cancelled":
                leaver = await Peer(self.client.port).open()
                await leaver.send(request.data[: self.rng.randint(1, len(request.data))])
                await asyncio.sleep(self.rng.uniform(0, 0.05))
                leaver.close()
            else:
                self.silent.append(self.unread(request))
        peer.close()

    def unread(self, request: PromptRequest) -> socket.socket:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        one.connect(("127.0.0.1", self.client.port))
        one.sendall(request.data)
        return one

    def check(self, request: PromptRequest, wanted: str, heard: Heard) -> None:
        if heard.status != 200:
            self.wrong.append(f"{request.kind}: {heard.status} {heard.body[:200]!r}")
        elif (found := request.answer(heard.body)) != wanted:
            self.wrong.append(f"{request.kind}: {found!r} for {wanted!r}")


async def alone(client: Client, asked: list[PromptRequest]) -> list[str]:
    """What each is answered when there is nobody else; and then each has been asked last."""
    peer = await Peer(client.port).open()
    try:
        return [request.answer((await peer.ask(request.data)).body) for request in asked]
    finally:
        peer.close()


def by_kind(
    asked: list[PromptRequest], answers: list[str]
) -> dict[str, list[tuple[PromptRequest, str]]]:
    found: dict[str, list[tuple[PromptRequest, str]]] = {"text": [], "image": [], "video": []}
    for request, answer in zip(asked, answers, strict=True):
        kind = request.kind.partition(",")[0]
        found["image" if kind == "vectors" else kind].append((request, answer))
    return found


def test_nothing_grows(tmp_path: Path) -> None:
    report = tmp_path / "report"
    program = tmp_path / "soaked.py"
    program.write_text(PROGRAM)
    os.environ["REPORT"] = str(report)
    lines: list[str] = []

    with command("--model", "demo", "--queue", "16", program=[str(program)]) as (server, client):
        assert server.stderr is not None
        reader = threading.Thread(target=lambda: lines.extend(server.stderr or ()))
        reader.start()

        def measured() -> dict[str, Any]:
            wait_for(lambda: client.ask("GET", "/health").json["active"] == 0, 30)
            report.unlink(missing_ok=True)
            server.send_signal(signal.SIGUSR1)
            wait_for(report.exists, 30)
            listed = ["ps", "-o", "rss=", "-p", str(server.pid)]
            rss = int(subprocess.run(listed, capture_output=True, text=True).stdout)
            return {"resident": rss * 1024, **json.loads(report.read_text())}

        async def soaked() -> tuple[Soak, dict[str, Any], dict[str, Any]]:
            every = questions(18)
            for request in every:
                if request.path == RESPONSES:  # the last 256 are kept else, which come late
                    request.body["store"] = False
            answers = await alone(client, every)
            soak = Soak(client, by_kind(every, answers))
            await soak.run(WARM)
            await asyncio.gather(*(alone(client, every[:3]) for _ in range(2 * WORKERS)))  # threads
            assert await alone(client, every) == answers
            before = measured()
            await soak.run(REQUESTS)
            assert await alone(client, every) == answers
            after = measured()
            for _ in range(20):  # a connection may be closed late
                if after["descriptors"] <= before["descriptors"]:
                    break
                await asyncio.sleep(0.5)
                after = measured()
            return soak, before, after

        soak, before, after = asyncio.run(soaked())
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        reader.join(10)
    names = after.pop("names"), before.pop("names")
    rows = {name: f"{before[name]:,} to {after[name]:,}" for name in before}
    table(
        f"{WARM} and {REQUESTS} requests", {**rows, **{k: str(n) for k, n in soak.counts.items()}}
    )
    assert soak.wrong == []
    assert not [line for line in lines if "Traceback" in line]
    assert after["resident"] - before["resident"] <= MEGABYTES * 1e6
    for name in ("threads", "descriptors", "arrays"):
        assert after[name] <= before[name], (name, *names)
    assert abs(after["active"] - before["active"]) <= 1e6
