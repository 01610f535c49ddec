"""Objects in JSON schemas that list their properties and do not say whether there may be others.

In JSON Schema there may. A model that has written the properties would then go on with names of its
own until its tokens are used up, so here such an object is closed, as in llama.cpp. Where several
parts of a schema hold for the same object, it is closed around the properties of all of them.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

LISTED = ("properties", "patternProperties")
SAID = ("additionalProperties", "unevaluatedProperties")
ALTERNATIVES = ("anyOf", "oneOf")


def close_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with such objects closed."""
    closer = _Closer(schema)
    closed = closer.closed(schema)
    if closer.copies:
        closed["$defs"] = {**closed.get("$defs", {}), **closer.copies}
    return closed


def target(whole: Mapping[str, Any], reference: str) -> Any:
    """What a reference within a schema stands for; None where there is nothing."""
    found: Any = whole
    for key in reference[1:].split("/")[1:]:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, Mapping) and key in found:
            found = found[key]
        else:
            return None
    return found


class _Closer:
    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._names: dict[str, str] = {}  # of copies, by reference
        self.copies: dict[str, Any] = {}
        """Of definitions, left open: for where other parts of a schema hold beside them."""

    def closed(self, schema: Any, is_open: bool = False) -> Any:
        """is_open : another part of the schema closes the object itself, but not those in it."""
        if not isinstance(schema, dict):
            return schema
        made = {name: self._inner(name, value) for name, value in schema.items()}
        if made.get("propertyNames") == {"type": "string"}:  # as they all are; zod writes it
            del made["propertyNames"]
        listed = any(name in schema for name in LISTED)
        several = listed + sum(1 for _ in _parts_beside(schema)) > 1
        for name in ("allOf", *ALTERNATIVES):
            if isinstance(schema.get(name), list):
                made[name] = [self.closed(part, is_open or several) for part in schema[name]]
        if "$ref" in schema and (is_open or several):
            made["$ref"] = self._open(schema["$ref"])
        if is_open or any(name in schema for name in SAID):
            return made
        if not several:
            return {**made, "additionalProperties": False} if listed else made
        names = self._listed(schema, frozenset())
        if names:
            every = {**dict.fromkeys(names, True), **made.get("properties", {})}
            made |= {"properties": every, "additionalProperties": False}
        return made

    def _inner(self, name: str, value: Any) -> Any:
        """The schemas of parts of a document."""
        if name in ("$defs", "definitions", *LISTED) and isinstance(value, dict):
            return {key: self.closed(part) for key, part in value.items()}
        if name in ("items", "prefixItems", "additionalProperties", "contains"):
            parts = isinstance(value, list)
            return [self.closed(part) for part in value] if parts else self.closed(value)
        return value

    def _open(self, reference: Any) -> Any:
        found = target(self._whole, reference) if _is_local(reference) else None
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

    def _listed(self, schema: Any, within: frozenset[str]) -> dict[str, None] | None:
        """The names of all properties that parts of a schema list for the same object; None where
        one of them says which others there may be.
        """
        if not isinstance(schema, dict):
            return {}
        if "patternProperties" in schema or any(schema.get(n, False) is not False for n in SAID):
            return None
        found: dict[str, None] = dict.fromkeys(schema.get("properties", {}))
        parts = [(part, within) for n in ("allOf", *ALTERNATIVES) for part in schema.get(n, ())]
        reference = schema.get("$ref")
        if reference is not None:
            if not _is_local(reference):
                return None
            if reference not in within:
                parts.append((target(self._whole, reference), within | {reference}))
        for part, around in parts:
            names = self._listed(part, around)
            if names is None:
                return None
            found |= names
        return found


def _parts_beside(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The parts that hold at once for the same document, alternatives as one."""
    every = schema.get("allOf")
    yield from every if isinstance(every, list) else ()
    yield from (schema[name] for name in (*ALTERNATIVES, "$ref") if name in schema)


def _is_local(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith("#")
