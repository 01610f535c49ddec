"""JSON Schemas over HTTP: the names that clients have for them, and what is refused."""

import json
from typing import Any

import pytest
from served import (
    Client,
    ScriptedBackend,
    serving,
)


def test_the_form_of_an_answer() -> None:
    schema = {"type": "object", "properties": {"é": {"minimum": 1.0, "maximum": 2.5}}}
    named = {"name": "one", "schema": schema, "strict": True}
    backend = ScriptedBackend()
    with serving(backend) as client:
        for form in (
            {"type": "json_schema", "json_schema": named},
            {"type": "json_schema", "json_schema": {"name": "any"}},
            {"type": "json_object"},
            {"type": "text"},
        ):
            assert client.chat(response_format=form).status == 200
    asked = [request.json_schema for request in backend.asked]
    assert [None if text is None else json.loads(text) for text in asked] == [
        schema,
        {"type": "object"},
        {"type": "object"},
        None,
    ]


PERSON = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "json_object", "schema": PERSON}}, PERSON),
        ({"guided_json": PERSON}, PERSON),
        ({"guided_json": json.dumps(PERSON)}, PERSON),
        ({"structured_outputs": {"json": PERSON, "regex": None}}, PERSON),
        ({"structured_outputs": {"json_object": True}}, {"type": "object"}),
        ({"json_schema": PERSON}, PERSON),
        ({"format": PERSON}, PERSON),
        ({"format": "json"}, {"type": "object"}),
        ({"format": ""}, None),
    ],
)
def test_the_form_of_an_answer_as_other_servers_name_it(
    fields: dict[str, Any], wanted: Any
) -> None:
    backend = ScriptedBackend()
    with serving(backend) as client:
        assert client.chat(**fields).status == 200
    (asked,) = backend.asked
    assert (None if asked.json_schema is None else json.loads(asked.json_schema)) == wanted


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"guided_regex": "a"}, "guided_regex is not supported; send a JSON Schema"),
        ({"grammar": 'root ::= "a"'}, "grammar is not supported; send a JSON Schema"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice is not supported; send json"),
        ({"format": "xml"}, "format"),
        ({"format": "json", "guided_json": PERSON}, "several names; give one of them"),
        ({"guided_json": "{"}, "json_schema is not valid JSON"),
    ],
)
def test_forms_that_are_refused_by_name(fake: Client, fields: dict[str, Any], named: str) -> None:
    reply = fake.chat(**fields)
    assert reply.status == 400 and named in reply.json["error"]["message"], reply.body
    body = {"input": "x", **fields}
    assert named in fake.ask("POST", "/v1/responses", body).json["error"]["message"]


def test_a_schema_that_is_not_strict_leaves_out_what_is_not_supported() -> None:
    backend = ScriptedBackend()
    with serving(backend) as client:
        for strict in (None, True, False):
            named = {"name": "one", "schema": PERSON, "strict": strict}
            client.chat(response_format={"type": "json_schema", "json_schema": named})
    told = [json.loads(asked.json_schema or "").get("x-guidance") for asked in backend.asked]
    assert told == [None, None, {"lenient": True}]
