"""Chat over HTTP, by the real server: what clients send, and what they get."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import (
    EXAMPLES,
    PICTURE,
    VIDEO,
    WORDS,
    Client,
    ScriptedBackend,
    image,
    serving,
    text,
    video,
)

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.requests import TokenBias
from mlx_onevision.plugins.contract.results import ModelInfo
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits

CHAT = "/v1/chat/completions"


def test_an_answer(fake: Client) -> None:
    reply = fake.chat([text("what is this"), image(), video()])
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    assert reply.json["object"] == "chat.completion" and reply.json["model"] == "fake"
    (choice,) = reply.json["choices"]
    assert choice["message"]["content"] == "what is this [1 image][1 video]"
    assert choice["finish_reason"] == "stop"
    usage = reply.json["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["media_tokens"] == 2 * 196


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream(fake: Client, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    reply = fake.chat("one two", stream=True, **options)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, end = reply.events
    assert end == "[DONE]" and len({chunk["id"] for chunk in chunks}) == 1
    if usage:
        *chunks, last = chunks
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
        assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said == fake.chat("one two").json["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]


def test_settings_arrive(fake: Client) -> None:
    cut = fake.chat("one two three", max_tokens=2).json["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("one two ", "length")
    cut = fake.chat("one two three", max_completion_tokens=1).json["choices"][0]
    assert cut["finish_reason"] == "length"
    for stop in ("two", ["x", "two"]):
        stopped = fake.chat("one two three", stop=stop).json["choices"][0]
        assert (stopped["message"]["content"], stopped["finish_reason"]) == ("one ", "stop")


def test_a_limit_below_what_is_usual_refuses_nobody_who_says_nothing() -> None:
    limits, settings = Limits(max_tokens=2), ServerSettings(max_tokens=2)
    with serving(FakeBackend(limits=limits), settings) as client:
        reply = client.chat("one two three")
        assert reply.json["choices"][0]["finish_reason"] == "length"
        responded = client.ask("POST", "/v1/responses", {"input": "one two three"})
        assert responded.json["usage"]["output_tokens"] == 2
        described = client.ask("POST", "/v1/video/describe", {"video": VIDEO})
        assert described.status == 200
        asked = client.chat("one two three", max_tokens=10**9).json
        assert asked["usage"]["completion_tokens"] == 2
        note = "max_tokens is 1000000000; this server answers with 2 tokens at most"
        assert asked["notes"] == [note]
        *_, last, _ = client.chat("one two three", max_completion_tokens=3, stream=True).events
        assert last["notes"] == [
            note.replace("max_tokens is 1000000000", "max_completion_tokens is 3")
        ]


def test_what_clients_send_besides_is_tolerated(fake: Client) -> None:
    reply = fake.chat(
        model="fake",
        user="u",
        n=1,
        logprobs=False,
        presence_penalty=0,
        tools=[],
        response_format={"type": "text"},
        metadata={},
        temperature=1,
        seed=7,
        stream=None,
        stop=None,
        max_tokens=None,
        reasoning_effort="low",
        new=1,
    )
    assert reply.status == 200


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"n": 9}, "n"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "no tool 'web_search' here; send functions"),
        ({"functions": [{"name": "f"}]}, "functions is not supported; send tools"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**70}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "file"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [text("")] * 2 + [{"type": "text"}]}]},
            "[2].text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [{"role": "system", "content": [image()]}]}, ".content[0].type"),
        ({"messages": [{"role": "user", "content": [image("")]}]}, "url"),
        ({"messages": [{"role": "user", "content": ""}]}, "conversation"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_done_is_refused(
    fake: Client, fields: dict[str, Any], named: str, stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields}
    reply = fake.ask("POST", CHAT, body)
    assert reply.status == 400, reply.body
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and named in error["message"]


BOTH = [{"logprobs": True}, {"response_format": {"type": "json_object"}}]


@pytest.mark.parametrize("fields", BOTH)
def test_what_the_backend_does_not_claim(fields: dict[str, Any]) -> None:
    class Plain(FakeBackend):
        def info(self) -> ModelInfo:
            return replace(super().info(), capabilities=("generate", "images", "videos"))

    with serving(Plain()) as client:
        reply = client.chat(**fields)
    (name,) = fields
    assert (reply.status, reply.json["error"]["param"]) == (400, name)
    assert reply.json["error"]["message"].startswith(f"{name} is not supported")


def test_how_likely_the_tokens_were() -> None:
    with serving(ScriptedBackend()) as client:
        whole = client.chat(logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]
        *chunks, _ = client.chat(logprobs=True, top_logprobs=2, stream=True).events
        bare = client.chat(logprobs=True).json["choices"][0]["logprobs"]
        none = client.chat(logprobs=False, top_logprobs=0).json["choices"][0]["logprobs"]
    likely = whole["content"][1]
    assert whole["refusal"] is None and [one["token"] for one in whole["content"]] == list(WORDS)
    assert (likely["bytes"], likely["logprob"]) == (list("é".encode()), -0.25)
    assert [one["token"] for one in likely["top_logprobs"]] == ["é0", "é1"]
    assert set(likely["top_logprobs"][0]) == {"token", "bytes", "logprob"}
    streamed = [chunk["choices"][0] for chunk in chunks]
    told = [c["logprobs"]["content"] for c in streamed if c["delta"].get("content")]
    assert [one for part in told for one in part] == whole["content"]
    assert all(c["logprobs"] is None for c in streamed if not c["delta"].get("content"))
    assert [one["top_logprobs"] for one in bare["content"]] == [[]] * 3 and none is None


@pytest.mark.parametrize(
    "part",
    [
        *({"type": kind, "image_url": PICTURE} for kind in ("image_url", "input_image")),
        *({"type": kind, "image_url": {"url": PICTURE}} for kind in ("image_url", "input_image")),
        *({"type": "image", "image": place} for place in (PICTURE, {"url": PICTURE})),
        *({"type": kind, "video_url": VIDEO} for kind in ("video_url", "input_video")),
        {"type": "video", "video": VIDEO},
    ],
)
def test_an_image_by_any_name(fake: Client, part: dict[str, Any]) -> None:
    reply = fake.chat([{"type": "input_text", "text": "x"}, part])
    said = reply.json["choices"][0]["message"]["content"]
    assert said == ("x [0 images][1 video]" if "video" in part["type"] else "x [1 image][0 videos]")


def test_images_as_ollamas_clients_send_them(fake: Client) -> None:
    data = PICTURE.partition(",")[2]
    turn = {"role": "user", "content": "x", "images": [data, data]}
    reply = fake.ask("POST", CHAT, {"messages": [turn]})
    assert reply.json["choices"][0]["message"]["content"] == "x [2 images][0 videos]"
    for wrong in (["photo.png"], ["https://host/a.png"], data):
        reply = fake.ask("POST", CHAT, {"messages": [{**turn, "images": wrong}]})
        assert reply.status == 400 and "messages[0].images" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, {"images": [PICTURE]}, "images is not read here; messages hold everything"),
        (CHAT, {"image": PICTURE}, "image is not read here"),
        (CHAT, {"prompt": "hi"}, "prompt is not read here"),
        (CHAT, {"system": "be kind"}, "system is not read here"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "image_url": PICTURE}]},
            "image_url is",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x", "attachments": [{}]}]},
            "attachments",
        ),
        (
            CHAT,
            {"messages": [{"role": "system", "content": "x", "images": ["a" * 16]}]},
            "images is",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{**text("x"), "image_url": PICTURE}]}]},
            "make it two parts",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{**image(), "text": "x"}]}]},
            "text is not read here",
        ),
        ("/v1/responses", {"messages": []}, None),
        (
            "/v1/responses",
            {"messages": [{}]},
            "messages is not read here; input holds the messages",
        ),
        ("/v1/responses", {"images": [PICTURE]}, "images is not read here"),
        ("/v1/embeddings", {"images": [PICTURE]}, "images is not read here; everything"),
    ],
)
def test_content_in_the_wrong_place_is_not_read_over(
    fake: Client, path: str, body: dict[str, Any], named: str | None
) -> None:
    good = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"input": "hi"}
    reply = fake.ask("POST", path, {**good, **body})
    assert reply.status == (200 if named is None else 400), reply.body
    assert named is None or named in reply.json["error"]["message"]


def test_what_is_not_said_may_be_minus_one() -> None:
    backend = ScriptedBackend()
    with serving(backend) as client:
        assert client.chat(max_tokens=-1, seed=-1, top_k=-1).status == 200
        body = {"input": "x", "max_output_tokens": -1, "seed": -1}
        assert client.ask("POST", "/v1/responses", body).status == 200
        assert client.chat(max_tokens=-2).status == 400
    for asked in backend.asked:
        assert (asked.max_tokens, asked.seed, asked.top_k) == (None, None, None)


def test_penalties_and_biases_arrive() -> None:
    backend = ScriptedBackend()
    asked: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": -1}
    with serving(backend) as client:
        assert client.chat(**asked, logit_bias={"15": 2, "7": -100}).status == 200
        for wrong in ({"x": 1}, {"5": 101}, {"-1": 1}, {str(n): 1 for n in range(1025)}):
            reply = client.chat(logit_bias=wrong)
            assert reply.status == 400 and "logit_bias" in reply.json["error"]["message"]
    (found,) = backend.asked
    assert (found.presence_penalty, found.frequency_penalty) == (0.5, -1.0)
    assert found.logit_bias == (TokenBias(15, 2.0), TokenBias(7, -100.0))


def test_numbers_as_any_language_writes_them(fake: Client) -> None:
    body = (
        b'{"messages":[{"role":"user","content":"a b"}],"max_tokens":1.0,"seed":7.0,"top_k":-0.0}'
    )
    assert fake.ask("POST", CHAT, body).json["usage"]["completion_tokens"] == 1
    reply = fake.ask("POST", CHAT, body.replace(b"1.0", b"1.5"))
    assert (reply.status, reply.json["error"]["param"]) == (400, "max_tokens")


def test_by_whatever_name_it_is_served_it_says_what_it_is() -> None:
    with serving(FakeBackend(), ServerSettings(model="house")) as client:
        (told,) = client.ask("GET", "/v1/models").json["data"]
        assert (told["id"], told["root"]) == ("house", "fake")
        assert client.ask("GET", "/v1/models/house").json == told
        assert client.ask("GET", "/v1/models/fake").status == 404


def test_another_model_is_never_looked_for(fake: Client) -> None:
    reply = fake.chat(model="org/other")
    assert reply.status == 404 and reply.json["error"]["code"] == "model_not_found"
    said = "there is no model 'org/other' here; the one that is served is 'fake'"
    assert reply.json["error"]["message"] == said


def test_only_what_was_allowed_is_read(tmp_path: Path) -> None:
    inside = tmp_path / "in" / "a b.png"
    outside = tmp_path / "secret.png"
    inside.parent.mkdir()
    for file in (inside, outside):
        file.write_bytes(EXAMPLES.joinpath("shapes.png").read_bytes())
    inside.with_name("link.png").symlink_to(outside)
    with serving(FakeBackend(policy=MediaPolicy(folders=[inside.parent]))) as client:
        for good in (str(inside), inside.as_uri(), PICTURE):
            assert client.chat([text("x"), image(good)]).status == 200, good
        texts = set()
        for bad in (
            *(str(outside), outside.as_uri(), "/etc/passwd", "/nothing/here.png"),
            *(f"{inside.parent}/../secret.png", f"{inside.parent}/link.png", "file://host/a.png"),
            *("http://127.0.0.1:9/a.png", "https://evil.example/a.png", "ftp://a/b", "a.png"),
            *("gopher://a/", "http:\\\\a", "http://a@127.0.0.1/", "concat:a|b", "data:x,y"),
            *("http://169.254.169.254/", "http://2130706433/", "http://[::ffff:127.0.0.1]/"),
        ):
            for part in (image(bad), video(bad)):
                reply = client.chat([text("x"), part])
                assert reply.status == 400, (bad, reply.body)
                message = reply.json["error"]["message"]
                assert str(tmp_path) not in message and "passwd" not in message, message
                assert "/" not in message and len(message) <= 300, message
                texts.add((bad, message))
        said = dict(texts)
        assert said["/etc/passwd"] == said["/nothing/here.png"]  # it does not tell what exists


def test_too_many_and_too_large() -> None:
    with serving(FakeBackend(policy=MediaPolicy(images=2, size=1000))) as client:
        small = "data:image/png;base64,iVBORw0KGgo="
        reply = client.chat([image(small)] * 3)
        assert reply.status == 413 and "3 images" in reply.json["error"]["message"]
        reply = client.chat([image()])
        assert reply.status == 413 and reply.json["error"]["code"] == "too_large"
