"""Answers that are JSON of a given schema: what may come next, token by token, by way of llguidance
(the extra ``structured``).

A schema is worked through on the thread that asks, once, and kept. On the inference thread it is
one more of mlx-lm's logits processors, which leaves a token its chance only where the document can
go on with it; the end of text has one exactly where the document is complete. Documents have one
form: no white space but a blank after each comma and colon, so that none is spent on an endless
indentation.
"""

import json
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlx_onevision.errors import RequestError
from mlx_onevision.interpreter import MISSING, find_interpreter, import_path

if TYPE_CHECKING:
    import mlx.core as mx
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

LONGEST = 1 << 18  # characters of a schema
KEPT = 16  # schemas that are not worked through again
SECONDS = 5.0  # that working through one may take
MEMORY = 1 << 30  # bytes
POLL_SECONDS = 0.05

# A property that is named twice counts once, so more of them than one cannot be promised.
MOST_PROPERTIES_PROMISED = 1

OPTIONS: "JsonCompileOptions" = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
# A quarter of llguidance's own and less: a step of one answer must not hold the others up. Nothing
# is worked out for all words beforehand, so that a schema that could be worked through once can be
# again, with any vocabulary.
LIMITS = {
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class Vocabulary(Protocol):
    """A tokenizer."""

    def __len__(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str) -> list[int]: ...


def available() -> bool:
    """Whether llguidance is installed; it is not imported."""
    return find_spec("llguidance") is not None


class Grammars:
    """Makes and keeps the grammars of schemas, for one model. From any thread."""

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        """ends : the ids that end an answer."""
        self._vocabulary, self._ends = vocabulary, tuple(ends)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def of(
        self, schema: str | bool | Mapping[str, Any], check: Callable[[], None] = lambda: None
    ) -> "Grammar":
        """The grammar of a JSON Schema, given as JSON text or as what that would be in Python.

        check : called while a schema is worked through; ends it by raising.

        Raises:
            RequestError: in one sentence, for a schema that is none, that uses what is not
                supported, that is too large, or that allows no document.
        """
        text = _normal(schema)
        if not available():
            raise RequestError(
                "answers that keep to a JSON schema need llguidance; "
                "pip install 'mlx-onevision[structured]'"
            )
        if not self._ends:
            raise RequestError(
                "the model's files name no end-of-text token, so an answer to a JSON schema "
                "would have no end; add one to generation_config.json"
            )
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        _try(text, check)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._vocabulary, self._ends)
        grammar = Grammar(_matcher(self._tokenizer, text))
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar


class Grammar:
    """A schema, ready to be followed by any number of answers."""

    def __init__(self, start: "LLMatcher") -> None:
        self._start = start

    def guide(self, said: Sequence[int] = ()) -> "Guide":
        """For one answer. said : its tokens so far, where it goes on from there."""
        matcher = self._start.deep_copy()
        matcher.consume_tokens(list(said))
        return Guide(matcher)


class Guide:
    """A logits processor of mlx-lm's, for one answer. On the inference thread.

    It does not raise, for that would end all answers of a batch: what went wrong is in ``failure``,
    and what the answer has come to since is worth nothing.
    """

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher
        self._begun = False
        self.failure: str | None = None

    def __call__(self, tokens: "mx.array", logits: "mx.array") -> "mx.array":
        """Logits (1, vocabulary), -inf for what cannot come next.

        tokens : the prompt's and the answer's, of which the last has come since the last call.
        """
        if self.failure is None:
            try:
                return self._guided(tokens, logits)
            except Exception as error:
                self.failure = _line(f"{type(error).__name__}: {error}")
        return logits

    def _guided(self, tokens: "mx.array", logits: "mx.array") -> "mx.array":
        import mlx.core as mx

        matcher = self._matcher
        if self._begun:
            matcher.consume_token(int(np.array(tokens[-1])))
        self._begun = True
        if matcher.stop_reason() == "EndOfSentence":
            return logits  # of a token that mlx-lm computes ahead, and that nobody will see
        allowed = _allowed(matcher)
        if allowed is None:
            self.failure = _line(matcher.get_error())
            return logits
        mask = np.zeros(logits.shape[-1], bool)  # rows that no token has are never allowed
        known = min(len(mask), len(allowed))
        mask[:known] = allowed[:known]
        return mx.where(mx.array(mask), logits, -mx.inf)


