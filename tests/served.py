"""A server of the tests: the real one, on a free port of this machine, in a thread; and a backend
for it that has every capability and keeps what it was asked.
"""

import base64
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.results import (
    GenerateResult,
    ModelInfo,
    TextEvent,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream
from mlx_onevision.plugins.hosts.http import server as running
from mlx_onevision.plugins.hosts.http.app import create_app
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend

JSON = {"Content-Type": "application/json"}
EXAMPLES = Path(__file__).parents[1] / "examples"


def data_uri(name: str, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(EXAMPLES.joinpath(name).read_bytes()).decode()}"


PICTURE = data_uri("shapes.png", "image/png")
VIDEO = data_uri("circle.mp4", "video/mp4")


def image(url: Any = PICTURE) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def video(url: Any = VIDEO) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What the data lines hold, the comments left out."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass(frozen=True)
class Client:
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def begin(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPConnection:
        """A request that is sent and whose answer is not waited for."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, data, {**(JSON if data else {}), **(headers or {})})
        return connection

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Reply:
        began = time.monotonic()
        connection = self.begin(method, path, body, headers)
        try:
            answer = connection.getresponse()
            data = answer.read()
            took = time.monotonic() - began
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, data, took)
        finally:
            connection.close()

    def chat(self, content: Any = "hi", **fields: Any) -> Reply:
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return self.ask("POST", "/v1/chat/completions", body)


@contextmanager
def serving(backend: Backend, settings: ServerSettings | None = None) -> Iterator[Client]:
    settings = settings or ServerSettings()
    with backend, running.listening(settings, 0) as listening:
        server = running.Server(create_app(backend, settings), settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Client(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 10.0) -> None:
    """Until something holds; fails when it does not come to."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to hold"
        time.sleep(0.005)


# A backend that has every capability.


WORDS = ("a ", "é", " b")


class ScriptedBackend(FakeBackend):
    """words : the answer, a token each."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.asked: list[GenerateRequest] = []
        self.words = tuple(words)
        super().__init__()

    def info(self) -> ModelInfo:
        known = super().info()
        able = dict.fromkeys((*known.capabilities, "logprobs", "json_schema"))
        return replace(known, capabilities=tuple(able))

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        self.asked.append(request)
        return super().generate(request)

    def _load(self) -> "ScriptedBackend._Scripted":
        return ScriptedBackend._Scripted(self)

    class _Scripted(FakeBackend._Model):
        def __init__(self, owner: "ScriptedBackend") -> None:
            super().__init__(owner)
            self._words = owner.words

        def generate(self, request: GenerateRequest, channel: Channel) -> GenerateResult:
            said = self._words[: request.max_tokens]
            told = [_token(word, request.logprobs) for word in said]
            for word, token in zip(said, told, strict=True):
                channel.put(TextEvent(word, logprobs=(token,) if token else ()))
            tokens = tuple(token for token in told if token)
            return GenerateResult(
                "".join(said),
                "stop" if said == self._words else "length",
                Usage(prompt_tokens=7, completion_tokens=len(said)),
                logprobs=None if request.logprobs is None else tokens,
            )


def _token(word: str, top: int | None) -> TokenLogprob | None:
    if top is None:
        return None
    others = [TopLogprob(f"{word}{n}", f"{word}{n}".encode(), -1.0 - n) for n in range(top)]
    return TokenLogprob(word, word.encode(), -0.25, tuple(others))
