"""Many clients at once, each with a question of its own and the answer that only it may get."""

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from served import Client
from videos import encode_video

CHAT, RESPONSES, EMBED = "/v1/chat/completions", "/v1/responses", "/v1/embeddings"

COLOURS = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (37, 99, 235),
    "yellow": (250, 220, 30),
    "orange": (249, 115, 22),
    "purple": (147, 51, 234),
    "black": (20, 20, 20),
}
KINDS = ("circle", "square", "triangle")
BACKGROUND = (244, 241, 234)


def drawn(number: int, size: tuple[int, int] = (240, 160), shift: float = 0.0) -> Image.Image:
    """One of some hundred pictures: two shapes of two colours, side by side.

    shift : how far the left one has come down, 0 to 1.
    """
    image = Image.new("RGB", (size[0] * 4, size[1] * 4), BACKGROUND)
    pen = ImageDraw.Draw(image)
    names = list(COLOURS)
    kind, other = KINDS[number % 3], KINDS[number // 3 % 3]
    colour = names[number // 9 % len(names)]
    beside = names[(number // 9 + 1 + number // (9 * len(names))) % len(names)]
    for place, (shape, fill) in enumerate(((kind, colour), (other, beside))):
        x = image.width * (0.27 + 0.46 * place)
        y = image.height * (0.5 if place else 0.4 + 0.3 * shift)
        r = image.height * 0.24
        if shape == "circle":
            pen.circle((x, y), r, fill=COLOURS[fill])
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[fill])
        else:
            points = [(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)]
            pen.polygon(points, fill=COLOURS[fill])
    return image.resize(size, Image.Resampling.LANCZOS)


def picture(number: int) -> bytes:
    out = io.BytesIO()
    drawn(number).save(out, "png")
    return out.getvalue()


def clip(number: int) -> bytes:
    """Half a second of it, in motion."""
    return encode_video((np.asarray(drawn(number, (120, 80), n / 11)) for n in range(12)), rate=24)


@dataclass(frozen=True)
class PromptRequest:
    """A request, and what of its answer nobody else gets.

    kind : for the figures. path, body : as they are sent.
    """

    kind: str
    path: str
    body: dict[str, Any]

    @property
    def data(self) -> bytes:
        body = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def answer(self, body: bytes) -> str:
        """Text; of vectors their digits. Fails where it is no whole answer."""
        events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
        if self.path == EMBED:
            return json.dumps([item["embedding"] for item in json.loads(body)["data"]])
        if self.path == RESPONSES:
            whole = json.loads(events[-1])["response"] if events else json.loads(body)
            assert whole["status"] == "completed", whole
            return whole["output"][0]["content"][0]["text"]
        if not events:
            return json.loads(body)["choices"][0]["message"]["content"]
        assert events.pop() == "[DONE]", body
        chunks = [json.loads(event) for event in events]
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def questions(count: int) -> list[PromptRequest]:
    """Of every kind, each with a picture or a text of its own."""
    return [_KINDS[number % len(_KINDS)](number) for number in range(count)]


def uri(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _about(part: dict[str, Any], stream: bool) -> dict[str, Any]:
    content = [part, {"type": "text", "text": "What is in the image?"}]
    return {"messages": [{"role": "user", "content": content}], "stream": stream}


def _shown(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(picture(number), "image/png")}}


def _streamed(number: int) -> PromptRequest:
    return PromptRequest("image, streamed", CHAT, _about(_shown(number), True))


def _whole(number: int) -> PromptRequest:
    return PromptRequest("image, whole", CHAT, _about(_shown(number), False))


def _response(number: int) -> PromptRequest:
    content = [
        {"type": "input_image", "image_url": uri(picture(number), "image/png")},
        {"type": "input_text", "text": "What is in the image?"},
    ]
    body = {"input": [{"role": "user", "content": content}], "stream": number % 2 == 0}
    return PromptRequest("image, response", RESPONSES, body)


def _described(number: int) -> PromptRequest:
    part = {"type": "video_url", "video_url": {"url": uri(clip(number), "video/mp4")}}
    return PromptRequest("video", CHAT, {**_about(part, number % 2 == 0), "num_frames": 2})


def _vector(number: int) -> PromptRequest:
    body = {"input": [_shown(number)], "space": "vision"}
    return PromptRequest("vectors", EMBED, body)


def _said(number: int) -> PromptRequest:
    messages = [{"role": "user", "content": f"How many {list(COLOURS)[number % 7]} {number}?"}]
    return PromptRequest("text", CHAT, {"messages": messages, "stream": number % 2 == 0})


_KINDS = (_streamed, _whole, _said, _response, _vector, _described)


@dataclass(frozen=True)
class Heard:
    """An answer; how long its status took from when the request was sent, and all of it."""

    status: int
    headers: dict[str, str]
    body: bytes
    until_status: float
    seconds: float


class Peer:
    """A client with one open connection, in asyncio."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._rest = b""

    async def open(self) -> "Peer":
        await asyncio.get_running_loop().sock_connect(self._socket, ("127.0.0.1", self._port))
        return self

    def close(self) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def ask(self, data: bytes) -> Heard:
        await self.send(data)
        return await self.hear()

    async def hear(self) -> Heard:
        """The next answer."""
        sent = time.monotonic()
        await self._until(lambda: b"\r\n" in self._rest)
        until_status = time.monotonic() - sent
        await self._until(lambda: b"\r\n\r\n" in self._rest)
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        body = await (self._chunks() if "transfer-encoding" in headers else self._length(headers))
        took = time.monotonic() - sent
        return Heard(int(first.split()[1]), headers, body, until_status, took)

    async def some(self, count: int) -> bytes:
        """What comes, until there is so much of it."""
        await self._until(lambda: len(self._rest) >= count)
        return self._rest

    async def _length(self, headers: dict[str, str]) -> bytes:
        length = int(headers["content-length"])
        await self._until(lambda: len(self._rest) >= length)
        body, self._rest = self._rest[:length], self._rest[length:]
        return body

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            await self._until(lambda: b"\r\n" in self._rest)
            size, _, self._rest = self._rest.partition(b"\r\n")
            length = int(size, 16)
            await self.some(length + 2)
            body += self._rest[:length]
            self._rest = self._rest[length + 2 :]
            if not length:
                return body

    async def _until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            data = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 20)
            assert data, "the server hung up"
            self._rest += data


@contextmanager
def command(
    *arguments: str, program: Sequence[str] = ("-m", "mlx_onevision")
) -> Iterator[tuple["subprocess.Popen[str]", Client]]:
    """``mlx-onevision serve`` in a process of its own, on a free port. It is killed at the end, if
    it still lives.

    program : what Python runs.
    """
    server = subprocess.Popen(
        [sys.executable, *program, "serve", "--port", "0", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if line.startswith("Serving at http://"):
                yield server, Client(int(line.split("/v1")[0].rpartition(":")[2]))
                return
        raise AssertionError("it did not begin to serve")
    finally:
        server.kill()
        server.communicate()


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def spread(seconds: Sequence[float]) -> str:
    shares = (0.5, 0.9, 0.99, 1.0)
    told = [f"p{100 * share:.0f} {1000 * percentile(seconds, share):.0f}" for share in shares]
    return f"{len(seconds)} times, ms: {', '.join(told)}"


def table(title: str, rows: Mapping[str, str]) -> None:
    """Figures for who runs the tests; ``pytest -s`` or a failure shows them."""
    print(f"\n{title}")
    for name, figure in rows.items():
        print(f"  {name:<42} {figure}")
