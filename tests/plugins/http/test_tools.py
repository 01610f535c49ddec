"""Tools over HTTP: a call that is forced is made, one that is not is answered in text."""

import json
from typing import Any

import pytest
from served import Client, ScriptedBackend, serving, text

from mlx_onevision.plugins.adapters.fake import FakeBackend

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"

SHAPE = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle"]}, "inner": {"$ref": "#/$defs/inner"}},
    "required": ["shape", "inner"],
    "$defs": {"inner": {"type": "object", "properties": {"n": {"const": 2}}, "required": ["n"]}},
}
ARGUMENTS = {"shape": "circle", "inner": {"n": 2}}


def tool(name: str, parameters: Any = SHAPE, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    "choice", [named("draw"), "required", {"type": "function", "name": "draw"}]
)
def test_a_call_that_is_forced(fake: Client, choice: Any) -> None:
    asked = {"tools": [tool("draw")], "tool_choice": choice}
    (answer,) = fake.chat(**asked).json["choices"]
    message = answer["message"]
    assert (answer["finish_reason"], message["content"]) == ("tool_calls", None)
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"]["name"] == "draw"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    *chunks, end = fake.chat(**asked, stream=True).events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert end == "[DONE]" and deltas[0] == {"role": "assistant", "content": None}
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [("id" in call, call["index"]) for call in calls] == [
        (place == 0, 0) for place in range(len(calls))
    ]
    assert calls[0]["function"]["name"] == "draw" and len(calls) > 3
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == ARGUMENTS
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_of_several_is_forced(fake: Client) -> None:
    """Which, the answer says; the schema of each stands where its references still hold."""
    asked = {"tools": [tool("draw"), tool("erase", {"type": "object"})], "tool_choice": "required"}
    (call,) = fake.chat(**asked).json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "draw"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    *chunks, _ = fake.chat(**asked, stream=True).events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["name"] == "draw"
    assert json.loads("".join(call["arguments"] for call in calls)) == ARGUMENTS


