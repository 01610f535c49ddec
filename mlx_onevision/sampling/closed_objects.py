"""Closes objects in JSON schemas that list their properties and leave open whether others may
follow.

By JSON Schema they may. A model that has written the listed properties would then continue with
invented names until its tokens are used up, so such an object is closed, as in llama.cpp. Where
several parts of a schema apply to the same object, it is closed around the properties of all.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard
from urllib.parse import unquote

from mlx_onevision.errors import RequestError

LISTED = ("properties", "patternProperties")
CLOSING = ("additionalProperties", "unevaluatedProperties")
ALTERNATIVES = ("anyOf", "oneOf")
MOST_VISITED = 200_000  # parts and names, where the names of several parts are put together


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a parsed JSON value is an object."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a parsed JSON value is an array."""
    return isinstance(value, list)


def close_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of the schema in which such objects are closed.

    Raises:
        RequestError: where more than ``MOST_VISITED`` parts and names are to be put together.
    """
    closer = _Closer(schema)
    closed = closer.closed(schema)
    if closer.copies:
        closed["$defs"] = {**closed.get("$defs", {}), **closer.copies}
    return closed


def target(whole: Mapping[str, Any], reference: str) -> Any:
    """The part of a schema that a JSON pointer such as ``#/$defs/name`` refers to, or None."""
    found: Any = whole
    for key in reference[1:].split("/")[1:]:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        if is_array(found) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif is_object(found) and key in found:
            found = found[key]
        else:
            return None
    return found


class _Closer:
    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._names: dict[str, str] = {}  # of copies, by reference
        self._targets: dict[str, Any] = {}
        self._left = MOST_VISITED
        self.copies: dict[str, Any] = {}
        """Copies of definitions that stay open, for references beside other parts of a schema."""

    def closed(self, schema: Any, is_open: bool = False) -> Any:
        """A schema with its objects closed.

        is_open : whether the object itself stays open, because another part of the schema closes
            it; those in it are closed.
        """
        if not is_object(schema):
            return schema
        made = {name: self._inner(name, value) for name, value in schema.items()}
        if made.get("propertyNames") == {"type": "string"}:  # always true; zod writes it
            del made["propertyNames"]
        listed = any(name in schema for name in LISTED)
        several = listed + sum(1 for _ in _parts_beside(schema)) > 1
        for name in ("allOf", *ALTERNATIVES):
            if is_array(parts := schema.get(name)):
                made[name] = [self.closed(part, is_open or several) for part in parts]
        if "$ref" in schema and (is_open or several):
            made["$ref"] = self._open(schema["$ref"])
        if is_open or any(name in schema for name in CLOSING):
            return made
        if not several:
            return {**made, "additionalProperties": False} if listed else made
        names = self._listed(schema, set())
        if names:
            every = {**dict.fromkeys(names, True), **made.get("properties", {})}
            made |= {"properties": every, "additionalProperties": False}
        return made

    def _inner(self, name: str, value: Any) -> Any:
        """A keyword's value, with its schemas closed where they are for parts of a document."""
        if name in ("$defs", "definitions", *LISTED) and is_object(value):
            return {key: self.closed(part) for key, part in value.items()}
        if name in ("items", "prefixItems", "additionalProperties", "contains"):
            if is_array(value):
                return [self.closed(part) for part in value]
            return self.closed(value)
        return value

    def _open(self, reference: Any) -> Any:
        """A reference to a copy that stays open; itself where it leads nowhere."""
        found = self._target(reference) if _is_local(reference) else None
        if found is None:
            return reference
        if reference not in self._names:
            taken = self._whole.get("$defs", {})
            name = f"open-{len(self._names)}"
            while name in taken:
                name += "-"
            self._names[reference] = name
            self.copies[name] = self.closed(found, is_open=True)
        return f"#/$defs/{self._names[reference]}"

    def _listed(self, schema: Any, followed: set[str]) -> dict[str, None] | None:
        """The names of all properties that the parts of a schema list for the same object; None
        where one of them already defines which others there may be.

        followed : references whose names were found before, to which this adds. Each is followed
            once: two references to the same part would double the work at every level.
        """
        self._charge(1)
        if not is_object(schema):
            return {}
        if "patternProperties" in schema or any(schema.get(n, False) is not False for n in CLOSING):
            return None
        found: dict[str, None] = dict.fromkeys(schema.get("properties", {}))
        self._charge(len(found))
        parts = [part for n in ("allOf", *ALTERNATIVES) for part in schema.get(n, ())]
        reference = schema.get("$ref")
        if reference is not None:
            if not _is_local(reference):
                return None
            if reference not in followed:
                followed.add(reference)
                parts.append(self._target(reference))
        for part in parts:
            names = self._listed(part, followed)
            if names is None:
                return None
            found |= names
        return found

    def _charge(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise RequestError("the JSON schema refers to its own parts too often; simplify it")

    def _target(self, reference: str) -> Any:
        if reference not in self._targets:
            self._targets[reference] = target(self._whole, reference)
        return self._targets[reference]


def _parts_beside(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The parts that apply to the same document at once; alternatives are one part."""
    every = schema.get("allOf")
    yield from every if is_array(every) else ()
    yield from (schema[name] for name in (*ALTERNATIVES, "$ref") if name in schema)


def _is_local(reference: object) -> TypeGuard[str]:
    return isinstance(reference, str) and reference.startswith("#")
