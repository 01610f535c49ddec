"""Responses that are kept, so that a conversation goes on from one of them."""

from dataclasses import replace
from typing import Any

import pytest
from served import PICTURE, WORDS, Client, ScriptedBackend, serving

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.requests import Media, Message
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.responses.memory import ResponseMemory, StoredResponse

RESPONSES = "/v1/responses"
LOOK = {"type": "function", "name": "look"}


def respond(client: Client, asked: Any, **fields: Any) -> Any:
    return client.ask("POST", RESPONSES, {"input": asked, **fields})


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on(stream: bool) -> None:
    backend = ScriptedBackend()
    picture = [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": "one"}]
    with serving(backend) as client:
        asked = {"instructions": "be kind", "stream": stream}
        first = respond(client, [{"role": "user", "content": picture}], **asked)
        body = first.events[-1]["response"] if stream else first.json
        second = respond(client, "two", previous_response_id=body["id"]).json
        assert second["previous_response_id"] == body["id"]
        reference = {"type": "item_reference", "id": second["output"][0]["id"]}
        turns = [
            {"role": "user", "content": "two"},
            reference,
            {"role": "user", "content": "three"},
        ]
        assert respond(client, turns).status == 200
    _, again, referred = [asked.messages for asked in backend.asked]
    said = "".join(WORDS)
    assert [m.role for m in again] == ["user", "assistant", "user"]  # without the instructions
    assert again[0].parts == (Media("image", url=PICTURE), "one")
    assert again[1].parts == (said,) and again[2].parts == ("two",)
    assert [m.parts for m in referred] == [("two",), (said,), ("three",)]


def test_calls_go_on_too() -> None:
    backend = FakeBackend()
    tools = {"tools": [LOOK, {**LOOK, "name": "tell"}], "tool_choice": "required"}
    with serving(backend) as client:
        first = respond(client, "x", **tools).json
        (call,) = first["output"]
        returned = {"type": "function_call_output", "call_id": call["call_id"], "output": "it"}
        second = respond(client, [returned], previous_response_id=first["id"], **tools).json
        assert (call["name"], second["output"][0]["name"]) == ("look", "tell")
        reference = {"type": "item_reference", "id": call["id"]}
        told = respond(client, [reference, returned], store=False).json
        assert told["output"][0]["content"][0]["text"].startswith("it ")


def test_it_can_be_looked_at_and_forgotten() -> None:
    with serving(FakeBackend()) as client:
        kept = respond(client, "x").json
        path = f"{RESPONSES}/{kept['id']}"
        assert client.ask("GET", path).json == kept
        deleted = {"id": kept["id"], "object": "response", "deleted": True}
        assert client.ask("DELETE", path).json == deleted
        for method in ("GET", "DELETE"):
            assert client.ask(method, path).status == 404
        reply = respond(client, "y", previous_response_id=kept["id"])
        assert (reply.status, reply.json["error"]["param"]) == (404, "previous_response_id")
        assert "is not kept here; send all messages" in reply.json["error"]["message"]
        other = respond(client, "x", store=False).json
        assert not other["store"] and client.ask("GET", f"{RESPONSES}/{other['id']}").status == 404
        reference = [{"type": "item_reference", "id": other["output"][0]["id"]}]
        assert "send the message itself" in respond(client, reference).json["error"]["message"]


def kept(number: int, size: int = 10, **body: Any) -> StoredResponse:
    made: Any = {"id": f"r{number}", "output": [{"id": f"m{number}", "type": "message"}], **body}
    said = [Message("user", [Media("image", data=bytes(size)), "x"])]
    return StoredResponse(made, said, {}, frozenset())


def test_it_is_bounded_in_number_and_bytes() -> None:
    each = kept(0, 1).size - 1  # what it takes besides the image
    memory = ResponseMemory(max_responses=3, max_bytes=66 + 3 * each)
    for number in range(5):
        memory.store(kept(number))
    with pytest.raises(HTTPError):
        memory.response("r1")
    with pytest.raises(HTTPError):
        memory.item("m1")
    assert memory.item("m2") is memory.response("r2")
    memory.store(kept(5, 80))
    with pytest.raises(HTTPError):
        memory.response("r3")
    assert memory.response("r4") and memory.response("r5")
    memory.store(kept(6, 200 + 3 * each))  # too large by itself
    for number in range(7):
        with pytest.raises(HTTPError):
            memory.response(f"r{number}")


def test_all_that_is_kept_counts() -> None:
    """Not the conversation alone; and what a value of JSON takes, not its two characters."""
    plain, long = kept(0), "x" * 10_000
    for more in (
        kept(0, instructions=long),
        kept(0, metadata={"a": long}),
        kept(0, tools=[{"name": "look", "parameters": {"enum": [[]] * 1000}}]),
        replace(plain, names={long: "look"}),
        replace(plain, names={"call": long}),
        replace(plain, messages=[Message("user", "é" + "\N{GRINNING FACE}" * 2_500)]),
    ):
        assert more.size > plain.size + 9_000
    memory = ResponseMemory(max_bytes=15_000)
    for number in range(2):
        memory.store(kept(number, instructions=long))
    assert memory.response("r1")
    with pytest.raises(HTTPError):
        memory.response("r0")
