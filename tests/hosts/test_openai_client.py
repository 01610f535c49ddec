"""OpenAI's own client, sync and async, over the whole of what the server speaks: with a backend of
the tests, where the answer has to be known, and with the demo model.
"""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseTextDeltaEvent
from pydantic import BaseModel
from served import PICTURE, VIDEO, WORDS, Client, ScriptedBackend, image, serving, text, wait_for

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits


class Shape(BaseModel):
    shape: Literal["circle", "square", "triangle"]
    count: Literal[1, 2, 3]


SHAPE = ('{"shape": ', '"circle", ', '"count": 2}')
ABOUT: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
            {"type": "input_text", "text": "What is in the image?"},
        ],
    }
]


@pytest.fixture
def scripted() -> Iterator[tuple[ScriptedBackend, openai.OpenAI]]:
    backend = ScriptedBackend(SHAPE)
    with serving(backend) as client, official(client) as asked:
        yield backend, asked


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    with serving(open_backend("engine", model="demo")) as client:
        yield client


@pytest.fixture(scope="module")
def demo(server: Client) -> Iterator[openai.OpenAI]:
    with official(server) as client:
        yield client


def official(client: Client, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=client.url, api_key=key, max_retries=0)


def test_responses_parsed(scripted: tuple[ScriptedBackend, openai.OpenAI]) -> None:
    backend, client = scripted
    parsed = client.responses.parse(model="fake", input="which shape?", text_format=Shape)
    assert parsed.output_parsed == Shape(shape="circle", count=2)
    schema = json.loads(backend.asked[-1].json_schema or "")
    assert schema["required"] == ["shape", "count"] and schema["additionalProperties"] is False
    with client.responses.stream(model="fake", input="which?", text_format=Shape) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.output_text.delta") == 3 and kinds[-1] == "response.completed"
    assert final.output_parsed == Shape(shape="circle", count=2)


def test_chat_parsed(scripted: tuple[ScriptedBackend, openai.OpenAI]) -> None:
    backend, client = scripted
    messages: Any = [{"role": "user", "content": "which shape?"}]
    parsed = client.chat.completions.parse(model="fake", messages=messages, response_format=Shape)
    assert parsed.choices[0].message.parsed == Shape(shape="circle", count=2)
    assert backend.asked[-1].json_schema
    with client.chat.completions.stream(
        model="fake", messages=messages, response_format=Shape, logprobs=True, top_logprobs=1
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Shape(shape="circle", count=2)
    logprobs = final.choices[0].logprobs
    assert logprobs and logprobs.content and [one.token for one in logprobs.content] == list(SHAPE)
    assert [len(one.top_logprobs) for one in logprobs.content] == [1, 1, 1]


def test_log_probabilities_of_a_response() -> None:
    with serving(ScriptedBackend()) as server, official(server) as client:
        answer = client.responses.create(
            model="fake", input="x", include=["message.output_text.logprobs"], top_logprobs=2
        )
    (message,) = answer.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs and [bytes(one.bytes).decode() for one in logprobs] == list(WORDS)
    assert [len(one.top_logprobs) for one in logprobs] == [2, 2, 2]


def test_everything_asked_arrives(scripted: tuple[ScriptedBackend, openai.OpenAI]) -> None:
    backend, client = scripted
    client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "x"}],
        n=1,
        seed=7,
        stop=["a", "b"],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=2,
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "num_frames": 4},
    )
    asked = backend.asked[-1]
    assert (asked.seed, asked.stop, asked.temperature, asked.top_p) == (7, ("a", "b"), 0.5, 0.9)
    assert (asked.max_tokens, asked.top_k, asked.min_p, asked.num_frames) == (2, 3, 0.1, 4)
    client.responses.create(
        model="fake", input="x", instructions="be short", max_output_tokens=3, temperature=0
    )
    asked = backend.asked[-1]
    assert (asked.max_tokens, asked.temperature) == (3, 0)
    assert [message.role for message in asked.messages] == ["system", "user"]


def test_refusals_are_its_exceptions(scripted: tuple[ScriptedBackend, openai.OpenAI]) -> None:
    _, client = scripted
    for refused in (
        {"background": True},
        {"tools": [{"type": "web_search"}]},
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            client.responses.create(model="fake", input="x", **refused)  # pyright: ignore
        assert raised.value.code == "bad_request" and "; " in raised.value.message
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="x")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="send all messages"):
        client.responses.create(model="fake", input="x", previous_response_id="resp_1")
    kept = client.responses.create(model="fake", input="x")
    assert client.responses.retrieve(kept.id).output_text == kept.output_text
    client.responses.delete(kept.id)


