"""Requests that are wrong in any way get an answer that says so, never a fault of the server."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hostile.sizes import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from served import Client, image, serving, text, video

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract import requests, wire
from mlx_onevision.plugins.hosts.http import ollama
from mlx_onevision.plugins.hosts.http.app import OPERATIONS
from mlx_onevision.plugins.hosts.http.content import MAX_MESSAGES_AND_PARTS
from mlx_onevision.plugins.hosts.http.server import ServerSettings

SMALL = "data:image/png;base64,iVBORw0KGgo="

REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [
            {"role": "system", "content": "be short"},
            {
                "role": "user",
                "content": [text("what"), image(SMALL)],
            },
        ],
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 1,
        "n": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [],
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "num_frames": 4,
        "start": 0.5,
    },
    "/v1/responses": {
        "model": "fake",
        "instructions": "be short",
        "input": [
            {"role": "user", "content": [{"type": "input_image", "image_url": SMALL}]},
            {"type": "message", "role": "assistant", "content": [text("a")], "id": "msg_1"},
            {"role": "user", "content": "and now?"},
        ],
        "max_output_tokens": 5,
        "text": {"format": {"type": "text"}},
        "include": ["reasoning.encrypted_content"],
        "metadata": {"a": "b"},
        "store": False,
        "stream": True,
    },
    "/v1/embeddings": {
        "input": ["a", image(SMALL), text("b")],
        "encoding_format": "float",
        "dimensions": 16,
        "space": "joint",
        "model": "fake",
    },
    "/v1/video/describe": {
        "video": video("data:video/mp4;base64,AAAAHGZ0eXBpc29t")["video_url"],
        "segments": 10.0,
        "num_frames": 2,
        "max_tokens": 5,
        "start": 1.0,
        "end": 20.0,
    },
}
STATED = {200, 400, 404, 413}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(
        ["", "\ud800", "\0", "data:,", "/etc/passwd", "file:///", "http://[", "1", "é"]
    ),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend()) as found:
        yield found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """A copy with junk at a place."""
    copy = json.loads(json.dumps(value))
    if not path:
        return junk
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = junk
    return copy


@pytest.mark.parametrize("path", REQUESTS)
def test_as_they_stand_they_are_served(client: Client, path: str) -> None:
    assert client.ask("POST", path, REQUESTS[path]).status == 200


@settings(max_examples=cases(60, 1000))
@given(data=st.data())
@pytest.mark.parametrize("path", REQUESTS)
def test_junk_anywhere(client: Client, path: str, data: st.DataObject) -> None:
    request = REQUESTS[path]
    place = data.draw(st.sampled_from(list(places(request))))
    junk = data.draw(JUNK)
    reply = client.ask("POST", path, json.dumps(changed(request, place, junk)).encode())
    assert reply.status in STATED, reply.body
    if reply.status != 200:
        error = reply.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert len(error["message"]) <= 300 and "Traceback" not in error["message"]
        assert "/etc" not in error["message"] and "base64," not in error["message"]
    assert b"internal" not in reply.body


@settings(max_examples=cases(60, 1000))
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_request(client: Client, data: bytes) -> None:
    assert client.ask("POST", "/v1/embeddings", data or b"x").status == 400


# Many small things instead of a large one.


def many(path: str, count: int) -> dict[str, Any]:
    """A request of so many messages, or items, of one letter."""
    turns = [{"role": "user", "content": "x"}] * count
    if path == "/v1/embeddings":
        part = {"type": "image_url", "image_url": SMALL}
        return {"input": [{"type": "group", "content": [part] * 256}] * (count // 256 + 1)}
    named = {"/v1/responses": "input"}.get(path, "messages")
    return {"model": "fake", named: turns}


PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/api/chat")


@pytest.fixture(scope="module")
def wide() -> Iterator[Client]:
    with serving(FakeBackend(), ServerSettings(ollama=True)) as found:
        yield found


def test_very_many_messages_are_refused_before_they_are_looked_at(client: Client) -> None:
    """Three megabytes, four times: meanwhile the server's health is known."""
    body = json.dumps(many(PATHS[0], 110_000)).encode()
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(client.ask, "POST", PATHS[0], body) for _ in range(4)]
        worst = 0.0
        while not all(one.done() for one in sent):
            worst = max(worst, client.ask("GET", "/health").seconds)
            time.sleep(0.01)
    assert worst < 2
    for reply in [one.result() for one in sent]:
        message = reply.json["error"]["message"]
        assert message == "messages: there are 110,000 messages and parts; 8,192 are taken"