def _allowed(matcher: "LLMatcher") -> np.ndarray | None:
    """Which tokens can come next, bool (tokens,); None where none can."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = np.unpackbits(bits, bitorder="little").astype(bool)
    return None if matcher.is_error() or not allowed.any() else allowed


def _normal(schema: str | bool | Mapping[str, Any]) -> str:
    """A schema as JSON text, without what would loosen it."""
    try:
        if not isinstance(schema, str):
            schema = json.dumps(schema, allow_nan=False)
        if len(schema) > LONGEST:
            raise RequestError(
                f"the JSON schema has {len(schema)} characters; {LONGEST} are read at most"
            )
        values = json.loads(schema)
        if isinstance(values, bool):
            values = {} if values else {"allOf": [False]}
        if not isinstance(values, dict):
            raise RequestError("the JSON schema is no schema; give an object")
        values.pop("x-guidance", None)  # llguidance's own settings
        if _promises(values):
            raise RequestError(
                f"the JSON schema has a minProperties above {MOST_PROPERTIES_PROMISED}, which is "
                "not supported; name the properties as required"
            )
        return json.dumps(values, allow_nan=False)
    except RecursionError:
        raise RequestError("the JSON schema is nested too deeply; simplify it") from None
    except (ValueError, TypeError):
        raise RequestError("the JSON schema is not valid JSON") from None


def _promises(schema: Any) -> bool:
    """Whether a number of properties is asked for that repeated names could make up."""
    if isinstance(schema, list):
        return any(map(_promises, schema))
    if not isinstance(schema, dict):
        return False
    least = schema.get("minProperties")
    if isinstance(least, int | float) and least > MOST_PROPERTIES_PROMISED:
        return True
    data = ("const", "enum", "default", "examples", "example")
    return any(_promises(value) for key, value in schema.items() if key not in data)


def _try(schema: str, check: Callable[[], None]) -> None:
    """Works through a schema in a process of its own, see :mod:`schema_trial`."""
    interpreter = find_interpreter()
    if interpreter is None:
        raise RequestError(f"JSON schemas are worked through by {MISSING}")
    request = {
        "path": import_path(),
        "options": OPTIONS,
        "limits": LIMITS,
        "memory": MEMORY,
        "seconds": SECONDS,
    }
    program = str(Path(__file__).with_name("schema_trial.py"))
    process = subprocess.Popen(
        [interpreter, "-I", program, json.dumps(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is this process's business
    )
    late = time.monotonic() + SECONDS
    try:
        said = b""
        given: bytes | None = schema.encode()
        while time.monotonic() < late:
            check()
            try:
                said, _ = process.communicate(given, timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                given = None
        error = json.loads(said)
    except ValueError:
        raise RequestError(
            "the JSON schema takes too much time or memory to work through; simplify it"
        ) from None
    finally:
        process.kill()
        process.communicate()
    if error is not None:
        raise _refusal(error)


def _tokenizer(vocabulary: Vocabulary, ends: Sequence[int]) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    class Tokens:
        """A vocabulary as llguidance wants one. Control tokens have no bytes, so they never fit;
        nor does an end-of-text token that is a word, as a word.
        """

        eos_token_id = ends[0]
        bos_token_id = None
        tokens = tuple(
            b"" if token in ends else vocabulary.token_bytes(token)
            for token in range(max(len(vocabulary), max(ends) + 1))
        )

        def __call__(self, text: str) -> list[int]:
            return vocabulary.encode(text)

    return LLTokenizer(
        TokenizerWrapper(Tokens()), eos_token=list(ends), slices=LLTokenizer.json_slices()
    )


def _matcher(tokenizer: "LLTokenizer", schema: str) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
    if matcher.is_error() or _allowed(matcher) is None:
        raise _refusal(matcher.get_error())
    return matcher


def _refusal(error: str) -> RequestError:
    """llguidance's error in one sentence."""
    line = _line(error)
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


def _line(text: str) -> str:
    """At most 160 characters on one line; of a pattern's error the reason, without the pattern."""
    kind, pattern, reason = text.rpartition("\nerror: ")
    if pattern:
        text = f"{kind.partition(':')[0]}: {reason}"
    text = " ".join(text.replace("<non-verbose/>", "").split()).rstrip(".")
    return text if len(text) <= 160 else f"{text[:159]}…"
