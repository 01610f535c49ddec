"""What is logged of requests and of faults: enough to find them, and nothing that a client said."""

import errno
import json
import logging

import pytest
from served import PICTURE, image, serving, text

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings

CHAT = "/v1/chat/completions"
SECRETS = ("hush-prompt", "hush-path", "hush-token", "hush-field", "base64")


def test_a_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mlx_onevision.requests")
    bearer = {"Authorization": "Bearer hush-token"}
    with serving(FakeBackend(), ServerSettings(token="hush-token")) as client:
        ask = {"messages": [{"role": "user", "content": [text("hush-prompt"), image(PICTURE)]}]}
        replies = [
            client.ask("POST", CHAT, ask, bearer),
            client.ask("POST", CHAT, {**ask, "stream": True}, bearer),
            client.ask("POST", CHAT, {"hush-field": 1}, bearer),
            client.ask("GET", "/v1/models/hush-path", headers=bearer),
            client.ask("GET", "/hush-path?hush-field", headers=bearer),
            client.ask("GET", "/health", headers={"Authorization": "Bearer hush-path"}),
        ]
    lines = [json.loads(record.message) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 200, 400, 404, 404, 401]
    assert [line["id"] for line in lines] == [reply.headers["x-request-id"] for reply in replies]
    assert len({line["id"] for line in lines}) == len(lines)
    routes = [CHAT, CHAT, CHAT, "/v1/models/{name:path}", "other", "/health"]
    assert [line["route"] for line in lines] == routes
    assert all(set(line) == {*lines[0]} and line["seconds"] >= 0 for line in lines)
    assert not any(secret in caplog.text for secret in SECRETS)


@pytest.mark.parametrize("asked", [False, True])
def test_what_a_fault_says_is_logged_where_it_is_asked_for(
    caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    caplog.set_level(logging.DEBUG if asked else logging.WARNING, "mlx_onevision")
    fault = RuntimeError("cannot read /hush-path: hush-prompt")
    with serving(FakeBackend(fail_at=0, error=fault)) as client:
        reply = client.chat("hush-prompt")
    assert reply.status == 500 and b"hush" not in reply.body
    assert "RuntimeError at mlx_onevision." in caplog.text
    assert ("hush-path" in caplog.text) == asked


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [(errno.ENOSPC, 503, "set TMPDIR"), (errno.EMFILE, 429, "too many files are open")],
)
def test_a_machine_without_room_is_no_fault(
    caplog: pytest.LogCaptureFixture, number: int, status: int, says: str
) -> None:
    fault = OSError(number, "no room", "/tmp/hush-path")
    with serving(FakeBackend(fail_at=0, error=fault)) as client:
        reply = client.chat()
    assert reply.status == status and says in reply.json["error"]["message"]
    assert b"hush" not in reply.body and not caplog.records
