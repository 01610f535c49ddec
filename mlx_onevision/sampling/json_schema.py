"""Untrusted JSON schemas: checked, and compiled where that can do no harm.

llguidance refuses what it cannot promise (see its ``docs/json_schema.md``). What it would promise
and not keep is refused here: a number of properties that one name, written twice, would make up,
and a document that never ends.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.closed_objects import close_objects, target
from mlx_onevision.subprocesses import MISSING, BoundedProcess, find_interpreter

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST = 1 << 18  # characters
DEEPEST = 100  # objects and lists in each other; llguidance reads 128
PROCESS = "mlx_onevision.sampling.json_schema_process"
SECONDS = 5.0  # that compiling one may take
MEMORY = 1 << 30  # bytes

MOST_PROMISED = 1  # a property that is named twice counts once, so more cannot be promised
MOST_LOOKED_AT = 20_000  # parts of a schema, when it is asked whether a document can end

OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
# A quarter of llguidance's own and less: a step of one answer must not hold the others up. Nothing
# is computed for the whole vocabulary beforehand, so that a schema that compiled once does so
# again, with any vocabulary.
LIMITS = {
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


def normal(schema: str | bool | Mapping[str, Any]) -> str:
    """A schema as JSON text, without what would loosen it, its objects closed as
    :mod:`~mlx_onevision.sampling.closed_objects` says.

    schema : as JSON text, or as what that would be in Python.

    Raises:
        RequestError: for what is none, is too long, or promises what cannot be kept.
    """
    try:
        if not isinstance(schema, str):
            schema = json.dumps(schema, allow_nan=False)
        if len(schema) > LONGEST:
            raise RequestError(
                f"the JSON schema has {len(schema)} characters; {LONGEST} are read at most"
            )
        values = json.loads(schema)
        if _is_deep(values):
            raise RecursionError
        if isinstance(values, bool):
            values = {} if values else {"allOf": [False]}
        if not isinstance(values, dict):
            raise RequestError("the JSON schema is no schema; give an object")
        # llguidance's own settings, of which one is anybody's.
        own = values.pop("x-guidance", None)
        lenient = isinstance(own, dict) and own.get("lenient") is True
        if _promises(values):
            raise RequestError(
                f"the JSON schema has a minProperties above {MOST_PROMISED}, which is not "
                "supported; name the properties as required"
            )
        if not _Endings(values).possible(values):
            raise RequestError("the JSON schema allows no document that ends; change it")
        closed = close_objects(values)
        settings = {"x-guidance": {"lenient": True}} if lenient else {}
        return json.dumps({**closed, **settings}, allow_nan=False)
    except RecursionError:
        raise RequestError("the JSON schema is nested too deeply; simplify it") from None
    except (ValueError, TypeError):
        raise RequestError("the JSON schema is not valid JSON") from None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _promises(schema: Any) -> bool:
    """Whether a number of properties is asked for that repeated names could make up."""
    if isinstance(schema, list):
        return any(map(_promises, schema))
    if not isinstance(schema, dict):
        return False
    least = schema.get("minProperties")
    if isinstance(least, int | float) and least > MOST_PROMISED:
        return True
    return any(map(_promises, schema.values()))


class _Endings:
    """Whether a document can come to an end, or needs a part that needs itself."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._within: set[str] = set()  # references that are being followed
        self._known: set[str] = set()  # those that come to an end
        self._left = MOST_LOOKED_AT

    def possible(self, schema: Any) -> bool:
        """True where it is not known: this looks for one mistake only."""
        self._left -= 1
        if not isinstance(schema, Mapping) or self._left < 0 or {"const", "enum"} & schema.keys():
            return True
        for name, needed in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            parts = schema.get(name)
            if isinstance(parts, list) and parts and not needed(map(self.possible, parts)):
                return False
        return all(map(self.possible, self._needed(schema))) and self._followed(schema.get("$ref"))

    def _needed(self, schema: Mapping[str, Any]) -> Iterator[Any]:
        """The parts that every document has."""
        if schema.get("type") == "object":
            known, names = schema.get("properties"), schema.get("required")
            if isinstance(known, Mapping) and isinstance(names, list):
                yield from (
                    known[name] for name in names if isinstance(name, str) and name in known
                )
        least = schema.get("minItems")
        if schema.get("type") == "array" and type(least) is int and least > 0:
            first = schema.get("prefixItems")
            first = first if isinstance(first, list) else []
            yield from first[:least]
            if least > len(first):
                yield schema.get("items")

    def _followed(self, reference: Any) -> bool:
        if not isinstance(reference, str) or not reference.startswith("#"):
            return True
        if reference in self._known:
            return True
        if reference in self._within:
            return False
        found = target(self._whole, reference)
        if found is None:
            return True
        self._within.add(reference)
        ends = self.possible(found)
        self._within.remove(reference)
        if ends:
            self._known.add(reference)
        return ends


def options(schema: str) -> "JsonCompileOptions":
    """llguidance's, for a normal schema; lenient where that says so itself."""
    own = json.loads(schema).get("x-guidance", {})
    return {**OPTIONS, "lenient": own.get("lenient", False)}


def compile_schema(schema: str, check: Callable[[], None]) -> None:
    """Tries a schema in a process of its own, see :mod:`json_schema_process`.

    check : called meanwhile; ends it by raising.

    Raises:
        RequestError: for a schema that cannot be followed, or that takes too much.
    """
    interpreter = find_interpreter()
    if interpreter is None:
        raise RequestError(f"JSON schemas are compiled by {MISSING}")
    process = BoundedProcess(interpreter, PROCESS, memory=MEMORY, seconds=SECONDS)
    with closing(process):
        try:
            request = {"schema": schema, "options": options(schema), "limits": LIMITS}
            error = process.ask(request, check)
        except (TimeoutError, EOFError):
            raise RequestError(
                "the JSON schema takes too much time or memory to compile; simplify it"
            ) from None
    if error is not None:
        raise refusal(error)


def refusal(error: str) -> RequestError:
    """llguidance's error in one sentence."""
    line = line_of(error)
    kind, _, rest = line.partition(": ")
    if kind == "Unsatisfiable schema":
        return RequestError(f"the JSON schema allows no document ({rest}); change it")
    if kind.startswith("NoExtension"):
        return RequestError("the JSON schema allows no document; change it")
    if kind == "Unimplemented keys":
        return RequestError(f"the JSON schema has {rest.strip('[]')}, which is not supported")
    if kind.startswith("oneOf"):
        return RequestError(
            "the JSON schema has a oneOf of which several parts may hold at once, which is not "
            "supported; write anyOf"
        )
    return RequestError(f"the JSON schema cannot be followed ({line}); simplify it")


def line_of(text: str) -> str:
    """At most 160 characters on one line; of a pattern's error the reason, without the pattern."""
    kind, pattern, reason = text.rpartition("\nerror: ")
    if pattern:
        text = f"{kind.partition(':')[0]}: {reason}"
    text = " ".join(text.replace("<non-verbose/>", "").split()).rstrip(".")
    return text if len(text) <= 160 else f"{text[:159]}…"
