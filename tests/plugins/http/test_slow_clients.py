"""Clients that send slowly, or never take their answer: they keep nothing from others, and are cut
off in the end.
"""

import asyncio
import contextlib
import fcntl
import http.client
import json
import logging
import socket
import sys
import termios
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest
from served import JSON, Client, serving, wait_for
from starlette.requests import ClientDisconnect

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http import connections
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.request_body import SMALL_BODY_BYTES, BodyBudget
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


def connected(client: Client, opened: ExitStack | None = None) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", client.port), timeout=10)
    return found if opened is None else opened.enter_context(found)


def announced(size: int) -> bytes:
    return f"{HEAD}Content-Length: {size}\r\n\r\n".encode()


# Those that send.


def test_what_was_announced_and_does_not_come_keeps_no_room() -> None:
    settings = ServerSettings(max_body_bytes=1_000_000, max_held_bytes=1_000_000)
    with serving(FakeBackend(), settings) as client, ExitStack() as opened:
        for _ in range(8):
            connected(client, opened).sendall(announced(1_000_000) + b" " * 1000)
        for size in (10, 900_000):
            reply = client.chat("x" * size)
            assert reply.status == 200 and reply.seconds < 2


def test_bodies_are_bounded_together() -> None:
    """Those for which there is no room are read when there is, in the order in which they came."""
    settings = ServerSettings(max_body_bytes=400_000, max_held_bytes=400_000)
    with serving(FakeBackend(), settings) as client:
        half = announced(390_000) + b" " * 380_000
        with connected(client) as first:
            first.sendall(half)
            time.sleep(0.1)  # until it is read
            with connected(client) as second:
                second.sendall(half + b" " * 10_000)
                assert client.ask("GET", "/health").status == 200
                assert (
                    client.chat("x" * (SMALL_BODY_BYTES // 2)).status == 200
                )  # the small one overtakes
                second.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    second.recv(1)
                first.close()
                second.settimeout(10)
                assert second.recv(100).startswith(b"HTTP/1.1 400")
        for _ in range(5):  # what was refused, or left, is not held any more
            assert client.chat("x" * 390_000).status == 200


def test_what_comes_beyond_all_room_is_refused() -> None:
    settings = ServerSettings(max_body_bytes=400_000, max_held_bytes=400_000)
    with serving(FakeBackend(), settings) as client, ExitStack() as opened:
        several = [connected(client, opened) for _ in range(4)]
        for one in several:  # all are let in, as nothing has come yet
            one.sendall(announced(400_000))
        time.sleep(0.1)
        for one in several:
            one.sendall(b" " * 390_000)
        for one in several:
            one.settimeout(0.5)
        statuses: list[bytes] = []
        for one in several:
            with contextlib.suppress(TimeoutError):
                statuses.append(one.recv(12))
        assert statuses and set(statuses) == {b"HTTP/1.1 429"} and len(statuses) < 4


def test_so_many_wait_for_room_and_no_more() -> None:
    async def main() -> None:
        budget = BodyBudget(10, 5, max_waiting=2)
        await budget.enter(8)
        budget.take(8)
        waiting = [asyncio.ensure_future(budget.enter(size)) for size in (5, 1)]
        await asyncio.sleep(0)
        with pytest.raises(HTTPError) as refused:
            await budget.enter(1)
        assert refused.value.status == 429
        assert not any(one.done() for one in waiting)  # the small one does not overtake
        budget.give_back(2)
        await asyncio.sleep(0)
        assert not any(one.done() for one in waiting)
        waiting[0].cancel()
        budget.give_back(0)
        await waiting[1]
        budget.take(9)  # 15 in all
        with pytest.raises(HTTPError):
            budget.take(1)
        budget.give_back(15)
        await budget.enter(10)

    asyncio.run(main())


@pytest.mark.parametrize("begun", [b"", b"{" + b" " * 1000])
def test_who_leaves_the_line_keeps_no_place_in_it(begun: bytes) -> None:
    settings = ServerSettings(max_body_bytes=400_000, max_held_bytes=400_000, max_waiting_bodies=8)
    with serving(FakeBackend(), settings) as client, connected(client) as first:
        first.sendall(announced(390_000) + b" " * 380_000)
        time.sleep(0.1)  # until it is read
        with ExitStack() as opened:
            for _ in range(settings.max_waiting_bodies):
                connected(client, opened).sendall(announced(390_000) + begun)
            wait_for(lambda: client.chat("x" * 390_000).status == 429)
        time.sleep(0.2)  # until it is seen that they have left
        with connected(client) as second:  # in one of their places, at the front of the line
            body = json.dumps({"messages": [{"role": "user", "content": "x" * 380_000}]}).encode()
            second.sendall(announced(len(body)) + body[:1000])
            time.sleep(0.1)
            second.sendall(body[1000:])
            second.settimeout(0.3)
            with pytest.raises(TimeoutError):
                second.recv(1)
            first.close()
            second.settimeout(10)
            assert second.recv(12) == b"HTTP/1.1 200"  # nothing of it was lost


def test_the_next_moves_up_when_the_first_leaves_the_line() -> None:
    async def main() -> None:
        budget = BodyBudget(10, 5, max_waiting=2)
        budget.take(8)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        large = asyncio.ensure_future(budget.enter(5, gone))
        small = asyncio.ensure_future(budget.enter(1))
        await asyncio.sleep(0)
        gone.set_result(None)
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(large, 1)
        await asyncio.wait_for(small, 1)

    asyncio.run(main())


def test_a_body_has_to_come_at_some_speed() -> None:
    """However many pieces it comes in."""
    with serving(FakeBackend(), ServerSettings(header_timeout=0.5)) as client:
        with connected(client) as slow:
            slow.sendall(announced(30_000_000))
            began = time.monotonic()
            with contextlib.suppress(OSError):
                for _ in range(20):
                    slow.sendall(b" ")
                    time.sleep(0.1)
            assert slow.recv(100).startswith(b"HTTP/1.1 408") and time.monotonic() - began < 5


def test_connections_on_which_nothing_comes_are_closed() -> None:
    settings = ServerSettings(header_timeout=1.5)
    with serving(FakeBackend(), settings) as client, ExitStack() as opened:
        began = time.monotonic()
        idle = [connected(client, opened) for _ in range(30)]
        for number, connection in enumerate(idle):
            # Silent; half a head; and one that was used before.
            if number % 3:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            if number % 3 == 2:
                connection.sendall(b"\r\n")
                assert connection.recv(12) == b"HTTP/1.1 200"
                connection.sendall(b"GET /health HT")
        assert client.ask("GET", "/health").status == 200
        for connection in idle:
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
        assert 1.4 < time.monotonic() - began < 8


# Those that are refused in the midst of sending.


def by_http_client(client: Client, body: bytes, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
    with closing(connection):
        connection.request("POST", CHAT, body, headers)
        return connection.getresponse().status


def by_urllib(client: Client, body: bytes, headers: dict[str, str]) -> int:
    url = f"{client.url}/chat/completions"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as got:
            return got.status
    except urllib.error.HTTPError as error:
        with error:
            assert set(json.loads(error.read())) == {"error"}
            return error.code


@pytest.mark.parametrize("ask", [by_http_client, by_urllib])
@pytest.mark.parametrize(
    ("status", "headers"),
    [(413, {}), (415, {"Content-Type": "text/plain"}), (403, {"Origin": "http://evil.example"})],
)
def test_a_refusal_arrives(
    ask: Callable[[Client, bytes, dict[str, str]], int], status: int, headers: dict[str, str]
) -> None:
    """Also at a client that sends everything before it reads."""
    with serving(FakeBackend(), ServerSettings(max_body_bytes=1_000_000)) as client:
        for _ in range(5):
            assert ask(client, bytes(20_000_000), {**JSON, **headers}) == status
        assert client.chat().status == 200


def test_who_is_refused_cannot_send_for_ever() -> None:
    with serving(FakeBackend(), ServerSettings(max_body_bytes=1_000, header_timeout=1)) as client:
        with connected(client) as endless, pytest.raises(OSError):
            endless.sendall(announced(1 << 40))
            until = time.monotonic() + 10
            while time.monotonic() < until:
                endless.sendall(bytes(100_000))
                time.sleep(0.01)


# Those that do not take their answer.

LONG = {"max_tokens": 4096, "stream": True}


def never_reading(client: Client, body: dict[str, Any]) -> socket.socket:
    """Of a request whose answer is megabytes long."""
    found = connected(client)
    data = json.dumps(body).encode()
    found.sendall(announced(len(data)) + data)
    return found


def unread(connection: socket.socket) -> int:
    """Bytes that wait in the system's buffer."""
    return int.from_bytes(fcntl.ioctl(connection, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_who_never_reads_keeps_no_room_once_the_answer_is_made() -> None:
    backend = FakeBackend(pieces=["x" * 4096] * 4096, limits=Limits(active=4, waiting=4))
    settings = ServerSettings(max_body_bytes=1_000_000, max_held_bytes=1_000_000)
    ask = {"messages": [{"role": "user", "content": "x" * 900_000}], **LONG}
    with serving(backend, settings) as client, ExitStack() as opened:
        for _ in range(2):
            opened.enter_context(never_reading(client, ask))
            wait_for(lambda: client.ask("GET", "/metrics").status == 200)
            wait_for(lambda: client.ask("GET", "/health").json["active"] == 0)
        reply = client.chat("x" * 900_000, max_tokens=1)
        assert reply.status == 200 and reply.seconds < 2


@pytest.mark.parametrize("stream", [True, False])
def test_who_never_reads_is_cut_off(stream: bool) -> None:
    backend = FakeBackend(pieces=["x" * 4096] * 4096)
    with serving(backend, ServerSettings(header_timeout=1)) as client:
        with never_reading(client, {**QUESTION, **LONG, "stream": stream}) as one:
            waiting, since = 0, time.monotonic()
            while not waiting or time.monotonic() - since < 2:  # until no more comes
                time.sleep(0.05)
                if (more := unread(one)) > waiting:
                    waiting, since = more, time.monotonic()
                assert time.monotonic() - since < 30
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while data := one.recv(1 << 20):
                    got += len(data)
            assert got < 8 << 20  # of 16: what lay in the buffers of the system
        with never_reading(client, {**QUESTION, **LONG, "stream": stream}) as slow:
            got, began = 0, time.monotonic()
            while got < 16 << 20:
                data = slow.recv(1 << 17)
                got += len(data)
                assert data, f"cut off after {got} bytes"
                if time.monotonic() - began < 2:
                    time.sleep(0.03)


# All of them at once.


def test_there_are_so_many_connections_and_health_has_one_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    most = 8
    backend = FakeBackend(delay=0.05, pieces="a" * 4000, limits=Limits(active=4, waiting=64))
    caplog.set_level(logging.WARNING)
    with (
        serving(backend, ServerSettings(max_connections=most)) as client,
        ExitStack() as opened,
    ):
        slow = [connected(client, opened) for _ in range(3 * most)]
        for number, one in enumerate(slow):
            with contextlib.suppress(OSError):
                one.sendall((b"", b"POST /v1", announced(50_000) + b"{")[number % 3])
        assert client.chat(max_tokens=1).status == 200  # in the place of a slow one
        busy = [
            opened.enter_context(closing(client.begin("POST", CHAT, {**QUESTION, **LONG})))
            for _ in range(most)
        ]
        wait_for(lambda: sum(taken(client)) == most)
        for _ in range(3):
            refused = client.chat(max_tokens=1)
            assert refused.status == 429 and refused.headers["retry-after"]
            assert "too many requests" in refused.json["error"]["message"]
            assert client.ask("GET", "/health").status == 200
        more = [connected(client, opened) for _ in range(3 * connections.HEALTH_CONNECTIONS)]
        assert more and client.ask("GET", "/health").status == 200
        for one in busy[:2]:
            one.close()
        wait_for(lambda: sum(taken(client)) == most - 2)
        assert client.ask("GET", "/v1/models").status == 200
    full = [record for record in caplog.records if "connections are open" in record.message]
    assert len(full) == 1 and len(caplog.records) == 1


def taken(client: Client) -> tuple[int, int]:
    health = client.ask("GET", "/health").json
    return health["active"], health["waiting"]
