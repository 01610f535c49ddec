"""The client's side of the contract over HTTP: what is sent, and whatever a server may do."""

import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from served import EXAMPLES, Client, serving, wait_for

from mlx_onevision.plugins.adapters import http
from mlx_onevision.plugins.adapters.fake import MODEL_INFO, VECTOR_DIM, FakeBackend
from mlx_onevision.plugins.adapters.http import HttpBackend
from mlx_onevision.plugins.adapters.http_call import Call, Server
from mlx_onevision.plugins.contract.errors import CODES, PluginError
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import (
    DescribeRequest,
    EmbedRequest,
    EventStream,
    GenerateRequest,
    Group,
    Media,
    Message,
    ProgressEvent,
    TokenBias,
)
from mlx_onevision.plugins.service.media_policy import MediaPolicy

PICTURE = EXAMPLES / "shapes.png"
VIDEO = EXAMPLES / "circle.mp4"


class Recorder(FakeBackend):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def _start(self, request: Any, kind: Any) -> EventStream[Any]:
        self.asked.append(request)
        return super()._start(request, kind)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def server(recorder: Recorder) -> Iterator[Client]:
    with serving(recorder) as client:
        yield client


@pytest.fixture
def backend(server: Client) -> Iterator[HttpBackend]:
    policy = MediaPolicy(folders=[EXAMPLES])
    with HttpBackend(url=server.url, policy=policy) as found:
        yield found


