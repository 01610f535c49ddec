"""Vectors, videos and counts over HTTP."""

import base64
import struct
from typing import Any

import pytest
from served import PICTURE, VIDEO, Client, image, serving, text, video, wait_for

from mlx_onevision.plugins.adapters.fake import VECTOR_DIM, FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import (
    DescribeResult,
    DoneEvent,
    ErrorEvent,
    SegmentEvent,
    event_from_dict,
)
from mlx_onevision.plugins.service.service import Limits

EMBED, DESCRIBE = "/v1/embeddings", "/v1/video/describe"


def test_vectors(fake: Client) -> None:
    mixed = ["a red circle", PICTURE, text("a red circle"), image(), image(PICTURE), video()]
    reply = fake.ask("POST", EMBED, {"model": "fake", "input": mixed})
    assert reply.status == 200
    found = reply.json
    assert (found["object"], found["space"], found["dim"]) == ("list", "joint", VECTOR_DIM)
    vectors = [item["embedding"] for item in found["data"]]
    assert [item["index"] for item in found["data"]] == list(range(6))
    assert vectors[0] == vectors[2] and vectors[1] == vectors[3] == vectors[4]
    assert len({tuple(vector) for vector in vectors}) == 3
    embedded = fake.ask("POST", EMBED, {"input": VIDEO}).json["data"]
    assert [item["embedding"] for item in embedded] == vectors[5:]
    packed = fake.ask("POST", EMBED, {"input": mixed, "encoding_format": "base64"}).json["data"]
    for vector, item in zip(vectors, packed, strict=True):
        data = base64.b64decode(item["embedding"])
        assert struct.unpack(f"<{VECTOR_DIM}f", data) == pytest.approx(vector, abs=1e-7)
    alone = fake.ask("POST", EMBED, {"input": "a red circle", "dimensions": VECTOR_DIM}).json
    assert alone["data"][0]["embedding"] == vectors[0]
    one = fake.ask("POST", EMBED, {"input": image(), "space": "vision"}).json
    assert (one["space"], one["data"][0]["embedding"]) == ("vision", vectors[1])


def test_vectors_nobody_waits_for_are_not_made() -> None:
    backend = FakeBackend(delay=0.03, limits=Limits(active=1))
    with serving(backend) as client:
        connection = client.begin("POST", EMBED, {"input": ["a"] * 200})
        wait_for(lambda: backend.steps >= 3)
        connection.close()
        at_end = backend.steps
        wait_for(lambda: backend.info().active == 0, 2.0)
        assert backend.steps - at_end <= 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "input"),
        ({"input": [[1, 2]]}, "tokens"),
        ({"input": [1, 2]}, "tokens"),
        ({"input": 5}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": [""]}, "empty text"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "space": "vision"}, "joint"),
        ({"input": "data:image/png;base64,AAAA"}, "item 1"),
        ({"input": ["a", image("/etc/passwd")]}, "not allowed"),
        ({"input": [image("http://127.0.0.1:9/")]}, "not allowed"),
        ({}, "input"),
    ],
)
def test_what_has_no_vector(fake: Client, fields: dict[str, Any], named: str) -> None:
    reply = fake.ask("POST", EMBED, fields)
    assert reply.status == 400, reply.body
    message = reply.json["error"]["message"]
    assert named in message and "/etc" not in message


def test_a_video_is_described_in_the_contracts_events(fake: Client) -> None:
    asked = {"video": {"url": VIDEO}, "segments": 10, "model": "fake"}
    reply = fake.ask("POST", DESCRIBE, asked)
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream")
    events = [event_from_dict(values) for values in reply.events]
    names = [line[7:] for line in reply.body.decode().splitlines() if line.startswith("event: ")]
    assert names == [event.discriminator for event in events]
    assert [e.segment.index for e in events if isinstance(e, SegmentEvent)] == [0, 1, 2]
    last = events[-1]
    assert isinstance(last, DoneEvent) and isinstance(last.result, DescribeResult)
    assert len(last.result.segments) == 3 and last.result.summary


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "video"),
        ({"video": PICTURE}, "video"),
        ({"video": "/etc/passwd"}, "not allowed"),
        ({"video": VIDEO, "segments": "all"}, "segments"),
        ({"video": VIDEO, "segments": -1}, "segments"),
        ({"video": VIDEO, "start": 5, "end": 1}, "end"),
        ({"video": VIDEO, "num_frames": 0}, "num_frames"),
    ],
)
def test_a_video_that_cannot_be_described(fake: Client, fields: dict[str, Any], named: str) -> None:
    reply = fake.ask("POST", DESCRIBE, fields)
    assert reply.status == 400 and named in reply.json["error"]["message"], reply.body


def test_a_video_that_breaks_off() -> None:
    error = PluginError("unsupported_media", "cannot read '/films/a.mp4': it is damaged")
    with serving(FakeBackend(fail_at=1, error=error)) as client:
        reply = client.ask("POST", DESCRIBE, {"video": VIDEO, "segments": 10})
    last = event_from_dict(reply.events[-1])
    assert isinstance(last, ErrorEvent) and last.code == "unsupported_media"
    assert "films" not in last.message


def test_counts() -> None:
    with serving(FakeBackend()) as client:
        client.chat("one two")
        client.chat("one two", stream=True)
        client.chat(n=9)
        for path in ("/v1/models/whatever", '/evil"} 1\n', "/x"):
            client.ask("GET", path.replace("\n", "%0a").replace(" ", "%20"))
        reply = client.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = reply.body.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    chat = 'mlx_onevision_requests_total{route="/v1/chat/completions",status="%d"}'
    assert (values[chat % 200], values[chat % 400]) == ("2", "1")
    assert values['mlx_onevision_tokens_total{kind="completion"}'] == "8"
    assert values["mlx_onevision_requests_active"] == "0"
    model = 'mlx_onevision_requests_total{route="/v1/models/{name:path}",status="404"}'
    assert values[model] == "1"
    assert not any("whatever" in line or "evil" in line for line in lines)
