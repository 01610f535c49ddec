"""Clients that leave, at every stage of their request: the model stops working for them, at once,
and the next one is served.
"""

import contextlib
import http.client
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from changed_checkpoints import endless
from crowding import CHAT, EMBED, RESPONSES, percentile, picture, spread, table, uri
from hostile.sizes import cases
from served import Client, serving, wait_for

from mlx_onevision.engine import pooling
from mlx_onevision.engine.request import ActiveRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.service import Limits

pytestmark = pytest.mark.measured

TIMES = cases(3, 200)  # of each stage
SECONDS, TOKENS = 1.0, 2  # until the model stops, one or the other
SERVED_SECONDS = 2.0

LONG = {"max_tokens": 2000, "temperature": 1.0, "seed": 1}


@dataclass
class WorkRecorder:
    """What the engine does, seen where it does it."""

    tokens: list[float] = field(default_factory=list)
    """When each token was handed over."""
    prefills: list[float] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)
    """When images went through the tower for their vectors."""


@pytest.fixture(scope="module")
def watch() -> Iterator[WorkRecorder]:
    found = WorkRecorder()
    put, prefill, embed = ActiveRequest.accept, Runner._tokens, pooling.tile_vectors
    with pytest.MonkeyPatch.context() as patch:

        def counted(self: ActiveRequest, token: int) -> None:
            found.tokens.append(time.monotonic())
            put(self, token)

        def began(self: Runner, *args: Any) -> Any:
            found.prefills.append(time.monotonic())
            return prefill(self, *args)

        def seen(*args: Any) -> Any:
            found.tiles.append(time.monotonic())
            return embed(*args)

        patch.setattr(ActiveRequest, "accept", counted)
        patch.setattr(Runner, "_tokens", began)
        patch.setattr(pooling, "tile_vectors", seen)
        yield found


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, watch: WorkRecorder) -> Backend:
    folder = endless(tmp_path_factory.mktemp("endless") / "model")
    return open_backend("engine", model=folder, limits=Limits(active=1, waiting=4))


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[Client]:
    with serving(backend) as found:
        found.chat("hello", max_tokens=2)  # loads the model
        yield found


def asked(stream: bool, content: Any = "Tell a very long story.", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "stream": stream, **LONG, **fields}


def leave(connection: http.client.HTTPConnection, number: int) -> None:
    """Every other client says good-bye; the rest vanish."""
    assert connection.sock is not None
    if number % 2:
        linger = struct.pack("ii", 1, 0)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.sock.close()
    connection.close()


def idle(backend: Backend) -> bool:
    info = backend.info()
    return info.active == info.waiting == 0


class Figures:
    """How long the model worked on, each time, and how long the next one had to wait."""

    def __init__(self, client: Client, backend: Backend, watch: WorkRecorder) -> None:
        self._client, self._backend, self._watch = client, backend, watch
        self.stopped: list[float] = []
        self.tokens: list[int] = []
        self.served: list[float] = []

    def left(self, connection: http.client.HTTPConnection, number: int, before: int = 0) -> None:
        """The client goes now; ``before`` requests of others stay."""
        gone = time.monotonic()
        leave(connection, number)

        def ended() -> bool:
            info = self._backend.info()
            return info.active + info.waiting == before

        wait_for(ended, 20)
        self.stopped.append(time.monotonic() - gone)
        if not before:
            self.tokens.append(sum(at > gone for at in self._watch.tokens))
            self.next()

    def next(self) -> None:
        reply = self._client.chat("hello", max_tokens=2)
        assert reply.status == 200
        self.served.append(reply.seconds)

    def check(self, stage: str) -> None:
        rows = {"until it was over": spread(self.stopped)}
        if self.tokens:
            rows["tokens after it left"] = f"most {max(self.tokens)}, all {sum(self.tokens)}"
        rows["the next is served"] = spread(self.served)
        table(f"{len(self.stopped)} clients left {stage}", rows)
        assert len(self.stopped) == TIMES
        # While a prompt is read there are no tokens, so there it is the seconds that say it.
        assert percentile(self.stopped, 0.9) <= SECONDS
        for place, seconds in enumerate(self.stopped):
            assert seconds <= SECONDS or (self.tokens and self.tokens[place] <= TOKENS)
        assert max(self.served) <= SERVED_SECONDS


@pytest.fixture
def figures(client: Client, backend: Backend, watch: WorkRecorder) -> Iterator[Figures]:
    wait_for(lambda: idle(backend))
    yield Figures(client, backend, watch)
    wait_for(lambda: idle(backend))


@pytest.mark.parametrize("path", [CHAT, EMBED])
def test_in_line(client: Client, backend: Backend, figures: Figures, path: str) -> None:
    with contextlib.closing(client.begin("POST", CHAT, asked(True))) as first:
        wait_for(lambda: backend.info().active == 1)
        for number in range(TIMES):
            body = asked(number % 3 == 0) if path == CHAT else {"input": ["hello"]}
            connection = client.begin("POST", path, body)
            wait_for(lambda: backend.info().waiting == 1)
            figures.left(connection, number, before=1)
        leave(first, 0)
    wait_for(lambda: idle(backend))
    figures.next()
    figures.check(f"in line ({path})")


def test_while_the_prompt_is_read(client: Client, figures: Figures, watch: WorkRecorder) -> None:
    shown = {"type": "image_url", "image_url": {"url": ""}}
    for number in range(TIMES):
        # Another text each time, so that nothing of it has been read before.
        shown["image_url"] = {"url": uri(picture(number), "image/png")}
        content = [shown, {"type": "text", "text": f"{number} " + "red and green " * 400}]
        begun = len(watch.prefills)
        connection = client.begin("POST", CHAT, asked(number % 2 == 0, content))
        wait_for(lambda begun=begun: len(watch.prefills) > begun)
        figures.left(connection, number)
    figures.check("while its prompt was read")


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_in_the_middle_of_a_stream(client: Client, figures: Figures, path: str) -> None:
    for number in range(TIMES):
        body = asked(True)
        if path == RESPONSES:
            body = {"input": "Tell a very long story.", "stream": True, "max_output_tokens": 2000}
        connection = client.begin("POST", path, body)
        answer = connection.getresponse()
        assert answer.status == 200
        while b'"content": "' not in (line := answer.readline()) and b".delta" not in line:
            pass
        answer.read1(200)
        answer.close()
        figures.left(connection, number)
    figures.check(f"in the middle of a stream ({path})")


def test_waiting_for_the_whole(client: Client, figures: Figures, watch: WorkRecorder) -> None:
    for number in range(TIMES):
        said = len(watch.tokens)
        connection = client.begin("POST", CHAT, asked(False))
        wait_for(lambda said=said: len(watch.tokens) >= said + 5)
        figures.left(connection, number)
    figures.check("waiting for the whole answer")


def test_waiting_for_vectors(client: Client, figures: Figures, watch: WorkRecorder) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": uri(picture(number), "image/png")}}
        for number in range(12)
    ]
    for number in range(TIMES):
        seen = len(watch.tiles)
        connection = client.begin("POST", EMBED, {"input": parts, "space": "vision"})
        wait_for(lambda seen=seen: len(watch.tiles) > seen)
        gone = time.monotonic()
        figures.left(connection, number)
        assert all(at <= gone + SECONDS for at in watch.tiles)
    figures.check("waiting for vectors")
