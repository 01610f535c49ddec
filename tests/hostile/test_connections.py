"""The command with as few files as a shell on a Mac allows, and many slow clients of every kind: a
good request is answered all the while, and nothing is written about each of them.
"""

import contextlib
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hostile.sizes import cases
from served import Client, wait_for

pytestmark = pytest.mark.measured

FILES = 256
CLIENTS = cases(300, 1000)
SECONDS = 2.0  # in which a good request is answered

CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def dripped(data: bytes) -> Iterator[bytes]:
    for byte in data:
        yield bytes([byte])


KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "say nothing": lambda: iter(()),
    "send their head slowly": lambda: dripped(HEAD.encode()),
    "send their body slowly": lambda: iter(
        [f"{HEAD}Content-Length: 30000000\r\n\r\n".encode(), *dripped(b"{" * 60)]
    ),
    "send chunks slowly": lambda: iter(
        [f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode(), *[b"1\r\n{\r\n"] * 60]
    ),
    "never read": lambda: iter([get("/openapi.json") * 4]),
    "stay after their answer": lambda: iter([get("/v1/models")]),
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Client, list[str]]]:
    """And the lines that it writes."""
    command = [sys.executable, "-m", "mlx_onevision", "serve", "--port", "0"]
    limited = f'ulimit -n {FILES} && exec "$@"'
    with subprocess.Popen(
        ["sh", "-c", limited, "sh", *command], stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        written: list[str] = []
        stderr = process.stderr
        assert stderr is not None
        reading = threading.Thread(target=lambda: written.extend(stderr))
        reading.start()
        try:
            wait_for(lambda: any("Serving at" in line for line in written), 60)
            (line,) = [line for line in written if "Serving at" in line]
            client = Client(int(line.split("/v1")[0].rpartition(":")[2]))
            assert client.chat(max_tokens=1).status == 200  # loads the model
            yield client, written
        finally:
            process.terminate()
            process.wait(20)
            reading.join()


@pytest.fixture(autouse=True)
def files() -> Iterator[None]:
    """Enough for the clients, which are in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], CLIENTS + 500), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Slow:
    """A client that sends a little at each turn, and reads nothing."""

    def __init__(self, client: Client, sends: Iterator[bytes]) -> None:
        self._sends = sends
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.socket.connect(("127.0.0.1", client.port))

    def turn(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.send(next(self._sends, b""))


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_request_is_answered_throughout(server: tuple[Client, list[str]], kind: str) -> None:
    client, written = server
    before = len(written)
    took: list[float] = []
    with ExitStack() as opened:
        slow: list[Slow] = []
        until = time.monotonic() + cases(1, 30)
        while len(slow) < CLIENTS or time.monotonic() < until:
            for _ in range(min(50, CLIENTS - len(slow))):
                slow.append(Slow(client, KINDS[kind]()))
                opened.enter_context(slow[-1].socket)
            for one in slow:
                one.turn()
            for ask in (lambda: client.chat(max_tokens=1), lambda: client.ask("GET", "/health")):
                reply = ask()
                assert reply.status == 200, reply.body
                took.append(reply.seconds)
    assert max(took) < SECONDS
    wait_for(lambda: client.ask("GET", "/health").json["active"] == 0, 30)
    assert len(written) - before <= 1, written[before:]
    assert not any("Traceback" in line for line in written)
