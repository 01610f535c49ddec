"""Answers that are JSON of a given schema, with llguidance (the extra ``structured``).

A schema is compiled once, on the calling thread, and kept. On the inference thread it is a logits
processor that masks every token with which the document cannot go on; the end of text is allowed
exactly where the document is complete. The only white space is a blank after each comma and colon,
so that no answer ends in endless indentation.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling import json_schema
from mlx_onevision.sampling.json_schema import line_of

if TYPE_CHECKING:
    import mlx.core as mx
    from llguidance import LLMatcher, LLTokenizer

MOST_KEPT = 16  # compiled schemas


class Vocabulary(Protocol):
    """A tokenizer."""

    def __len__(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str) -> list[int]: ...


def available() -> bool:
    """Whether llguidance is installed; it is not imported."""
    return find_spec("llguidance") is not None


class Grammars:
    """Compiles and keeps the grammars of schemas, for one model, from any thread.

    ends : the ids that end an answer.
    """

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        self._vocabulary, self._ends = vocabulary, frozenset(ends)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def of(
        self, schema: str | bool | Mapping[str, Any], check: Callable[[], None] = lambda: None
    ) -> "Grammar":
        """The grammar of a JSON Schema, given as JSON text or as what that would be in Python.

        check : called while a schema is compiled; ends it by raising.

        Raises:
            RequestError: for a schema that is invalid, unsupported, too large or unsatisfiable.
        """
        text = json_schema.normal(schema)
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
        json_schema.compile_schema(text, check)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._vocabulary, self._ends)
        grammar = Grammar(_matcher(self._tokenizer, text))
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return grammar


class Grammar:
    """A compiled schema."""

    def __init__(self, start: "LLMatcher") -> None:
        self._start = start

    def guide(self, tokens: Sequence[int] = ()) -> "Guide":
        """For one answer, of which ``tokens`` are there already."""
        matcher = self._start.deep_copy()
        matcher.consume_tokens(list(tokens))
        return Guide(matcher)


class Guide:
    """A logits processor for one answer. To raise would end a whole batch: an error is left in
    ``failure``, and the answer is invalid from there on.
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
                self.failure = line_of(f"{type(error).__name__}: {error}")
        return logits

    def _guided(self, tokens: "mx.array", logits: "mx.array") -> "mx.array":
        import mlx.core as mx

        matcher = self._matcher
        if self._begun:
            matcher.consume_token(int(np.array(tokens[-1])))
        self._begun = True
        if matcher.stop_reason() == "EndOfSentence":
            return logits  # of a token that mlx-lm computes ahead, which is dropped
        allowed = _allowed(matcher)
        if allowed is None:
            self.failure = line_of(matcher.get_error())
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


def _tokenizer(vocabulary: Vocabulary, ends: frozenset[int]) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    class Tokens:
        """Control tokens have no bytes, so they never fit, nor do end-of-text tokens as words. Text
        that a schema prescribes is tokenized by the model's own tokenizer.
        """

        eos_token_id = min(ends)
        bos_token_id = None
        tokens = tuple(
            b"" if token in ends else vocabulary.token_bytes(token)
            for token in range(max(len(vocabulary), max(ends) + 1))
        )

        def __call__(self, text: str) -> list[int]:
            ids = vocabulary.encode(text)
            return ids if made is None or ends.isdisjoint(ids) else made.greedy_tokenize(text)

    made: LLTokenizer | None = None
    slices = LLTokenizer.json_slices()
    made = LLTokenizer(TokenizerWrapper(Tokens()), eos_token=sorted(ends), slices=slices)
    return made


def _matcher(tokenizer: "LLTokenizer", schema: str) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides=json_schema.options(schema))
    limits = LLParserLimits(**json_schema.LIMITS)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error() or _allowed(matcher) is None:
        raise json_schema.refusal(matcher.get_error())
    return matcher
