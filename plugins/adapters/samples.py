"""A document of a JSON Schema, always the same, for a backend without a model; standard library
only. It knows the usual keywords; others are refused.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_onevision.plugins.contract.errors import bad_request

DEEPEST = 16  # references and parts within each other

KNOWN = frozenset(
    """$comment $defs $id $ref $schema additionalProperties allOf anyOf const default definitions
    deprecated description enum examples exclusiveMaximum exclusiveMinimum items maxItems maxLength
    maximum minItems minLength minimum oneOf prefixItems properties required title type""".split()
)
SAYINGS = ("title", "description", "default", "examples", "$comment")
MOST_ITEMS = 1000


def document(schema: str) -> list[str]:
    """A document that a JSON Schema allows, always the same, in pieces.

    Raises:
        PluginError: ``bad_request``, for keywords that are not known here, and where there is none.
    """
    whole = json.loads(schema)
    try:
        text = json.dumps(_value(whole, whole, 0), ensure_ascii=False)
    except (AttributeError, TypeError, ValueError, OverflowError):  # keywords of other types
        raise bad_request("the JSON schema is no JSON Schema") from None
    return re.findall(r"\s*(?:\w+|.)", text, re.DOTALL)


class _Nothing(Exception):
    """There is no such value."""


def _value(schema: Any, whole: Any, depth: int) -> Any:
    try:
        return _made(schema, whole, depth)
    except _Nothing:
        if depth:
            raise
        raise bad_request("the JSON schema allows no document", "change it") from None


def _made(schema: Any, whole: Any, depth: int) -> Any:
    if schema is True:
        return None
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        raise _Nothing
    unknown = sorted(schema.keys() - KNOWN)
    if unknown:
        raise bad_request(f"the JSON schema has {unknown[0]!r}, which is not supported")
    if "$ref" in schema:
        return _value(_merged([schema, _target(schema["$ref"], whole)], "$ref"), whole, depth + 1)
    if "allOf" in schema:
        return _value(_merged([schema, *schema["allOf"]], "allOf"), whole, depth + 1)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            parts = [_merged([schema, part], name) for part in schema[name]]
            return _first(parts, whole, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        if not schema["enum"]:
            raise _Nothing
        return schema["enum"][0]
    kind = schema.get("type", _kind(schema))
    if isinstance(kind, list):
        return _first([{**schema, "type": one} for one in kind], whole, depth)
    if kind == "object":
        return _object(schema, whole, depth)
    if kind == "array":
        return list(_items(schema, whole, depth))
    if kind == "string":
        least, most = schema.get("minLength", 0), schema.get("maxLength", MOST_ITEMS)
        if least > most:
            raise _Nothing
        return "text"[:most].ljust(least, "x")
    if kind in ("integer", "number"):
        return _integer(schema) if kind == "integer" else _number(schema)
    if kind in ("boolean", "null"):
        return True if kind == "boolean" else None
    raise bad_request(f"the JSON schema has the type {kind!r}, which does not exist")


def _kind(schema: Mapping[str, Any]) -> str:
    """The type that the keywords of a schema without one are about."""
    named = {"properties": "object", "required": "object", "items": "array", "minItems": "array"}
    named |= {"minLength": "string", "maxLength": "string", "minimum": "number"}
    return next((kind for name, kind in named.items() if name in schema), "null")


def _first(schemas: Sequence[Any], whole: Any, depth: int) -> Any:
    for schema in schemas:
        try:
            return _value(schema, whole, depth or 1)
        except _Nothing:
            pass
    raise _Nothing


def _merged(parts: Sequence[Any], without: str) -> Any:
    """One schema for several that all hold, without the keyword of the first that named them."""
    if False in parts:
        raise _Nothing
    made: dict[str, Any] = {}
    for place, part in enumerate(part for part in parts if part is not True):
        for key, value in part.items():
            if place == 0 and key == without:
                continue
            before = made.setdefault(key, value)
            if key in ("properties", "$defs", "definitions"):
                both = {
                    name: {"allOf": [before[name], value[name]]}
                    for name in before.keys() & value.keys()
                }
                made[key] = {**before, **value, **(both if before is not value else {})}
            elif key == "required":
                made[key] = [*before, *value]
            elif before != value and key not in SAYINGS:
                raise bad_request(f"the JSON schema says two things about {key}")
    return made


def _target(reference: str, whole: Any) -> Any:
    found = whole
    for key in reference.removeprefix("#").split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or key not in found:
            raise bad_request(f"the JSON schema has no {reference[:80]!r}")
        found = found[key]
    return found


def _object(schema: Mapping[str, Any], whole: Any, depth: int) -> dict[str, Any]:
    required, known = schema.get("required", []), schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    made: dict[str, Any] = {}
    for name in [*known, *(name for name in required if name not in known)]:
        try:
            made[name] = _value(known.get(name, others), whole, depth + 1)
        except _Nothing:
            if name in required:
                raise
    return made


def _items(schema: Mapping[str, Any], whole: Any, depth: int) -> Iterator[Any]:
    first = schema.get("prefixItems", [])
    least, most = schema.get("minItems", 0), schema.get("maxItems", MOST_ITEMS)
    if least > most:
        raise _Nothing
    for place in range(min(max(least, len(first), 1), most)):
        try:
            part = first[place] if place < len(first) else schema.get("items", True)
            yield _value(part, whole, depth + 1)
        except _Nothing:
            if place < least:
                raise
            return


def _integer(schema: Mapping[str, Any]) -> int:
    """1, or what is nearest to it."""
    low = max(
        math.ceil(schema["minimum"]) if "minimum" in schema else -(1 << 63),
        math.floor(schema["exclusiveMinimum"]) + 1 if "exclusiveMinimum" in schema else -(1 << 63),
    )
    high = min(
        math.floor(schema["maximum"]) if "maximum" in schema else 1 << 63,
        math.ceil(schema["exclusiveMaximum"]) - 1 if "exclusiveMaximum" in schema else 1 << 63,
    )
    if low > high:
        raise _Nothing
    return min(max(1, low), high)


def _number(schema: Mapping[str, Any]) -> float:
    """In the middle of what is allowed."""
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    if low > high or (low == high and {"exclusiveMinimum", "exclusiveMaximum"} & schema.keys()):
        raise _Nothing
    if math.isinf(low):
        return 1.5 if math.isinf(high) else high - 1
    return low + 1 if math.isinf(high) else (low + high) / 2
