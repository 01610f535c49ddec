"""The Swift client among the examples: its grammar, and that what it sends and reads is what the
server takes and gives. Names and types of its fields are taken from its source; macOS builds it.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tree_sitter_swift
from served import JSON, PICTURE, VIDEO, Client, serving
from tree_sitter import Language, Node, Parser

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError

FOLDER = Path(__file__).parents[3] / "examples/swift"
SOURCE = FOLDER.joinpath("Sources/main.swift").read_text(encoding="utf-8")
SIMPLE = {"String": str, "Int": int, "Bool": bool}


@dataclass(frozen=True)
class Field:
    """A stored property of a struct: its name in JSON, and its type in Swift."""

    key: str
    type: str


Structs = dict[str, dict[str, Field]]


def parsed(source: str) -> Node:
    return Parser(Language(tree_sitter_swift.language())).parse(source.encode()).root_node


def nodes(root: Node, kind: str) -> Iterator[Node]:
    for child in root.children:
        if child.type == kind:
            yield child
        yield from nodes(child, kind)


def text(node: Node | None) -> str:
    assert node is not None and node.text is not None
    return node.text.decode()


def coding_keys(body: Node) -> dict[str, str]:
    """The names in JSON, by those in Swift, of a struct that says them."""
    keys = {}
    for enum in body.children:
        if enum.type != "class_declaration":
            continue
        if text(enum.child_by_field_name("name")) == "CodingKeys":
            for entry in nodes(enum, "enum_entry"):
                name = text(entry.child_by_field_name("name"))
                raw = entry.child_by_field_name("raw_value")
                keys[name] = name if raw is None else text(raw).strip('"')
    return keys


@pytest.fixture(scope="module")
def structs() -> Structs:
    """Every struct of the source, by its own name."""
    found: Structs = {}
    for declared in nodes(parsed(SOURCE), "class_declaration"):
        body = declared.child_by_field_name("body")
        if body is None or body.type != "class_body":
            continue
        keys = coding_keys(body)
        fields = {}
        for stored in body.children:
            if stored.type == "property_declaration":
                name = text(stored.child_by_field_name("name"))
                annotation = next(nodes(stored, "type_annotation"))
                kind = text(annotation).removeprefix(":").strip()
                fields[name] = Field(keys[name] if keys else name, kind)
        assert not keys or keys.keys() == fields.keys()
        found[text(declared.child_by_field_name("name"))] = fields
    return found


def sent(structs: Structs, name: str, **values: Any) -> dict[str, Any]:
    """What Swift's JSONEncoder makes of a struct."""
    fields = structs[name]
    assert values.keys() <= fields.keys()
    optional = {field for field in fields if fields[field].type.endswith("?")}
    assert fields.keys() - optional <= values.keys()
    return {fields[field].key: value for field, value in values.items()}


def read(structs: Structs, kind: str, value: Any) -> Any:
    """What Swift's JSONDecoder makes of JSON, structs as dictionaries; raises where it would."""
    if kind.endswith("?"):
        return None if value is None else read(structs, kind[:-1], value)
    if kind.startswith("["):
        assert isinstance(value, list)
        return [read(structs, kind[1:-1], item) for item in value]
    if kind in SIMPLE:
        assert type(value) is SIMPLE[kind]
        return value
    assert isinstance(value, dict)
    return {
        name: read(structs, field.type, value.get(field.key))
        for name, field in structs[kind].items()
    }


def question(structs: Structs, *media: tuple[str, str], **changes: Any) -> dict[str, Any]:
    parts = [
        sent(structs, "Part", type=kind, **{name: sent(structs, "Place", url=url)})
        for kind, url in media
        for name in ["imageURL" if kind == "image_url" else "videoURL"]
    ]
    parts.append(sent(structs, "Part", type="text", text="one two"))
    given: dict[str, Any] = {
        "messages": [sent(structs, "Message", role="user", content=parts)],
        "maxTokens": 256,
        "stream": True,
        "streamOptions": sent(structs, "StreamOptions", includeUsage=True),
    }
    return sent(structs, "ChatRequest", **{**given, **changes})


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend()) as client:
        yield client


def test_its_grammar() -> None:
    for file in FOLDER.rglob("*.swift"):
        root = parsed(file.read_text(encoding="utf-8"))
        assert not root.has_error, file
    assert parsed("struct A {").has_error  # so that it is seen


def test_where_it_asks() -> None:
    assert '"http://127.0.0.1:8000/v1"' in SOURCE
    assert re.findall(r'appendingPathComponent\("(.*?)"\)', SOURCE) == ["chat/completions"]
    assert 'httpMethod = "POST"' in SOURCE
    assert f'setValue("{JSON["Content-Type"]}", forHTTPHeaderField: "Content-Type")' in SOURCE
    assert set(re.findall(r'Part\(type: "(.*?)"', SOURCE)) == {"text", "image_url", "video_url"}


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value each field of an object is."""
    below = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in below:
        if isinstance(value, dict):
            yield (*way, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*way, key))


def test_the_server_knows_all_that_it_sends(structs: Structs, client: Client) -> None:
    """Fields that it does not know it ignores; of those that it knows it minds the type."""
    asked = question(structs, ("image_url", PICTURE), ("video_url", VIDEO))
    seen = set()
    for way in places(asked):
        wrong = copy.deepcopy(asked)
        holder = wrong
        for key in way[:-1]:
            holder = holder[key]
        holder[way[-1]] = [1] if isinstance(holder[way[-1]], dict) else {"no": "such"}
        reply = client.ask("POST", "/v1/chat/completions", wrong)
        assert reply.status == 400, way
        seen.add(way[-1])
    sending = ("ChatRequest", "Message", "Part", "Place", "StreamOptions")
    assert seen == {field.key for name in sending for field in structs[name].values()}


def test_it_reads_the_answer(structs: Structs, client: Client) -> None:
    asked = question(structs, ("image_url", PICTURE), ("video_url", VIDEO))
    reply = client.ask("POST", "/v1/chat/completions", asked)
    assert reply.status == 200 and reply.events[-1] == "[DONE]"
    chunks = [read(structs, "Chunk", event) for event in reply.events[:-1]]
    deltas = [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(filter(None, deltas)) == "one two [1 image][1 video]"
    finishes = [choice["finishReason"] for chunk in chunks for choice in chunk["choices"]]
    assert finishes == [None] * (len(finishes) - 1) + ["stop"]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["usage"] == {"promptTokens": 394, "completionTokens": 4}
    for event in reply.events[:-1]:
        with pytest.raises(AssertionError):
            read(structs, "Refusal", event)


def test_it_reads_refusals(structs: Structs, client: Client) -> None:
    for asked in (question(structs, maxTokens=0), question(structs, ("image_url", VIDEO))):
        reply = client.ask("POST", "/v1/chat/completions", asked)
        assert reply.status == 400
        assert read(structs, "Refusal", reply.json)["error"]["message"]


def test_it_reads_an_answer_that_breaks_off(structs: Structs) -> None:
    error = PluginError("out_of_memory", "there is too little memory", "close something")
    with serving(FakeBackend(fail_at=1, error=error)) as client:
        reply = client.ask("POST", "/v1/chat/completions", question(structs))
    assert reply.status == 200 and len(reply.events) > 1
    refusal = read(structs, "Refusal", reply.events[-1])
    assert "too little memory" in refusal["error"]["message"]