@contextmanager
def canned(answer: bytes) -> Iterator[str]:
    """A server that says this to whatever it is sent, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # what is not read would reset the connection
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(10)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def stream_of(*chunks: str) -> bytes:
    return STREAM + "".join(f"data: {c}\n\n" for c in chunks).encode()


def test_a_question_arrives_as_it_was_asked(backend: HttpBackend, recorder: Recorder) -> None:
    picture, video = Media("image", path=str(PICTURE)), Media("video", path=str(VIDEO))
    messages = [
        Message("user", [picture, "What is this?", video]),
        Message("assistant", "A circle."),
        Message("user", ["And", "now?"]),
    ]
    given: dict[str, Any] = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": (TokenBias(5, -1.5),),
        "seed": 2**64 - 1,
        "stop": ("a", "\n"),
        "num_frames": 4,
        "start": 0.5,
        "end": 1.5,
        "tiling": "never",
        "order": "given",
        "timeout": 9.0,
    }
    left = {"messages", "system", "fps", "logprobs", "json_schema"}
    assert {field.name for field in fields(GenerateRequest)} == given.keys() | left
    backend.generate(GenerateRequest(messages, "Be brief.", **given)).result()
    asked = recorder.asked[-1]
    assert {name: getattr(asked, name) for name in given} == given
    system, *rest = asked.messages
    assert system == Message("system", ["Be brief."])
    shown = rest[0].content
    assert [getattr(part, "kind", part) for part in shown] == ["image", "What is this?", "video"]
    policy = MediaPolicy()
    assert policy.open(shown[0]) == PICTURE.read_bytes()
    assert policy.open(shown[2]) == VIDEO.read_bytes()
    assert rest[1:] == [Message("assistant", ["A circle."]), messages[2]]
    backend.generate(GenerateRequest.ask("hi", fps=2.0)).result()
    assert recorder.asked[-1] == GenerateRequest([Message("user", ["hi"])], fps=2.0)


def test_the_other_requests_arrive_too(backend: HttpBackend, recorder: Recorder) -> None:
    video = Media("video", data=VIDEO.read_bytes())
    request = DescribeRequest(video, segments=5.0, longest=None, start=1.0, seed=3, system="Rhyme.")
    result = backend.describe_video(request).result()
    assert replace(recorder.asked[-1], video=video) == request and len(result.segments) == 6
    picture = Media("image", data=PICTURE.read_bytes())
    wanted = EmbedRequest(
        ["a", picture, Group([picture, picture])], space="joint", normalize=False, tiling="always"
    )
    found = backend.embed(wanted)
    asked = recorder.asked[-1]
    assert replace(asked, items=wanted.items) == wanted
    assert asked.items[0] == "a" and isinstance(asked.items[2], Group)
    own = recorder.embed(wanted)
    assert replace(found, vectors=()) == replace(own, vectors=())
    for vector, same in zip(found.vectors, own.vectors, strict=True):
        assert vector == pytest.approx(same, abs=1e-4)  # float32 of numbers up to 128
    assert backend.embed(EmbedRequest([])).dim == VECTOR_DIM


def test_many_items_go_in_groups(
    backend: HttpBackend, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_ITEMS_PER_REQUEST", 3)
    before = len(recorder.asked)
    stream = backend.stream_embed(EmbedRequest([f"text {n}" for n in range(8)], space="joint"))
    assert len(stream.result().vectors) == 8
    assert [len(asked.items) for asked in recorder.asked[before:]] == [3, 3, 2]
    steps = [event for event in stream if isinstance(event, ProgressEvent) and event.total]
    assert [(step.done, step.total) for step in steps] == [(0, 8), (3, 8), (6, 8)]
    broken = Media("image", data=b"no picture")
    with pytest.raises(PluginError, match=r"^item 5: ") as raised:
        backend.embed(EmbedRequest(["a"] * 4 + [broken], space="joint"))
    assert raised.value.code == "unsupported_media"
    monkeypatch.setattr(http, "MAX_BYTES_PER_REQUEST", 100)
    assert len(backend.embed(EmbedRequest(["a" * 60] * 3, space="joint")).vectors) == 3
    assert len(recorder.asked[-1].items) == 1


def test_no_group_has_more_media_than_a_server_takes(server: Client, recorder: Recorder) -> None:
    picture = Media("image", data=PICTURE.read_bytes())
    video = Media("video", data=VIDEO.read_bytes())
    ten = Group([picture] * 10)
    before = len(recorder.asked)
    with HttpBackend(url=server.url, policy=MediaPolicy(images=100, videos=10)) as backend:
        items = [*[picture] * 17, ten, video, "a", video]
        vectors = backend.embed(EmbedRequest(items, space="joint")).vectors
    assert [len(asked.items) for asked in recorder.asked[before:]] == [16, 4, 1]
    assert len(vectors) == len(items)


def test_files_are_read_where_the_policy_allows(backend: HttpBackend, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(PICTURE.read_bytes())
    for medium in (Media("image", path=str(outside)), Media("image", url="http://127.0.0.1:9/")):
        stream = backend.generate(GenerateRequest.ask("what?", medium))
        assert stream.ended
        with pytest.raises(PluginError, match="not allowed"):
            stream.result()
    with HttpBackend(url="http://127.0.0.1:9", policy=MediaPolicy(folders=[tmp_path], size=9)) as b:
        video = Media("video", path=str(outside))
        with pytest.raises(PluginError) as raised:
            b.describe_video(DescribeRequest(video)).result()
        assert raised.value.code == "too_large"


def test_token_and_model(recorder: Recorder) -> None:
    with serving(FakeBackend(), ServerSettings(token="secret", model="one")) as client:
        plain = client.url.removesuffix("/v1")
        with HttpBackend(url=plain, token="secret", model="one") as backend:
            info = backend.info()
            assert info == replace(MODEL_INFO, id="one", loaded=info.loaded)
            assert backend.generate(GenerateRequest.ask("hi")).result().text.startswith("hi")
        for token, model in ((None, None), ("wrong", None), ("secret", "two")):
            with HttpBackend(url=f"{plain}/", token=token, model=model) as backend:
                for ask in (backend.info, backend.generate(GenerateRequest.ask("hi")).result):
                    with pytest.raises(PluginError) as raised:
                        ask()
                    code = "model_not_found" if model else "bad_request"
                    assert raised.value.code == code and raised.value.hint


@pytest.mark.parametrize("settings", [{"url": "nowhere"}, {"url": "http://a", "token": "a\nb"}])
def test_what_is_no_server(settings: dict[str, Any]) -> None:
    with pytest.raises(PluginError) as raised:
        HttpBackend(**settings)
    assert raised.value.code == "bad_request"


def test_nobody_there() -> None:
    with HttpBackend(url="http://127.0.0.1:9") as backend:
        for ask in (backend.info, backend.generate(GenerateRequest.ask("hi")).result):
            with pytest.raises(
                PluginError, match=r"127\.0\.0\.1:9 .*refused.*; start one"
            ) as raised:
                ask()
            assert raised.value.code == "model_not_found"


GOOD = '{"choices": [{"delta": {"content": "a"}}]}'


@pytest.mark.parametrize("answer", [STREAM, stream_of(GOOD, "[DONE]")])
def test_a_broken_answer_keeps_nothing_of_its_request(answer: bytes) -> None:
    with canned(answer) as url, HttpBackend(url=url) as backend:
        request = GenerateRequest.ask("hi")
        left = weakref.ref(request)
        with pytest.raises(PluginError, match="broke off"):
            backend.generate(request).result()
        del request
        wait_for(lambda: gc.collect() >= 0 and left() is None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "broke off"),
        (b"SSH-2.0\r\n", "broke off"),
        (STREAM, "broke off"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "no stream of events; check"),
        (b"HTTP/1.1 404 Not Found\r\n\r\nnothing", "answers 404; check"),
        (b'HTTP/1.1 502 Bad\r\n\r\n{"error": 5}', "answers 502; check"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\n\r\n", "answers 302; check"),
        (stream_of(GOOD), "broke off"),
        (stream_of(GOOD, "[DONE]"), "broke off"),
        (stream_of(GOOD, "{"), "cannot be read"),
        (stream_of("{}"), "cannot be read"),
        (stream_of('{"choices": [5]}'), "cannot be read"),
        (stream_of('{"error": {"message": "it failed; later", "code": "busy"}}'), "it failed"),
        (stream_of('{"error": "x"}'), "cannot be read"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: text/event-stream\r\n\r\n5\r\ndata",
            "broke off",
        ),
    ],
)
def test_a_server_that_breaks_off_or_is_another(answer: bytes, said: str) -> None:
    with canned(answer) as url, HttpBackend(url=url) as backend:
        stream = backend.generate(GenerateRequest.ask("hi"))
        with pytest.raises(PluginError, match=said) as raised:
            stream.result()
        assert raised.value.code == ("busy" if "failed" in said else "internal")


@pytest.mark.parametrize("body", ["{}", '{"data": []}', '{"data": [{"id": "gpt"}]}', "[1]", "no"])
def test_another_servers_models(body: str) -> None:
    with canned(f"HTTP/1.1 200 OK\r\n\r\n{body}".encode()) as url:
        with HttpBackend(url=url) as backend, pytest.raises(PluginError, match="check that mlx"):
            backend.info()


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(PluginError, match="broke off"):
            Call(Server(url), read_timeout=0.1).ask("GET", "/v1/models")
        with HttpBackend(url=url, timeout=0.3) as backend:
            with pytest.raises(PluginError, match=r"0\.3 seconds") as raised:
                backend.generate(GenerateRequest.ask("hi")).result()
            assert raised.value.code == "cancelled"
            stream = backend.generate(GenerateRequest.ask("hi"))
            time.sleep(0.05)
            stream.cancel()
            with pytest.raises(PluginError, match="was cancelled"):
                stream.result()
            wait_for(lambda: not requests())  # nobody waits for it any more


def test_a_refusal_is_read_though_the_server_does_not_take_all_of_it(backend: HttpBackend) -> None:
    large = Media("image", data=PICTURE.read_bytes() + bytes(26 << 20))
    with pytest.raises(PluginError, match=r"more than 32\.0 MB; send less") as raised:
        backend.generate(GenerateRequest.ask("what?", large)).result()
    assert raised.value.code == "too_large"


def test_closing_leaves_nothing_behind(server: Client) -> None:
    backend = HttpBackend(url=server.url)
    streams = [backend.generate(GenerateRequest.ask("word " * 2000)) for _ in range(8)]
    backend.close()
    for stream in streams:
        assert stream.ended
    wait_for(lambda: not requests())
    wait_for(lambda: server.ask("GET", "/health").json["active"] == 0)


def test_errors_come_back_as_they_went() -> None:
    fake = FakeBackend(fail_at=1)
    with serving(fake) as client, HttpBackend(url=client.url) as backend:
        for code in CODES:
            fake._error = error = PluginError(code, "this went wrong", "do that instead")
            with pytest.raises(PluginError) as raised:
                backend.generate(GenerateRequest.ask("one two three")).result()
            assert raised.value.to_dict() == error.to_dict()


def requests() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "mlx-onevision-request"]
