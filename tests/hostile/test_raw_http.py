"""Bytes that are no proper HTTP, or not quite: they are refused in words or the connection is
closed, in bounded time, and nothing is ever logged as a fault.
"""

import json
import logging
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hostile.sizes import cases
from served import Client, serving

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits

CASES = cases(500, 8000)
PATIENCE = 1.0  # seconds, of the server
MOST_SECONDS = 10.0  # that any connection may stay open after its last byte
REFUSED = re.compile(rb"HTTP/1\.1 4\d\d .*?\r\n\r\n(.*?)(?=HTTP/1\.1|$)", re.S)

CHAT = "/v1/chat/completions"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "one two three"}]}).encode()
STREAM = QUESTION[:-1] + b', "stream": true}'

Steps = list[bytes | float]
"""Bytes that are sent, and seconds between them."""


@dataclass
class Case:
    name: str
    steps: Steps
    half_close: bool = False
    answers: bytes = b""
    seconds: float = 0.0
    statuses: list[int] = field(default_factory=list)


def head(method: str = "POST", path: str = CHAT, *lines: str) -> bytes:
    usual = ["Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *usual, *lines, "", ""]).encode("latin-1")


def whole(body: bytes = QUESTION, *lines: str) -> bytes:
    return head("POST", CHAT, f"Content-Length: {len(body)}", *lines) + body


def get(path: str = "/health", *lines: str) -> bytes:
    return head("GET", path, *lines)


def slow_header(rng: random.Random) -> Steps:
    """A head that comes in pieces, and may never end."""
    data = rng.choice([get(), whole()])
    cut = rng.randrange(1, len(data))
    pieces = [data[place : place + 7] for place in range(0, cut, 7)]
    pauses = [rng.choice([0.0, 0.0, 0.01]) for _ in pieces]
    return [step for pair in zip(pieces, pauses, strict=True) for step in pair]


def odd_length(rng: random.Random) -> Steps:
    said = rng.choice(
        [
            *([], ["0"], ["-1"], ["+5"], ["5 5"], ["0x10"], ["1e3"], [""], ["9" * 30], ["²"]),
            *([f"{len(QUESTION)}"] * 2, ["5", "6"], ["5, 5"], ["5", "0"], [f"{len(QUESTION) + 9}"]),
            [f"{len(QUESTION) - 9}"],
        ]
    )
    lines = [f"Content-Length: {length}" for length in said]
    if rng.random() < 0.3:
        lines.append("Transfer-Encoding: chunked")
    return [head("POST", CHAT, *lines) + QUESTION]


def pipelined(rng: random.Random) -> Steps:
    some = [rng.choice([get(), get("/nothing"), whole(), whole(b"{"), whole(STREAM)])]
    some += [rng.choice([get(), whole(), whole(STREAM), b"\r\n", b"junk"]) for _ in range(4)]
    data = b"".join(some)
    return [data] if rng.random() < 0.5 else [data[:-20], 0.02, data[-20:]]


def chunked(rng: random.Random) -> Steps:
    first = b"%x\r\n%b\r\n" % (len(QUESTION), QUESTION)
    rest = rng.choice(
        [
            *(b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"0\r\n", b"", b"zz\r\n", b"-1\r\n", b"\r\n\r\n"),
            *(b"5\r\nab", b"5\r\nabcdefgh\r\n", b"ffffffffffffffff\r\n", b"f" * 40 + b"\r\n"),
            *(b"1;a=b\r\n \r\n0\r\n\r\n", b"1\n \n0\n\n", bytes(rng.randbytes(40)), b"0" * 70_000),
        ]
    )
    sent = first + rest if rng.random() < 0.7 else rest
    return [head("POST", CHAT, "Transfer-Encoding: chunked"), 0.01, sent]


def strange_head(rng: random.Random) -> Steps:
    lines = [
        *(b"GET /health HTTP/1.1\nHost: localhost\n\n", b"GET /health HTTP/9.9\r\n\r\n"),
        *(b"GET /health\r\n\r\n", b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        *(b"\r\n\r\n\r\n", b"\0" * 30, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 5),
        *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET  /health HTTP/1.1\r\n\r\n"),
        *(get("http://localhost/health"), get("*"), get("//"), get("/%00"), get("/" + "a" * 9000)),
        *(head("CONNECT", "localhost:80"), head("OPTIONS", "*"), head("TRACE"), head("BREW")),
        *(get("/health", "A: " + "b" * 70_000), get("/health", *["A: b"] * 300)),
        *(get("/health", " folded"), get("/health", "A\x00: b"), get("/health", "A : b")),
        *(get("/health", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x"),),
        *(get("/health", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"),),
        *(get("/health", "Expect: 100-continue"), get("/health", "Expect: x"), get("/é")),
        *(head("GET", CHAT), head("DELETE"), get("/v1/models/" + "%2e%2e/" * 50)),
    ]
    return [rng.choice(lines)]


def expecting(rng: random.Random) -> Steps:
    lines = ["Expect: 100-continue", f"Content-Length: {len(QUESTION)}"]
    return [head("POST", CHAT, *lines), 0.02, QUESTION[: rng.choice([5, len(QUESTION)])]]


def rubbish_in_mid_stream(rng: random.Random) -> Steps:
    """While the answer comes, or before it does."""
    rubbish = rng.choice([b"junk\r\n\r\n", b"\0" * 50, rng.randbytes(200), get() + b"\xff" * 9])
    return [whole(rng.choice([QUESTION, STREAM])), rng.choice([0.0, 0.005, 0.03]), rubbish]


def mangled(rng: random.Random) -> Steps:
    """A good request with some bytes changed."""
    data = bytearray(rng.choice([get(), whole(), whole(STREAM)]))
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(data))
        how = rng.randrange(3)
        if how == 0:
            data[place] = rng.randrange(256)
        elif how == 1:
            del data[place]
        else:
            data[place:place] = rng.randbytes(3)
    return [bytes(data)]


KINDS: list[Callable[[random.Random], Steps]] = [
    *(slow_header, odd_length, pipelined, chunked),
    *(strange_head, expecting, rubbish_in_mid_stream, mangled),
]


def made() -> Iterator[Case]:
    rng = random.Random(20)
    for number in range(CASES):
        kind = KINDS[number % len(KINDS)]
        yield Case(kind.__name__, kind(rng), half_close=rng.random() < 0.3)


def play(client: Client, case: Case) -> Case:
    with socket.create_connection(("127.0.0.1", client.port), timeout=MOST_SECONDS) as connection:
        began = time.monotonic()
        try:
            for step in case.steps:
                if isinstance(step, bytes):
                    connection.sendall(step)
                else:
                    time.sleep(step)
            began = time.monotonic()
            if case.half_close:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                case.answers += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass  # closed with something of ours unread
        case.seconds = time.monotonic() - began
    case.statuses = [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", case.answers)]
    return case


def test_whatever_comes_is_answered_in_words_or_closed(caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(delay=0.005, limits=Limits(active=16, waiting=64))
    with (
        caplog.at_level(logging.WARNING),
        serving(backend, ServerSettings(header_timeout=PATIENCE)) as client,
    ):
        with ThreadPoolExecutor(32) as pool:
            played = list(pool.map(lambda case: play(client, case), made()))
        assert client.ask("GET", "/health").json["active"] == 0
        assert client.chat("still here").status == 200
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not faults, [record.getMessage() for record in faults][:5]
    assert not [record for record in caplog.records if record.exc_info]
    for case in played:
        said = (case.name, case.steps, case.answers[:500])
        assert case.seconds < MOST_SECONDS, said
        assert all(status < 500 for status in case.statuses), said
        assert b"Traceback" not in case.answers, said
        for body in REFUSED.findall(case.answers):
            assert not body or set(json.loads(body)) == {"error"}, said
    seen = Counter(status for case in played for status in case.statuses)
    assert seen[200] > 30 and seen[400] > 30, seen
