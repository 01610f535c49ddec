"""Untrusted JSON schemas: checked, and compiled in a process that may crash.

llguidance refuses what it cannot enforce (see its ``docs/json_schema.md``). Refused here is what it
would accept and not enforce: a least number of properties, which repetitions of one name fulfil,
and a document that never ends.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypedDict

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.closed_objects import close_objects, is_array, is_object, target
from mlx_onevision.subprocesses import MISSING, BoundedProcess, find_interpreter

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST = 1 << 18  # characters
DEEPEST = 100  # objects and lists in each other; llguidance reads 128
PROCESS = "mlx_onevision.sampling.json_schema_process"
SECONDS = 5.0  # that compiling one may take
MEMORY = 1 << 30  # bytes

MOST_REQUIRED = 1  # minProperties: llguidance counts a name that is written twice as two
MOST_VISITED = 20_000  # parts of a schema, in the search for a document that ends

OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


class Limits(TypedDict):
    """Arguments of llguidance's ``LLParserLimits``."""

    step_lexer_fuel: int
    max_lexer_states: int
    precompute_large_lexemes: bool
    verbose_errors: bool


# A quarter of llguidance's defaults and less: a step of one answer must not delay the others.
# Nothing is precomputed for the whole vocabulary, so that a schema compiles with every vocabulary
# if it does with one.
LIMITS: Limits = {
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


def normal(schema: str | bool | Mapping[str, Any]) -> str:
    """A schema as JSON text, without settings that would weaken it, and with its objects closed by
    :mod:`~mlx_onevision.sampling.closed_objects`.

    schema : as JSON text, or as its value in Python.

    Raises:
        RequestError: for a schema that is invalid, too long, or cannot be enforced.
    """
    try:
        if not isinstance(schema, str):
            schema = json.dumps(schema, allow_nan=False)
        if len(schema) > LONGEST:
            raise RequestError(
                f"the JSON schema has {len(schema)} characters; {LONGEST} are read at most"
            )
        values: object = json.loads(schema)
        if _is_deep(values):
            raise RecursionError
        if isinstance(values, bool):
            values = {} if values else {"allOf": [False]}
        if not is_object(values):
            raise RequestError("the JSON schema is no schema; give an object")
        # llguidance's settings, of which callers may set one.
        own = values.pop("x-guidance", None)
        lenient = is_object(own) and own.get("lenient") is True
        if _counts_properties(values):
            raise RequestError(
                f"the JSON schema has a minProperties above {MOST_REQUIRED}, which is not "
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


def _is_deep(value: object) -> bool:
    """Whether objects and arrays are nested more than ``DEEPEST`` levels deep."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if is_object(value) else value if is_array(value) else ()
        level = inner
    return bool(level)


def _counts_properties(schema: Any) -> bool:
    """Whether a part of the schema has a ``minProperties`` above ``MOST_REQUIRED``."""
    if is_array(schema):
        return any(map(_counts_properties, schema))
    if not is_object(schema):
        return False
    least = schema.get("minProperties")
    if isinstance(least, int | float) and least > MOST_REQUIRED:
        return True
    return any(map(_counts_properties, schema.values()))


class _Endings:
    """Finds schemas whose documents cannot end, because a required part requires itself."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self._whole = whole
        self._within: set[str] = set()  # references that are being followed
        self._known: set[str] = set()  # those that come to an end
        self._left = MOST_VISITED

    def possible(self, schema: Any) -> bool:
        """Whether a document of the schema can end; True where that is not known."""
        self._left -= 1
        if not is_object(schema) or self._left < 0 or {"const", "enum"} & schema.keys():
            return True
        for name, needed in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            parts = schema.get(name)
            if is_array(parts) and parts and not needed(map(self.possible, parts)):
                return False
        return all(map(self.possible, self._needed(schema))) and self._followed(schema.get("$ref"))

    def _needed(self, schema: Mapping[str, Any]) -> Iterator[Any]:
        """The schemas of the parts that every document has."""
        if schema.get("type") == "object":
            known, names = schema.get("properties"), schema.get("required")
            if is_object(known) and is_array(names):
                yield from (
                    known[name] for name in names if isinstance(name, str) and name in known
                )
        least = schema.get("minItems")
        if schema.get("type") == "array" and type(least) is int and least > 0:
            first = schema.get("prefixItems")
            first = first if is_array(first) else []
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
    """Options of llguidance for a :func:`normal` schema, which may ask for ``lenient`` itself."""
    own = json.loads(schema).get("x-guidance", {})
    return {**OPTIONS, "lenient": own.get("lenient", False)}


def compile_schema(schema: str, check: Callable[[], None]) -> None:
    """Tries to compile a schema in a process of its own, see :mod:`json_schema_process`.

    check : called meanwhile; ends it by raising.

    Raises:
        RequestError: for a schema that cannot be compiled, or that takes too much time or memory.
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
    """An error of llguidance as one sentence."""
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
    """An error's text as one line of at most 160 characters; without the pattern that it quotes."""
    kind, pattern, reason = text.rpartition("\nerror: ")
    if pattern:
        text = f"{kind.partition(':')[0]}: {reason}"
    text = " ".join(text.replace("<non-verbose/>", "").split()).rstrip(".")
    return text if len(text) <= 160 else f"{text[:159]}…"
