"""The demo model behind the real server, asked by OpenAI's own client."""

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import EXAMPLES, PICTURE, VIDEO, Client, image, serving, text, video

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.contract.results import (
    DescribeResult,
    DoneEvent,
    SegmentEvent,
    event_from_dict,
)
from mlx_onevision.plugins.interface import Backend, EmbedRequest, Media


@pytest.fixture(scope="module")
def backend() -> Backend:
    return open_backend("engine", model="demo")


@pytest.fixture(scope="module")
def client(backend: Backend) -> Iterator[Client]:
    with serving(backend) as found:
        yield found


@pytest.fixture(scope="module")
def demo(client: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=client.url, api_key="unused", max_retries=0) as official:
        yield official


def test_the_official_client_about_an_image(demo: openai.OpenAI) -> None:
    assert [model.id for model in demo.models.list()] == ["demo"]
    assert demo.models.retrieve("demo").object == "model"
    messages: list[Any] = [
        {"role": "user", "content": [image(), text("What is in this image?")]},
    ]
    answer = demo.chat.completions.create(model="demo", messages=messages)
    said = answer.choices[0].message.content
    assert said and "circle" in said and answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.prompt_tokens > answer.usage.completion_tokens > 0
    stream = demo.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == said and len(pieces) > 3
    usage = chunks[-1].usage
    assert usage and usage.completion_tokens == answer.usage.completion_tokens


def test_the_official_client_about_a_video(demo: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [video(), text("What happens?")]}]
    extra = {"num_frames": 4}
    answer = demo.chat.completions.create(model="demo", messages=messages, extra_body=extra)
    assert answer.choices[0].message.content
    stream = demo.chat.completions.create(
        model="demo", messages=messages, stream=True, extra_body=extra
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == answer.choices[0].message.content


def test_the_official_client_on_errors(demo: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError):
        demo.chat.completions.create(model="gpt-9", messages=messages)
    broken: list[Any] = [{"role": "user", "content": [image("data:image/png;base64,AAAA")]}]
    with pytest.raises(openai.BadRequestError) as raised:
        demo.chat.completions.create(model="demo", messages=broken)
    assert raised.value.code == "unsupported_media"
    long: list[Any] = [{"role": "user", "content": "red " * 5000}]
    with pytest.raises(openai.BadRequestError) as raised:
        demo.chat.completions.create(model="demo", messages=long, stream=True)
    assert raised.value.code == "context_length_exceeded"
    assert json.loads(raised.value.response.content)["error"]["message"]


def test_the_official_client_gets_the_models_own_vectors(
    demo: openai.OpenAI, backend: Backend
) -> None:
    found = demo.embeddings.create(model="demo", input=["a red circle", PICTURE])
    picture = Media("image", data=EXAMPLES.joinpath("shapes.png").read_bytes())
    own = backend.embed(EmbedRequest(["a red circle", picture], space="joint"))
    for item, vector in zip(found.data, own.vectors, strict=True):
        assert item.embedding == pytest.approx(vector, abs=1e-5)
        assert math.hypot(*item.embedding) == pytest.approx(1, abs=1e-3)


def test_a_video_is_described(client: Client) -> None:
    asked = {"video": VIDEO, "segments": 1.0, "num_frames": 2, "max_tokens": 12, "end": 2.0}
    reply = client.ask("POST", "/v1/video/describe", asked)
    events = [event_from_dict(values) for values in reply.events]
    last = events[-1]
    assert isinstance(last, DoneEvent) and isinstance(last.result, DescribeResult)
    segments = [event.segment for event in events if isinstance(event, SegmentEvent)]
    assert len(segments) >= 2 and list(last.result.segments) == segments


def test_what_never_fits_into_memory_is_not_worth_another_try() -> None:
    """OpenAI's clients try a 503 again."""
    backend = open_backend("engine", model="demo", memory_limit=0.0072, kv_bits=8)
    with serving(backend) as client:
        reply = client.chat("hello", max_tokens=4000)
        assert (reply.status, reply.json["error"]["code"]) == (413, "too_large")
        assert "the limit is 7.20 MB" in reply.json["error"]["message"]
        assert reply.json["error"]["type"] == "invalid_request_error"
        assert client.chat("hello", max_tokens=2).status == 200