def test_a_key() -> None:
    with serving(ScriptedBackend(), ServerSettings(token="right")) as server:
        with official(server, "right") as client:
            assert client.responses.create(model="fake", input="x").status == "completed"
        with official(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.responses.create(model="fake", input="x")


def test_who_closes_a_stream_is_not_worked_for() -> None:
    backend = FakeBackend(pieces=["x "] * 500, delay=0.02, limits=Limits(active=1))
    with serving(backend) as server, official(server) as client:
        stream = client.responses.create(model="fake", input="x", stream=True)
        assert next(iter(stream)).type == "response.created"
        stream.close()
        wait_for(lambda: backend.info().active == 0, 2.0)
        assert backend.steps < 20

        async def given_up() -> None:
            async with openai.AsyncOpenAI(
                base_url=server.url, api_key="unused", max_retries=0, timeout=0.3
            ) as hurried:
                with pytest.raises(openai.APITimeoutError):
                    await hurried.responses.create(model="fake", input="x")

        asyncio.run(given_up())
        wait_for(lambda: backend.info().active == 0, 2.0)


def test_the_demo_model_responds(demo: openai.OpenAI) -> None:
    answer = demo.responses.create(model="demo", input=ABOUT)
    assert "circle" in answer.output_text and answer.status == "completed"
    assert answer.usage and answer.usage.input_tokens > answer.usage.output_tokens > 0
    pieces, done = [], None
    for event in demo.responses.create(model="demo", input=ABOUT, stream=True):
        if isinstance(event, ResponseTextDeltaEvent):
            pieces.append(event.delta)
        elif isinstance(event, ResponseCompletedEvent):
            done = event.response
    assert done and "".join(pieces) == answer.output_text == done.output_text and len(pieces) > 3
    more = [*ABOUT, *answer.output, {"role": "user", "content": "How many shapes are there?"}]
    assert demo.responses.create(model="demo", input=more).output_text
    cut = demo.responses.create(model="demo", input=ABOUT, max_output_tokens=2)
    assert cut.incomplete_details and cut.incomplete_details.reason == "max_output_tokens"


def test_the_demo_model_on_a_video(demo: openai.OpenAI) -> None:
    video: Any = {"type": "input_video", "video_url": VIDEO}
    asked: Any = [{"role": "user", "content": [video, {"type": "input_text", "text": "What?"}]}]
    answer = demo.responses.create(model="demo", input=asked, extra_body={"num_frames": 4})
    with demo.responses.stream(model="demo", input=asked, extra_body={"num_frames": 4}) as stream:
        assert stream.get_final_response().output_text == answer.output_text != ""


def test_many_at_once(server: Client) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="unused") as client:

            async def one(number: int) -> str:
                if number % 2:
                    stream = await client.responses.create(model="demo", input=ABOUT, stream=True)
                    deltas = [
                        event.delta
                        async for event in stream
                        if event.type == "response.output_text.delta"
                    ]
                    return "".join(deltas)
                messages: Any = [
                    {"role": "user", "content": [image(), text("What is in the image?")]}
                ]
                done = await client.chat.completions.create(model="demo", messages=messages)
                return done.choices[0].message.content or ""

            return await asyncio.gather(*map(one, range(8)))

    assert len(set(asyncio.run(all_of_them()))) == 1


def test_three_hundred_at_once() -> None:
    """With the client's default retries none is refused; bodies wait where they are too much."""

    async def all_of_them(url: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused") as client:

            async def one(number: int) -> str | None:
                messages: Any = [{"role": "user", "content": [image(), text(f"word{number}")]}]
                done = await client.chat.completions.create(model="fake", messages=messages)
                return done.choices[0].message.content

            return await asyncio.gather(*map(one, range(300)))

    backend = FakeBackend(delay=0.002, limits=Limits(active=8, waiting=512))
    with serving(backend, ServerSettings(max_held_bytes=1 << 20)) as server:
        found = asyncio.run(all_of_them(server.url))
        counted = server.ask("GET", "/metrics").body.decode()
    assert found == [f"word{number} [1 image][0 videos]" for number in range(300)]
    assert 'status="429"' not in counted and 'status="5' not in counted


def test_the_demo_model_says_how_likely_its_words_are(demo: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [image(), text("What is in the image?")]}]
    asked: Any = {"model": "demo", "messages": messages, "logprobs": True, "top_logprobs": 3}
    choice = demo.chat.completions.create(**asked).choices[0]
    assert choice.logprobs and choice.logprobs.content and choice.message.content
    told = choice.logprobs.content
    data = b"".join(bytes(one.bytes or []) for one in told)
    assert data.decode() == choice.message.content
    for one in told:
        assert len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token
        assert sum(math.exp(other.logprob) for other in one.top_logprobs) <= 1 + 1e-3
    streamed = [
        one
        for chunk in demo.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert [one.token for one in streamed] == [one.token for one in told]


def test_the_demo_model_keeps_to_a_form(demo: openai.OpenAI) -> None:
    content: Any = [image(), text("Which shape?")]
    chat = demo.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": content}],
        response_format=Shape,
        max_tokens=100,
    )
    assert isinstance(chat.choices[0].message.parsed, Shape)
    parsed = demo.responses.parse(
        model="demo", input=ABOUT, text_format=Shape, max_output_tokens=100
    )
    assert isinstance(parsed.output_parsed, Shape)
    whole = demo.responses.create(
        model="demo", input=ABOUT, text={"format": {"type": "json_object"}}, max_output_tokens=300
    )
    assert whole.status == "incomplete" or isinstance(json.loads(whole.output_text), dict)
