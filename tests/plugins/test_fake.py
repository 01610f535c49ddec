"""What the backend without a model makes up."""

import json
import math
from typing import Any

import pytest
from faults import error_of
from schemas import SCHEMAS, valid

from mlx_onevision.plugins.adapters.fake import FakeBackend, document
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import GenerateRequest, Media, TextEvent

UNKNOWN = {
    "multiples": "multipleOf",
    "optional": "minProperties",
    "free names": "maxProperties",
    "named by pattern": "patternProperties",
    "tuple": "prefixItems",
    "date": "format",
    "all of several": "allOf",
    "integers": "exclusiveMaximum",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_document_of_a_schema_or_a_refusal(name: str) -> None:
    schema = json.dumps(SCHEMAS[name])
    if name in UNKNOWN:
        with pytest.raises(PluginError, match=UNKNOWN[name]):
            document(schema)
        return
    pieces = document(schema)
    assert valid(SCHEMAS[name], "".join(pieces)) and all(pieces)


MORE: list[Any] = [
    {"type": "integer", "minimum": 3.5, "maximum": 4.2},
    {"type": "integer", "maximum": -2},
    {"type": "number", "minimum": 0.05, "maximum": 0.1},
    {"type": "number", "maximum": -3},
    {"type": "number", "minimum": 7000},
    {"type": "array", "items": {"type": "null"}, "minItems": 3},
    {"type": "object", "required": ["x"], "additionalProperties": {"type": "string"}},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "boolean"}}},
    {"properties": {"a": {"minLength": 7}}, "required": ["a"]},
]
NONE: list[Any] = [
    False,
    {"enum": []},
    {"$ref": "#"},
    {"type": "integer", "minimum": 1.2, "maximum": 1.8},
    {"type": "array", "items": False, "minItems": 1},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"anyOf": [False, {"enum": []}]},
]
NO_SCHEMAS: list[Any] = [
    {"anyOf": "x"},
    {"enum": 3},
    {"$ref": 5},
    {"type": "frob"},
    {"required": 5, "type": "object"},
    {"$ref": "#/$defs/none"},
    {"allOf": [{"minimum": 1}, {"minimum": 2}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    {"allOf": [{"type": "integer"}, False]},
    {"anyOf": [{"type": "integer"}], "minimum": 3},
]


def test_documents_of_more_schemas() -> None:
    for schema in MORE:
        assert valid(schema, "".join(document(json.dumps(schema)))), schema
    for schema in (*NONE, *NO_SCHEMAS):
        with pytest.raises(PluginError, match="JSON schema") as raised:
            document(json.dumps(schema))
        assert raised.value.code == "bad_request"
        assert schema not in NONE or "no document" in raised.value.message


def test_what_it_does_not_claim_it_refuses() -> None:
    picture, video = Media("image", data=b"\x89PNG"), Media("video", data=b"RIFF")
    with FakeBackend(without=["images", "videos", "logprobs", "json_schema"]) as backend:
        assert backend.info().capabilities == ("generate", "embed", "describe_video")
        for asked, code in (
            (GenerateRequest.ask("what?", picture), "unsupported_media"),
            (GenerateRequest.ask("what?", video), "unsupported_media"),
            (GenerateRequest.ask("what?", logprobs=0), "bad_request"),
            (GenerateRequest.ask("what?", json_schema="true"), "bad_request"),
        ):
            assert error_of(backend.generate(asked)).code == code


def test_logprobs_are_emitted_with_their_text() -> None:
    """A piece that may become a stop string is held back, and so are its logprobs."""
    with FakeBackend(pieces=["ab", "cd", "ef", "gh"]) as backend:
        asked = GenerateRequest.ask("what?", stop=["dx", "fg"], logprobs=2)
        stream = backend.generate(asked)
        pieces = [event for event in stream if isinstance(event, TextEvent)]
        assert [event.delta for event in pieces] == ["ab", "c", "de"]
        tokens = [[token.token for token in event.logprobs] for event in pieces]
        assert tokens == [["ab"], ["cd"], ["ef"]]
        result = stream.result()
        assert result.text == "abcde" and result.finish_reason == "stop"
        assert result.logprobs is not None and len(result.logprobs) == 3
        for token in result.logprobs:
            assert token.top[0].logprob == token.logprob and len(token.top) == 2
            assert 0 < sum(math.exp(other.logprob) for other in token.top) < 1.5
