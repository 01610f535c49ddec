"""Hosts that were allowed, and that never come to an end: for a request to a host of this package,
and for a command or a program that names an address itself.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_onevision.errors import MediaError
from mlx_onevision.media import sources
from mlx_onevision.media.deadline import Deadline
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import Media
from mlx_onevision.plugins.service import download as module
from mlx_onevision.plugins.service.media_policy import MediaPolicy

Fetch = Callable[[str], str]
Talk = Callable[[Callable[[bytes], None]], None]

OK = b"HTTP/1.1 200 OK\r\n"


def dripping(head: bytes, drop: bytes = b"a") -> Talk:
    def talk(send: Callable[[bytes], None]) -> None:
        send(head)
        while True:
            time.sleep(0.02)
            send(drop)

    return talk


def silent(send: Callable[[bytes], None]) -> None:
    time.sleep(30)


def moved(send: Callable[[bytes], None]) -> None:
    time.sleep(0.3)
    send(b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n")


NEVER_DONE: dict[str, Talk] = {
    "status": dripping(b"HTTP/1.1 200 "),
    "head": dripping(OK + b"X-A: "),
    "heads": dripping(OK, b"X-A: b\r\n"),
    "continue": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": dripping(OK + b"Content-Length: 9999\r\n\r\n"),
    "body without a length": dripping(OK + b"\r\n"),
    "chunks": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "length of a chunk": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "redirects": moved,
    "silence": silent,
}


@contextmanager
def host(talk: Talk) -> Iterator[tuple[int, list[socket.socket]]]:
    """Speaks so to everybody; its port, and the connections that it has."""
    listening = socket.create_server(("127.0.0.1", 0))
    open_ones: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        try:
            with connection:
                connection.recv(65536)
                talk(connection.sendall)
        except OSError:
            pass
        finally:
            open_ones.remove(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            open_ones.append(connection)
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listening:
        yield listening.getsockname()[1], open_ones
        listening.shutdown(socket.SHUT_RDWR)


def by_policy(address: str) -> str:
    """What the refusal of a request says."""
    policy = MediaPolicy(hosts=[address.partition("//")[2].partition("/")[0]], private=True)
    with pytest.raises(PluginError) as raised:
        policy.open(Media("image", url=address))
    assert raised.value.code == "unsupported_media"
    return raised.value.message


def by_command(address: str) -> str:
    with pytest.raises(MediaError) as raised:
        sources.download(address)
    return str(raised.value)


@pytest.fixture(params=[by_policy, by_command])
def fetch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Either way, with a second for all of it."""
    monkeypatch.setenv("no_proxy", "*")
    for program in (module, sources):
        monkeypatch.setattr(program, "DEADLINE", 1.0)
    return request.param


@pytest.mark.parametrize("name", NEVER_DONE)
def test_the_deadline_holds_over_everything(
    name: str, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "redirects":
        monkeypatch.setattr(module, "MAX_REDIRECTS", 100)
    with host(NEVER_DONE[name]) as (port, connections):
        began = time.monotonic()
        message = fetch(f"http://127.0.0.1:{port}/a")
        assert 0.9 < time.monotonic() - began < 3
        assert f"127.0.0.1:{port}" in message and message.endswith("not done after 1 seconds")
        until = time.monotonic() + 5
        while name != "silence" and connections and time.monotonic() < until:
            time.sleep(0.01)
        assert name == "silence" or not connections  # it was cut, not left open


def test_a_greeting_that_never_ends_is_cut(fetch: Fetch) -> None:
    """TLS: records that are no handshake's end, and silence."""
    for talk in (dripping(b"\x16\x03\x03\x3f\xff"), silent):
        with host(talk) as (port, _):
            began = time.monotonic()
            assert "not done after 1 seconds" in fetch(f"https://127.0.0.1:{port}/a")
            assert time.monotonic() - began < 3


def test_a_name_that_is_looked_up_for_ever(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        ended.wait(20)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    assert "not done after 1 seconds" in fetch("http://127.0.0.1:9/a")
    assert time.monotonic() - began < 3
    ended.set()


def test_descriptors_are_given_back(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (module, sources):
        monkeypatch.setattr(program, "DEADLINE", 0.2)
    with host(dripping(OK)) as (port, connections):
        fetch(f"http://127.0.0.1:{port}/a")
        while connections:
            time.sleep(0.01)
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            fetch(f"http://127.0.0.1:{port}/a")
        while connections:
            time.sleep(0.01)
        assert len(os.listdir("/dev/fd")) <= before


def test_a_connection_that_is_made_too_late_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.create_connection

    def late(*arguments: Any, **options: Any) -> socket.socket:
        connected = connect(*arguments, **options)
        time.sleep(0.3)
        return connected

    monkeypatch.setattr(socket, "create_connection", late)
    with host(silent) as (port, _), Deadline(0.1) as deadline, pytest.raises(TimeoutError):
        deadline.connect("127.0.0.1", port, 5.0)


def test_the_body_of_a_redirect_is_not_read(fetch: Fetch) -> None:
    sent: list[int] = []

    def talk(send: Callable[[bytes], None]) -> None:
        if sent:  # the second request
            return send(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        send(b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n")
        sent.append(0)
        while sum(sent) < 1 << 30:
            send(bytes(1 << 20))
            sent.append(1 << 20)

    with host(talk) as (port, _):
        assert "answers 404" in fetch(f"http://127.0.0.1:{port}/a")
    assert sum(sent) < 100 << 20  # what sockets hold by themselves
