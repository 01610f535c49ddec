"""Objects that do not say whether they have other properties are closed."""

from typing import Any

import pytest
from schemas import valid

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.closed_objects import close_objects

A, B = ({"type": "object", "properties": {name: {"type": "integer"}}} for name in "ab")
DEFS = {"a": {**A, "required": ["a"]}, "b": B}
REF_A, REF_B = {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}

# A schema, documents that it allows closed, and documents that only the open one allows.
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "an object": (A, ['{"a": 1}', "{}"], ['{"a": 1, "x": 1}', '{"x": 1}']),
    "one in it": (
        {"type": "object", "properties": {"in": A}, "additionalProperties": True},
        ['{"in": {"a": 1}, "x": 1}'],
        ['{"in": {"x": 1}}'],
    ),
    "one in a list": ({"type": "array", "items": A}, ['[{"a": 1}]'], ['[{"x": 1}]']),
    "one that says so": ({**A, "additionalProperties": {"type": "null"}}, ['{"x": null}'], []),
    "without names": ({"type": "object", "required": ["x"]}, ['{"x": 1, "y": 2}'], []),
    "named by pattern": (
        {"type": "object", "patternProperties": {"^p": {"type": "integer"}}},
        ['{"p1": 1}'],
        ['{"x": 1}'],
    ),
    "either": ({"anyOf": [A, B]}, ['{"a": 1}', '{"b": 1}'], ['{"a": 1, "b": 1}', '{"x": 1}']),
    "both": ({"allOf": [A, B]}, ['{"a": 1, "b": 1}', "{}"], ['{"a": 1, "x": 1}']),
    "one of all": ({"allOf": [A]}, ['{"a": 1}'], ['{"x": 1}']),
    "names and alternatives": (
        {**A, "anyOf": [{"required": ["a"]}, {**B, "required": ["b"]}]},
        ['{"a": 1}', '{"a": 1, "b": 1}', '{"b": 1}'],
        ['{"a": 1, "x": 1}'],
    ),
    "a definition alone and among others": (
        {"type": "array", "items": {"anyOf": [{"allOf": [REF_A, REF_B]}, REF_A]}, "$defs": DEFS},
        ['[{"a": 1, "b": 1}, {"a": 1}]'],
        ['[{"a": 1, "x": 1}]'],
    ),
    "beside a reference": (
        {**B, **REF_A, "$defs": DEFS},
        ['{"a": 1, "b": 1}', '{"a": 1}'],
        ['{"a": 1, "x": 1}'],
    ),
    "beside one that is open": (
        {"allOf": [A, {"type": "object", "additionalProperties": True}]},
        ['{"a": 1, "x": 1}'],
        [],
    ),
    "itself": (
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        ['{"a": {"a": {}}}'],
        ['{"a": {"x": 1}}'],
    ),
}


def test_names_that_are_texts_need_not_be_said_to_be() -> None:
    record = {"type": "object", "additionalProperties": True, "propertyNames": {"type": "string"}}
    assert (
        "propertyNames" not in close_objects({"properties": {"map": record}})["properties"]["map"]
    )
    assert "propertyNames" in close_objects({"propertyNames": {"maxLength": 2}})


@pytest.mark.parametrize("name", CASES)
def test_what_is_allowed_then(name: str) -> None:
    schema, allowed, others = CASES[name]
    closed = close_objects(schema)
    assert all(valid(closed, document) for document in allowed), closed
    assert not any(valid(closed, document) for document in others), closed
    assert all(valid(schema, document) for document in (*allowed, *others))


def chain(depth: int) -> dict[str, Any]:
    """Definitions of which each refers to the next one twice."""
    defs: dict[str, Any] = {
        f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2, "properties": {f"p{n}": {}}}
        for n in range(depth)
    }
    return {"$ref": "#/$defs/a0", "properties": {"x": {}}, "$defs": {**defs, f"a{depth}": A}}


def test_a_part_is_followed_once_however_often_it_is_referred_to() -> None:
    closed = close_objects(chain(40))
    assert list(closed["properties"])[:3] == ["x", "p0", "p1"] and len(closed["properties"]) == 42
    assert closed["additionalProperties"] is False


def test_what_would_be_large_is_refused() -> None:
    names: dict[str, Any] = {str(n): {} for n in range(5000)}
    both = {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {}}}]}
    schema = {"prefixItems": [both] * 100, "$defs": {"a": {"properties": names}}}
    with pytest.raises(RequestError, match="refers to its own parts too often"):
        close_objects(schema)