def test_of_several_each_is_called_once_for_a_message(fake: Client) -> None:
    """Else a model that does not choose calls the same one for ever."""
    asked = {"tools": [tool("look"), tool("answer")], "tool_choice": "required"}
    turns: list[Any] = [{"role": "user", "content": "x"}]
    for name in ("look", "answer", "look"):
        reply = fake.ask("POST", CHAT, {"messages": turns, **asked})
        message = reply.json["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert call["function"]["name"] == name
        turns += [message, {"role": "tool", "tool_call_id": call["id"], "content": "seen"}]
    reply = fake.ask(
        "POST", CHAT, {"messages": [*turns, {"role": "user", "content": "y"}], **asked}
    )
    assert reply.json["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"


@pytest.mark.parametrize("parameters", [None, {}])
def test_a_function_without_arguments(fake: Client, parameters: Any) -> None:
    asked = {"tools": [tool("go", parameters)], "tool_choice": "required"}
    (call,) = fake.chat(**asked).json["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "go", "arguments": "{}"}


def test_a_call_that_is_cut_off(fake: Client) -> None:
    asked = {"tools": [tool("draw")], "tool_choice": "required", "max_tokens": 4}
    (answer,) = fake.chat(**asked).json["choices"]
    assert answer["finish_reason"] == "length" and answer["message"]["tool_calls"]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_choice_that_is_left_to_the_model_is_answered_in_text(fake: Client, choice: Any) -> None:
    asked = {"tools": [tool("draw")], **({} if choice is None else {"tool_choice": choice})}
    body = fake.chat("hello", **asked).json
    assert body["choices"][0]["message"]["content"].startswith("hello")
    assert body["choices"][0]["finish_reason"] == "stop"
    *_, last, _ = fake.chat("hello", **asked, stream=True).events
    for told in (body, last):
        if choice == "none":
            assert "notes" not in told
        else:
            (note,) = told["notes"]
            assert "does not choose tools" in note and "; name one in tool_choice" in note


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice is required, without tools"),
        ({"tools": [tool("draw")], "tool_choice": named("sing")}, "tool_choice names 'sing'"),
        ({"tools": [tool("draw")], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a")] * 129}, "tools"),
    ],
)
def test_choices_that_fit_nothing(fake: Client, fields: dict[str, Any], said: str) -> None:
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x"}]}),):
        reply = fake.ask("POST", path, {**body, **fields})
        assert reply.status == 400 and said in reply.json["error"]["message"], reply.body


def test_what_is_refused_without_schemas_is_the_call() -> None:
    with serving(FakeBackend(without=["json_schema"])) as client:
        asked = {"tools": [tool("draw")]}
        assert client.chat(**asked).status == 200
        reply = client.chat(**asked, tool_choice="required")
    assert (reply.status, reply.json["error"]["param"]) == (400, "tool_choice")


def test_earlier_calls_and_what_they_returned_are_text() -> None:
    backend = ScriptedBackend()
    called = {"id": "c1", "type": "function", "function": {"name": "draw", "arguments": '{"a": 1}'}}
    with serving(backend) as client:
        turns = [
            {"role": "user", "content": "draw it"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
            {"role": "tool", "content": [text("more")]},
            {"role": "assistant"},
            {"role": "user", "content": "and now?"},
        ]
        assert client.ask("POST", CHAT, {"messages": turns}).status == 200
        items = [
            {"role": "user", "content": "draw it"},
            {"type": "function_call", "call_id": "c1", "name": "draw", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "done"},
        ]
        assert client.ask("POST", RESPONSES, {"input": items}).status == 200
    told = [
        [(m.role, "".join(map(str, m.parts))) for m in asked.messages] for asked in backend.asked
    ]
    assert told[0] == [
        ("user", "draw it"),
        ("assistant", 'draw({"a": 1})'),
        ("user", "draw returned: done"),
        ("user", "The function returned: more"),
        ("assistant", ""),
        ("user", "and now?"),
    ]
    assert told[1] == told[0][:3]


def test_a_forced_call_as_a_response(fake: Client) -> None:
    function = {"type": "function", "name": "draw", "parameters": SHAPE}
    asked = {"input": "x", "tools": [function], "tool_choice": "required"}
    body = fake.ask("POST", RESPONSES, asked).json
    (item,) = body["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "draw", "completed")
    assert json.loads(item["arguments"]) == ARGUMENTS and item["call_id"].startswith("call_")
    assert body["tool_choice"] == "required" and body["tools"][0]["name"] == "draw"
    events = fake.ask("POST", RESPONSES, {**asked, "stream": True}).events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    count = kinds.count("function_call_arguments.delta")
    assert count > 3 and kinds == [
        *("created", "in_progress", "output_item.added"),
        *["function_call_arguments.delta"] * count,
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    done = events[-3]
    assert done["name"] == "draw" and json.loads(done["arguments"]) == ARGUMENTS
    assert "".join(event["delta"] for event in events[3:-3]) == done["arguments"]
    assert events[2]["item"]["arguments"] == ""
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    left = fake.ask("POST", RESPONSES, {**asked, "tool_choice": "auto"}).json
    assert left["output"][0]["type"] == "message" and "does not choose" in left["notes"][0]


def test_several_choices(fake: Client) -> None:
    body = fake.chat("one two", n=3).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 12
    alone = fake.chat("one two").json
    assert body["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    said = {choice["message"]["content"] for choice in body["choices"]}
    assert said == {alone["choices"][0]["message"]["content"]}
    asked = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, end = fake.chat("one two", **asked).events
    assert end == "[DONE]" and usage["usage"]["completion_tokens"] == 12
    for index in range(3):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert {"".join(c["delta"].get("content", "") for c in own)} == said
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]


def test_several_choices_draw_with_seeds_of_their_own() -> None:
    backend = ScriptedBackend()
    with serving(backend) as client:
        assert client.chat(n=3, seed=2**64 - 1).status == client.chat(n=2).status == 200
    assert sorted(asked.seed or 0 for asked in backend.asked[:3]) == [0, 1, 2**64 - 1]
    assert [asked.seed for asked in backend.asked[3:]] == [None, None]
