"""Answers that are JSON of a given schema, with llguidance (the extra ``structured``).

A schema is compiled once, on the calling thread, and kept. On the inference thread it is a logits
processor that masks every token with which the document cannot continue; the end of text is allowed
only where the document is complete. Where the model would end its answer earlier, open strings and
brackets are closed instead. The only white space is a blank after each comma and colon, so that no
answer consists of endless indentation.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling import json_schema
from mlx_onevision.sampling.json_schema import line_of

if TYPE_CHECKING:
    import mlx.core as mx
    from llguidance import LLMatcher, LLTokenizer

MOST_KEPT = 16  # compiled schemas


class Vocabulary(Protocol):
    """The part of a tokenizer that is needed: bytes of tokens, and tokens of a text."""

    def __len__(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str) -> list[int]: ...


def available() -> bool:
    """Whether llguidance is installed; it is not imported."""
    return find_spec("llguidance") is not None


class Grammars:
    """Compiles the grammars of schemas for one model, and keeps the last ones. From any thread.

    ends : the ids that end an answer.
    """

    def __init__(self, vocabulary: Vocabulary, ends: Sequence[int]) -> None:
        self._vocabulary, self._ends = vocabulary, frozenset(ends)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._closing: Closing | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def of(
        self, schema: str | bool | Mapping[str, Any], check: Callable[[], None] = lambda: None
    ) -> "Grammar":
        """The grammar of a JSON Schema, as JSON text or as its value in Python.

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
                self._closing = Closing.of(self._vocabulary, self._ends)
        assert self._closing is not None
        grammar = Grammar(_matcher(self._tokenizer, text), self._closing)
        with self._lock:
            self._kept[text] = grammar
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return grammar


@dataclass(frozen=True)
class Closing:
    """The ids of the tokens that end an answer, and of those that close what is open in JSON."""

    ends: tuple[int, ...] = ()
    quote: int | None = None
    brackets: tuple[int, ...] = ()

    @classmethod
    def of(cls, vocabulary: Vocabulary, ends: Collection[int]) -> "Closing":
        """The tokens of a vocabulary."""
        ids: dict[bytes, int] = {}
        for token in range(len(vocabulary)):
            if token not in ends and (data := vocabulary.token_bytes(token)) in (b'"', b"}", b"]"):
                ids.setdefault(data, token)
        brackets = tuple(ids[data] for data in (b"}", b"]") if data in ids)
        return cls(tuple(sorted(ends)), ids.get(b'"'), brackets)

    def token(self, allowed: NDArray[np.bool_]) -> int | None:
        """The token that closes what is open; None where none can come next.

        allowed : (vocabulary,), which tokens can come next. Where both brackets can, they are
            characters of a string.
        """
        brackets = [token for token in self.brackets if allowed[token]]
        if len(brackets) == 1:
            return brackets[0]
        return self.quote if self.quote is not None and allowed[self.quote] else None


class Grammar:
    """A compiled schema."""

    def __init__(self, start: "LLMatcher", closing: Closing | None = None) -> None:
        self._start, self._closing = start, closing or Closing()

    def guide(self, tokens: Sequence[int] = ()) -> "Guide":
        """The logits processor of one answer that begins with ``tokens``."""
        matcher = self._start.deep_copy()
        matcher.consume_tokens(list(tokens))
        return Guide(matcher, self._closing)


class Guide:
    """A logits processor for one answer. An exception would end a whole batch; so an error is
    stored in ``failure``, and the answer is invalid from there on.
    """

    def __init__(self, matcher: "LLMatcher", closing: Closing) -> None:
        self._matcher, self._closing = matcher, closing
        self._begun = False
        self.failure: str | None = None

    def __call__(self, tokens: "mx.array", logits: "mx.array") -> "mx.array":
        """Logits (1, vocabulary), with -inf for tokens that cannot come next.

        tokens : (L,), of the prompt and the answer; the last has come since the last call.
        logits : (1, vocabulary).
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
            matcher.consume_token(int(np.array(tokens[-1], np.int64)))
        self._begun = True
        if matcher.stop_reason() == "EndOfSentence":
            return logits  # of a token that mlx-lm computes in advance, and that is dropped
        allowed = _allowed(matcher)
        if allowed is None:
            self.failure = line_of(matcher.get_error())
            return logits
        mask = np.zeros(logits.shape[-1], bool)  # rows that no token has are never allowed
        known = min(len(mask), len(allowed))
        mask[:known] = allowed[:known]
        close = self._closing.token(mask)
        ends = [end for end in self._closing.ends if end < len(mask)]
        if close is not None and not mask[ends].any():
            most = mx.max(logits[..., mx.array([close, *ends])], axis=-1, keepdims=True)
            logits = mx.put_along_axis(logits, mx.array([[close]]), most, axis=-1)
        return mx.where(mx.array(mask), logits, -mx.inf)


def _allowed(matcher: "LLMatcher") -> NDArray[np.bool_] | None:
    """Which tokens can come next, bool (vocabulary,); None where none can."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = np.unpackbits(bits, bitorder="little").astype(bool)
    return None if matcher.is_error() or not allowed.any() else allowed


def _tokenizer(vocabulary: Vocabulary, ends: frozenset[int]) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    class Tokens:
        """The vocabulary as llguidance reads it. Control tokens and the ends of an answer have no
        bytes, so that they never match as text. Text that a schema prescribes is tokenized by the
        model's tokenizer, except where that normalizes its characters: an answer is compared with
        a schema byte by byte.
        """

        eos_token_id = min(ends)
        bos_token_id = None
        tokens = tuple(
            b"" if token in ends else vocabulary.token_bytes(token)
            for token in range(max(len(vocabulary), max(ends) + 1))
        )

        def __call__(self, text: str) -> list[int]:
            ids = vocabulary.encode(text)
            same = b"".join(self.tokens[token] for token in ids) == text.encode()
            return ids if made is None or same else made.greedy_tokenize(text)

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