@pytest.mark.parametrize("path", PATHS)
def test_so_many_messages_and_no_more(wide: Client, path: str) -> None:
    reply = wide.ask("POST", path, many(path, MAX_MESSAGES_AND_PARTS + 1))
    assert reply.status == 400 and f"{MAX_MESSAGES_AND_PARTS:,} are taken" in reply.body.decode()


def test_parts_are_counted_too(client: Client) -> None:
    parts = [text("x")] * (MAX_MESSAGES_AND_PARTS // 2)
    turns = [{"role": "user", "content": parts}] * 2
    refused = client.ask("POST", PATHS[0], {"messages": turns})
    assert refused.status == 400 and "messages and parts" in refused.json["error"]["message"]
    kept = client.ask("POST", PATHS[1], {"input": [turns[0]]})
    longer = client.ask(
        "POST", PATHS[1], {"input": [turns[0]], "previous_response_id": kept.json["id"]}
    )
    assert longer.status == 400 and "messages and parts" in longer.json["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_what_takes_long_is_converted_aside(
    wide: Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the event loop, where everybody would wait for it."""
    made: Counter[str] = Counter()
    check = wire.Part.__post_init__

    def seen(part: wire.Part) -> None:
        if isinstance(part, requests.Message | requests.Media | requests.GenerateRequest):
            made[threading.current_thread().name] += 1
        check(part)

    monkeypatch.setattr(wire.Part, "__post_init__", seen)
    count = 300  # of messages, in no more bytes than are parsed at once otherwise
    assert wide.ask("POST", path, {**many(path, count), "n": 2}).status in (200, 413)
    loops = [thread.name for thread in threading.enumerate() if "(run)" in thread.name]
    assert made.total() > count and sum(made[name] for name in loops) <= 1  # what was answered


def checked_one_by_one(schema: Any, bounded: bool = False) -> Iterator[str]:
    """The lists and objects of a model all of whose mistakes are collected, however many."""
    if isinstance(schema, list | tuple):
        for one in schema:
            yield from checked_one_by_one(one)
    elif isinstance(schema, dict):
        kind = schema.get("type")
        if kind == "list" and schema.get("items_schema", {}).get("type", "any") != "any":
            if not (schema.get("fail_fast") or schema.get("max_length")):
                yield str(schema["items_schema"])[:200]
        if kind == "dict" and schema.get("values_schema", {}).get("type", "any") != "any":
            if not bounded:
                yield str(schema["values_schema"])[:200]
        for name, one in schema.items():
            if name not in ("metadata", "serialization", "json_schema_input_schema"):
                yield from checked_one_by_one(one, kind == "function-before")


def test_one_mistake_of_many_is_looked_for() -> None:
    """Each takes microseconds, and there may be half a million of them."""
    models = [op.takes for op in OPERATIONS if op.takes is not None]
    for model in (*models, ollama.ChatRequest, ollama.PromptRequest, ollama.ShowRequest):
        found = list(checked_one_by_one(model.__pydantic_core_schema__))
        assert not found, (model, found)


@pytest.mark.parametrize(
    ("path", "field"), [(PATHS[0], "logit_bias"), (PATHS[1], "logit_bias"), (PATHS[1], "metadata")]
)
def test_pairs_are_counted_first(client: Client, path: str, field: str) -> None:
    body = {**REQUESTS[path], field: {f"x{n}": "x" for n in range(100_000)}}
    reply = client.ask("POST", path, body)
    message = reply.json["error"]["message"]
    assert reply.status == 400 and message.startswith(f"{field}: there are 100,000 pairs")
