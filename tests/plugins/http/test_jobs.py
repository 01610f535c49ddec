"""Descriptions that are asked after, over HTTP."""

from collections.abc import Iterator
from typing import Any

import pytest
from served import PICTURE, VIDEO, Client, Reply, serving, wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.jobs import Job
from mlx_onevision.plugins.service.service import Limits

JOBS = "/v1/video/jobs"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend(delay=0.02), ServerSettings(model="one")) as found:
        yield found


def start(client: Client, **fields: Any) -> Reply:
    return client.ask("POST", JOBS, {"video": VIDEO, "segments": 10.0, **fields})


def job(body: dict[str, Any]) -> Job:
    """What a body says, but for what only HTTP knows."""
    return Job.from_dict({k: v for k, v in body.items() if k not in ("object", "poll")})


def ended(client: Client, place: str) -> dict[str, Any]:
    wait_for(lambda: client.ask("GET", place).json["status"] not in ("queued", "running"))
    return client.ask("GET", place).json


def test_started_followed_and_collected(client: Client) -> None:
    reply = start(client, model="one", segments=1.0)
    assert reply.status == 202 and reply.seconds < 0.5
    body = reply.json
    assert body["object"] == "video.job" and body["status"] in ("queued", "running")
    assert body["poll"] == f"{JOBS}/{body['id']}" == reply.headers["location"]
    wait_for(lambda: client.ask("GET", body["poll"]).json["segments"])
    seen = job(client.ask("GET", body["poll"]).json)
    assert seen.status == "running" and seen.progress and seen.progress.total == 30
    done = job(ended(client, body["poll"]))
    assert done.status == "done" and done.result and len(done.result.segments) == 30
    assert done.result.segments[: len(seen.segments)] == seen.segments
    assert client.ask("GET", body["poll"]).headers["content-type"] == "application/json"


def test_cancelled(client: Client) -> None:
    place = start(client, segments=0.1).json["poll"]
    wait_for(lambda: client.ask("GET", place).json["segments"])
    reply = client.ask("DELETE", place)
    assert reply.status == 200 and reply.json["status"] == "cancelled"
    assert job(client.ask("GET", place).json).error == job(reply.json).error is not None
    wait_for(lambda: client.ask("GET", "/health").json["active"] == 0)
    assert client.ask("DELETE", place).json["status"] == "cancelled"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("id", ["0" * 32, "%2e%2e", "a" * 4000, "%00"])
def test_what_is_no_job(client: Client, method: str, id: str) -> None:
    reply = client.ask(method, f"{JOBS}/{id}")
    assert reply.status == 404 and reply.json["error"]["code"] == "not_found"


def test_there_is_no_list(client: Client) -> None:
    assert client.ask("GET", JOBS).status == 405
    assert client.ask("POST", f"{JOBS}/{'0' * 32}", {}).status == 405


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"video": PICTURE, "segments": "all"}, "segments"),
        ({"video": "/etc/passwd"}, "not allowed"),
        ({"video": None}, "video"),
        ({"model": "two"}, "no model 'two' here"),
    ],
)
def test_what_is_refused_at_once(client: Client, fields: dict[str, Any], named: str) -> None:
    reply = start(client, **fields)
    assert reply.status == (404 if "model" in fields else 400)
    assert named in reply.json["error"]["message"] and "/etc" not in reply.json["error"]["message"]


def test_a_job_that_fails_says_nothing_of_the_server() -> None:
    error = PluginError("unsupported_media", "cannot read '/films/a.mp4': it is damaged", "mend it")
    with serving(FakeBackend(fail_at=1, error=error)) as client:
        body = ended(client, start(client).json["poll"])
    assert body["status"] == "failed" and len(body["segments"]) == 1
    assert body["error"]["code"] == "unsupported_media" and "films" not in str(body)


def test_so_many_and_no_more() -> None:
    with serving(FakeBackend(delay=0.2, limits=Limits(active=2, waiting=1))) as client:
        replies = [start(client) for _ in range(4)]
        assert [reply.status for reply in replies] == [202, 202, 202, 429]
        assert replies[-1].headers["retry-after"] == "1"
        assert client.ask("GET", replies[2].json["poll"]).json["status"] == "queued"
        for reply in replies[:3]:
            assert client.ask("DELETE", reply.json["poll"]).json["status"] == "cancelled"
        again = start(client)
        assert again.status == 202
    # The server ends with a job under way; nothing of it is left.
