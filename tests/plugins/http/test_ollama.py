"""Ollama's routes, where the server was started with them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import PICTURE, Client, Reply, ScriptedBackend, serving

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import Media
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits

DATA = PICTURE.partition(",")[2]
WITH = ServerSettings(ollama=True, max_tokens=4096)
TURN = {"role": "user", "content": "what is it", "images": [DATA]}
SEEN = "what is it [1 image][0 videos]"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend(), WITH) as found:
        yield found


def lines(reply: Reply) -> list[Any]:
    assert reply.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in reply.body.decode().split("\n")[:-1]]


@pytest.mark.parametrize("model", ["fake", "fake:latest"])
def test_chat(client: Client, model: str) -> None:
    asked = {"model": model, "messages": [{"role": "system", "content": "be kind"}, TURN]}
    whole = client.ask("POST", "/api/chat", {**asked, "stream": False}).json
    assert whole["message"] == {"role": "assistant", "content": SEEN}
    assert (whole["done"], whole["done_reason"], whole["model"]) == (True, "stop", model)
    assert whole["prompt_eval_count"] > 0 and whole["eval_count"] == 5
    *pieces, last = lines(client.ask("POST", "/api/chat", asked))
    assert "".join(piece["message"]["content"] for piece in pieces) == SEEN
    assert not any(piece["done"] for piece in pieces) and last["done"]
    assert last["eval_count"] == whole["eval_count"] and last["message"]["content"] == ""
    assert "notes" not in whole and "notes" not in last
    noted = {**asked, "tools": [{"type": "function"}], "options": {"num_predict": 9999}}
    *_, last = lines(client.ask("POST", "/api/chat", noted))
    assert "does not choose tools" in last["notes"][0]
    assert last["notes"][1] == "num_predict is 9999; this server answers with 4096 tokens at most"


def test_generate(client: Client) -> None:
    asked = {"model": "fake", "prompt": "what is it", "images": [DATA], "system": "be kind"}
    assert client.ask("POST", "/api/generate", {**asked, "stream": False}).json["response"] == SEEN
    *pieces, _ = lines(client.ask("POST", "/api/generate", asked))
    assert "".join(piece["response"] for piece in pieces) == SEEN


def test_nothing_to_answer_loads_the_model() -> None:
    backend = FakeBackend()
    with serving(backend, WITH) as client:
        for path, empty in (("/api/generate", {}), ("/api/chat", {"messages": []})):
            backend.unload()
            before = backend.loads
            loaded = client.ask("POST", path, {"model": "fake", **empty}).json
            assert (loaded["done"], loaded["done_reason"]) == (True, "load")
            assert backend.loads == before + 1
    error = PluginError("out_of_memory", "there is too little")
    with serving(FakeBackend(fail_load=error), WITH) as client:
        reply = client.ask("POST", "/api/generate", {"model": "fake"})
        assert (reply.status, reply.json) == (503, {"error": "there is too little"})
    with serving(FakeBackend(limits=Limits(active=1, waiting=0), load_seconds=1), WITH) as client:
        # It takes a place as a question does, so that no number of them blocks all threads.
        both = [client.begin("POST", "/api/generate", {"model": "fake"}) for _ in range(2)]
        assert sorted(one.getresponse().status for one in both) == [200, 429]
        for one in both:
            one.close()


def test_options_formats_and_calls_arrive() -> None:
    backend = ScriptedBackend()
    options = {"num_predict": 7, "temperature": 0.5, "repeat_penalty": 1.1, "stop": ["x"]}
    options |= {"seed": 3, "num_ctx": 4096, "presence_penalty": 1, "typical_p": 1.0}
    call = {"function": {"name": "look", "arguments": {"a": 1}}}
    turns = [
        TURN,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "seen", "tool_name": "look", "images": [DATA]},
    ]
    asked = {"model": "fake", "messages": turns, "stream": False, "options": options}
    with serving(backend, WITH) as client:
        for form in ("json", {"type": "object"}, ""):
            reply = client.ask("POST", "/api/chat", {**asked, "format": form, "keep_alive": "5m"})
            assert reply.status == 200, reply.body
        client.ask("POST", "/api/chat", {**asked, "options": {"num_predict": -1, "seed": -1}})
    first, second, plain, left = backend.asked
    assert first.json_schema == second.json_schema == '{"type": "object"}'
    assert plain.json_schema is None and (left.max_tokens, left.seed) == (None, None)
    assert (first.max_tokens, first.temperature, first.repetition_penalty) == (7, 0.5, 1.1)
    assert (first.stop, first.seed, first.presence_penalty) == (("x",), 3, 1.0)
    assert [m.role for m in first.messages] == ["user", "assistant", "user"]
    assert first.messages[1].parts == ('look({"a": 1})',)
    named, shown, told = first.messages[2].parts
    assert (named, told) == ("look returned: ", "seen")
    assert isinstance(shown, Media) and (shown.url or "").endswith(DATA)


def test_what_it_says_of_itself(client: Client) -> None:
    (known,) = client.ask("GET", "/api/tags").json["models"]
    assert known["name"] == known["model"] == "fake" and known["details"]["family"]
    for body in ({"model": "fake"}, {"name": "fake:latest"}):
        shown = client.ask("POST", "/api/show", body).json
        assert "vision" in shown["capabilities"]
        assert shown["model_info"]["llava-onevision.context_length"] == 32768
    assert client.ask("GET", "/api/version").json["version"]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/api/chat", {"messages": [TURN], "model": "llava"}, 404, "the one that is served is"),
        ("/api/chat", {"messages": [TURN], "think": True}, 400, "think is not supported"),
        ("/api/chat", {"messages": [{**TURN, "image": DATA}]}, 400, "image is not read here"),
        ("/api/chat", {"messages": [TURN], "options": {"mirostat": 2}}, 400, "mirostat"),
        ("/api/chat", {"messages": [TURN], "options": {"stop": ["x"] * 17}}, 400, "options.stop"),
        ("/api/chat", {"messages": [TURN], "options": {"stop": ["x" * 1001]}}, 400, "stop[0]"),
        ("/api/generate", {"prompt": "x", "context": [1]}, 400, "; take chat"),
        ("/api/generate", {"prompt": "x", "images": ["a.png"]}, 400, "images[0]"),
    ],
)
def test_refusals_are_texts(
    client: Client, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    reply = client.ask("POST", path, {"model": "fake", **body})
    assert reply.status == status and said in reply.json["error"], reply.body


def test_errors_of_a_stream() -> None:
    error = PluginError("out_of_memory", "there is too little")
    asked = {"model": "fake", "prompt": "one two"}
    with serving(FakeBackend(fail_at=0, error=error), WITH) as client:
        reply = client.ask("POST", "/api/generate", asked)
        assert (reply.status, reply.json) == (503, {"error": "there is too little"})
    with serving(FakeBackend(fail_at=1, error=error), WITH) as client:
        assert lines(client.ask("POST", "/api/generate", asked))[-1]["error"]


def test_without_the_option_there_is_nothing() -> None:
    with serving(FakeBackend()) as client:
        assert client.ask("GET", "/api/tags").status == 404
