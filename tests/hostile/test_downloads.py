"""Hosts that were allowed, and that never come to an end."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import Media
from mlx_onevision.plugins.service import download as module
from mlx_onevision.plugins.service.media_policy import MediaPolicy

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


def fetch(port: int, scheme: str = "http") -> str:
    policy = MediaPolicy(hosts=[f"127.0.0.1:{port}"], private=True)
    with pytest.raises(PluginError) as raised:
        policy.open(Media("image", url=f"{scheme}://127.0.0.1:{port}/a"))
    assert raised.value.code == "unsupported_media"
    return raised.value.message


@pytest.mark.parametrize("name", NEVER_DONE)
def test_the_deadline_holds_over_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE", 1.0)
    if name == "redirects":
        monkeypatch.setattr(module, "MAX_REDIRECTS", 100)
    with host(NEVER_DONE[name]) as (port, connections):
        began = time.monotonic()
        message = fetch(port)
        assert 0.9 < time.monotonic() - began < 3
        assert message == f"cannot read from '127.0.0.1:{port}': it was not done after 1 seconds"
        until = time.monotonic() + 5
        while name != "silence" and connections and time.monotonic() < until:
            time.sleep(0.01)
        assert name == "silence" or not connections  # it was cut, not left open


def test_a_greeting_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS: records that are no handshake's end, and silence."""
    monkeypatch.setattr(module, "DEADLINE", 1.0)
    for talk in (dripping(b"\x16\x03\x03\x3f\xff"), silent):
        with host(talk) as (port, _):
            began = time.monotonic()
            assert "it was not done after 1 seconds" in fetch(port, "https")
            assert time.monotonic() - began < 3


def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE", 0.5)
    ended = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        ended.wait(20)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    assert "it was not done after 0 seconds" in fetch(9)
    assert time.monotonic() - began < 2
    ended.set()


def test_descriptors_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE", 0.2)
    with host(dripping(OK)) as (port, connections):
        fetch(port)
        while connections:
            time.sleep(0.01)
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            fetch(port)
        while connections:
            time.sleep(0.01)
        assert len(os.listdir("/dev/fd")) <= before
