"""Responses over HTTP: what is taken, what comes back, and in which order."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import write
from served import PICTURE, VIDEO, WORDS, Client, ScriptedBackend, serving, wait_for

from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import Message
from mlx_onevision.plugins.hosts.http.truncation import without_oldest
from mlx_onevision.plugins.service.service import Limits

RESPONSES = "/v1/responses"
LOGPROBS = ["message.output_text.logprobs"]


def respond(client: Client, asked: Any = "hi", **fields: Any) -> Any:
    return client.ask("POST", RESPONSES, {"input": asked, **fields})


def said(body: Any) -> str:
    (message,) = body["output"]
    (part,) = message["content"]
    return part["text"]


def test_an_answer(fake: Client) -> None:
    content = [
        {"type": "input_text", "text": "what is this"},
        {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
        {"type": "input_video", "video_url": VIDEO},
    ]
    reply = respond(
        fake, [{"role": "user", "content": content}], metadata={"a": "é"}, temperature=0.5
    )
    assert reply.status == 200 and reply.headers["content-type"] == "application/json"
    body = reply.json
    assert said(body) == "what is this [1 image][1 video]"
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "fake")
    assert (body["store"], body["metadata"], body["temperature"]) == (True, {"a": "é"}, 0.5)
    assert body["output"][0]["status"] == "completed" and body["error"] is None
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["media_tokens"] == 2 * 196


def test_what_was_said_before_and_instructions() -> None:
    backend = ScriptedBackend()
    with serving(backend) as client:
        first = respond(client, "one").json
        more = [{"role": "user", "content": "one"}, *first["output"]]
        more.append({"type": "message", "role": "user", "content": "two"})
        assert respond(client, more).status == 200
        told = [{"role": "developer", "content": "be short"}, {"role": "user", "content": "x"}]
        assert respond(client, told, instructions="be kind").status == 200
    roles = [[message.role for message in request.messages] for request in backend.asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["system", "user"]]
    assert backend.asked[1].messages[1].parts == ("".join(WORDS),)
    assert backend.asked[2].messages[0].content == "be kind\n\nbe short"


def test_an_answer_that_is_cut(fake: Client) -> None:
    body = respond(fake, "one two three", max_output_tokens=2).json
    assert (said(body), body["status"]) == ("one two ", "incomplete")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    last = respond(fake, "one two three", max_output_tokens=2, stream=True).events[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


def test_a_stream(fake: Client) -> None:
    reply = respond(fake, "one two", stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events
    names = [line[7:] for line in reply.body.decode().splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [name.removeprefix("response.") for name in names] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 4,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    whole = "one two [0 images][0 videos]"
    assert "".join(event["delta"] for event in events[4:8]) == events[8]["text"] == whole
    response = events[-1]["response"]
    assert said(response) == whole and response["usage"]["output_tokens"] == 4
    assert events[-2]["item"] == response["output"][0]
    assert {event["item_id"] for event in events[3:10]} == {response["output"][0]["id"]}
    assert events[0]["response"]["id"] == response["id"]


def test_how_likely_the_tokens_were() -> None:
    backend = ScriptedBackend()
    with serving(backend) as client:
        plain = respond(client).json["output"][0]["content"][0]["logprobs"]
        one = respond(client, include=LOGPROBS).json["output"][0]["content"][0]["logprobs"]
        asked = {"include": LOGPROBS, "top_logprobs": 2}
        two = respond(client, **asked).json["output"][0]["content"][0]["logprobs"]
        events = respond(client, **asked, stream=True).events
    assert [request.logprobs for request in backend.asked] == [None, 0, 2, 2]
    assert plain == [] and [len(token["top_logprobs"]) for token in one] == [0] * 3
    assert [token["token"] for token in two] == list(WORDS)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    (done,) = (event for event in events if event["type"] == "response.output_text.done")
    assert [token for event in deltas for token in event["logprobs"]] == done["logprobs"] == two


def test_the_form_of_an_answer() -> None:
    backend = ScriptedBackend()
    schema = {"type": "object", "properties": {}}
    with serving(backend) as client:
        form = {"type": "json_schema", "name": "one", "schema": schema, "strict": True}
        body = respond(client, text={"format": form, "verbosity": "low"}).json
        assert body["text"]["format"] == form
        assert respond(client, text={"format": {"type": "json_object"}}).status == 200
        assert respond(client, text={"format": {"type": "text"}}).status == 200
    asked = [request.json_schema for request in backend.asked]
    assert [None if text is None else json.loads(text) for text in asked] == [
        *(schema, {"type": "object"}, None)
    ]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"conversation": "conv_1"}, "there are no conversations here"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "no tool 'web_search' here; send functions"),
        ({"truncation": "oldest"}, "truncation"),
        ({"response_format": {"type": "json_object"}}, "; send it in text, as format"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "id": "x"}]}, "item 0 is 'reasoning'"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "content[0].type"),
        ({"input": [{"role": "assistant", "content": [{"type": "input_image"}]}]}, "content[0]"),
        ({"input": " "}, "conversation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata: there are 17 pairs"),
        ({"metadata": {"k" * 65: ""}}, "metadata: a key has 65 characters; 64 are taken"),
        ({"metadata": {"a": "v" * 513}}, "metadata.a: string should have at most 512 characters"),
        ({"instructions": "\ud800"}, "surrogate"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_done_is_refused(
    fake: Client, fields: dict[str, Any], named: str, stream: bool
) -> None:
    reply = fake.ask("POST", RESPONSES, {"input": "hi", "stream": stream, **fields})
    assert reply.status == 400 and named in reply.json["error"]["message"], reply.body


def test_what_clients_send_besides_is_tolerated(fake: Client) -> None:
    reply = respond(
        fake,
        model="fake",
        store=False,
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        truncation="disabled",
        reasoning={"effort": "low"},
        include=["reasoning.encrypted_content"],
        service_tier="auto",
        user="u",
        stream=None,
        new=1,
    )
    assert reply.status == 200


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A model with a context of 300 tokens."""
    folder = write(tmp_path_factory.mktemp("checkpoint") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    with serving(open_engine(folder)) as client:
        yield client


def turns(number: int, words: int = 20) -> list[dict[str, str]]:
    said = [("user", "hello " * words), ("assistant", "yes " * words)] * number
    return [{"role": role, "content": text} for role, text in [*said, ("user", "and now?")]]


def test_a_conversation_that_is_too_long_begins_later(short: Client) -> None:
    asked = {"instructions": "be kind", "max_output_tokens": 4}
    assert "context" in respond(short, turns(9), **asked).json["error"]["message"]
    fits = respond(short, turns(1), **asked, truncation="auto").json
    assert fits["truncation"] == "auto" and "notes" not in fits
    body = respond(short, turns(9), **asked, truncation="auto").json
    (note,) = body["notes"]
    left = int(note.split()[1])
    assert note == (
        f"the {left} oldest messages were left out, for the conversation is longer than the context"
    )
    # No more than had to be, and the rest as it would be by itself.
    assert 0 < left < 18 and left % 2 == 0
    rest = respond(short, turns(9)[left:], **asked).json
    assert (
        said(rest) == said(body)
        and rest["usage"]["input_tokens"] == (body["usage"]["input_tokens"])
    )
    assert respond(short, turns(9)[left - 2 :], **asked).status == 400
    last = respond(short, turns(9), **asked, truncation="auto", stream=True).events[-1]
    assert last["response"]["notes"] == [note] and said(last["response"]) == said(body)


def test_a_turn_that_is_too_long_by_itself_is_refused(short: Client) -> None:
    for stream in (True, False):
        long = [{"role": "user", "content": "hello " * 900}]
        reply = respond(short, turns(2) + long, truncation="auto", stream=stream)
        assert reply.status == 400
        assert reply.json["error"]["code"] == "context_length_exceeded"


def test_of_many_turns_a_part_is_left_out_at_once() -> None:
    messages = [Message("system", "s"), *[Message("user", "x" * 10) for _ in range(320)]]
    steps = 0
    while (shorter := without_oldest(messages)) is not None:
        assert shorter[0].role == "system" and shorter[-1] is messages[-1]
        assert len(shorter) < len(messages)
        messages, steps = shorter, steps + 1
    assert len(messages) == 2 and steps < 80


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PluginError("out_of_memory", "no memory at /a/b"), "server_error"),
        (PluginError("bad_request", "no"), "invalid_prompt"),
    ],
)
def test_an_error_in_mid_stream(error: PluginError, code: str) -> None:
    with serving(FakeBackend(fail_at=1, error=error)) as client:
        last = respond(client, "one two", stream=True).events[-1]
    assert last["type"] == "response.failed" and last["response"]["error"]["code"] == code
    assert last["response"]["status"] == "failed" and "/a/b" not in str(last)
    assert said(last["response"]) == "one "


def test_an_error_before_the_stream_has_its_own_status() -> None:
    with serving(FakeBackend(fail_at=0, error=PluginError("out_of_memory", "no"))) as client:
        assert respond(client, stream=True).status == respond(client).status == 503


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_worked_for(stream: bool) -> None:
    backend = FakeBackend(pieces=["x "] * 500, delay=0.03, limits=Limits(active=1))
    with serving(backend) as client:
        connection = client.begin("POST", RESPONSES, {"input": "x", "stream": stream})
        wait_for(lambda: backend.steps >= 3)
        connection.close()
        at_end = backend.steps
        wait_for(lambda: backend.info().active == 0, 2.0)
        assert backend.steps - at_end <= 2
