"""Streams and connections of the real server: errors, silence, surplus, and clients that leave."""

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import (
    JSON,
    Client,
    serving,
    wait_for,
)

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PluginError("context_overflow", "it is too long"), 400, "context_length_exceeded"),
        (PluginError("out_of_memory", "there is too little memory"), 503, "out_of_memory"),
        (RuntimeError("secret at /home/me"), 500, "internal"),
    ],
)
def test_errors_of_the_backend(error: Exception, status: int, code: str, stream: bool) -> None:
    with serving(FakeBackend(fail_at=0, error=error)) as client:
        reply = client.chat(stream=stream)
        assert (reply.status, reply.json["error"]["code"]) == (status, code)
        assert "secret" not in reply.body.decode()


def test_an_error_in_mid_stream_is_sent_and_the_next_is_served() -> None:
    backend = FakeBackend(fail_at=1, error=PluginError("out_of_memory", "no memory at /a/b"))
    with serving(backend) as client:
        reply = client.chat("one two three", stream=True)
        assert reply.status == 200
        assert reply.events[-1]["error"]["code"] == "out_of_memory"
        assert "/a/b" not in reply.body.decode()
        assert client.chat("one", max_tokens=1).status == 200


def test_a_silent_stream_is_kept_open() -> None:
    settings = ServerSettings(keep_alive_interval=0.05)
    with serving(FakeBackend(pieces=["late"], delay=0.4), settings) as client:
        reply = client.chat(stream=True)
        assert reply.body.startswith(b": keep-alive\n\n") and reply.events[-1] == "[DONE]"
        assert 3 <= reply.body.count(b": keep-alive") <= 10


def test_nothing_waits_for_the_client_to_say_that_it_has_the_last(fake: Client) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    connection = http.client.HTTPConnection("127.0.0.1", fake.port, timeout=30)
    took = []
    for _ in range(20):
        began = time.monotonic()
        connection.request("POST", CHAT, body, JSON)
        connection.getresponse().read()
        took.append(time.monotonic() - began)
    connection.close()
    # Head and body are written one after the other; held back, the second comes 40 ms later.
    assert sorted(took)[10] < 0.03


def test_surplus_is_turned_away_at_once() -> None:
    limits = Limits(active=1, waiting=1)
    with serving(FakeBackend(pieces=["x"] * 60, delay=0.01, limits=limits)) as client:
        first = client.begin("POST", CHAT, {"messages": [{"role": "user", "content": "a"}]})
        wait_for(lambda: client.ask("GET", "/health").json["active"] == 1)
        second = client.begin("POST", CHAT, {"messages": [{"role": "user", "content": "b"}]})
        wait_for(lambda: client.ask("GET", "/health").json["waiting"] == 1)
        for stream in (True, False):
            took = []
            for _ in range(5):
                reply = client.chat("c", stream=stream)
                assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
                assert reply.json["error"]["code"] == "rate_limit_exceeded"
                took.append(reply.seconds)
            assert sorted(took)[2] < 0.1
        assert first.getresponse().status == second.getresponse().status == 200
        first.close()
        second.close()


LONG = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 500}


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_worked_for(stream: bool) -> None:
    backend = FakeBackend(pieces=["x "] * 500, delay=0.03, limits=Limits(active=1))
    with serving(backend) as client:
        for _ in range(5):
            began = backend.steps
            connection = client.begin("POST", CHAT, {**LONG, "stream": stream})
            if stream:
                connection.getresponse().read(1)
            wait_for(lambda began=began: backend.steps >= began + 3)
            connection.sock.close() if connection.sock else connection.close()
            connection.close()
            at_end = backend.steps
            wait_for(lambda: backend.info().active == 0, 2.0)
            assert backend.steps - at_end <= 2
        assert client.chat("y", max_tokens=1).status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_before_the_first_token_and_in_line(stream: bool) -> None:
    backend = FakeBackend(pieces=["x "] * 500, delay=0.5, limits=Limits(active=1))
    with serving(backend) as client:
        for _ in range(5):
            first = client.begin("POST", CHAT, {**LONG, "stream": stream})
            wait_for(lambda: backend.info().active == 1)
            queued = client.begin("POST", CHAT, {**LONG, "stream": stream})
            wait_for(lambda: backend.info().waiting == 1)
            queued.close()
            wait_for(lambda: backend.info().waiting == 0, 1.0)
            first.close()
            wait_for(lambda: backend.info().active == 0, 1.0)
        assert backend.steps == 0
        assert client.chat("y", max_tokens=1).status == 200


def test_sixty_four_connections_and_no_answer_crossed() -> None:
    limits = Limits(active=8, waiting=8)
    with serving(FakeBackend(delay=0.02, limits=limits)) as client:
        stop, looks = threading.Event(), []

        def look() -> None:
            while not stop.is_set():
                looks.append(client.ask("GET", "/health").seconds)
                time.sleep(0.01)

        watcher = threading.Thread(target=look)
        watcher.start()
        with ThreadPoolExecutor(64) as pool:
            replies = list(
                pool.map(lambda n: client.chat(f"nonce{n} a b", stream=n % 2 == 0), range(64))
            )
        stop.set()
        watcher.join()
    assert {reply.status for reply in replies} <= {200, 429}
    served = [(n, reply) for n, reply in enumerate(replies) if reply.status == 200]
    assert len(served) >= 16
    for number, reply in served:
        assert f"nonce{number} ".encode() in reply.body
        assert reply.body.count(b"nonce") == 1
    assert sorted(looks)[int(len(looks) * 0.9)] < 0.25
