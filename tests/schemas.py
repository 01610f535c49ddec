"""Schemas of the tests, each with what it is about, and a walk through what a grammar allows."""

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator

from mlx_onevision.prompt.tokenizer import Tokenizer
from mlx_onevision.sampling.grammar import Grammar, _allowed

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "enum": {"enum": ["red", "gr\u00fcn", 3, None, [1, "x"], {"a": True}, "日本語", '"', "\\\n"]},
    "const": {"const": {"shape": "circle", "sides": [0, -1.5]}},
    "boolean": {"type": "boolean"},
    "integers": {"type": "integer", "minimum": -12, "exclusiveMaximum": 1000},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500},
    "numbers": {"type": "number", "minimum": -1.5, "maximum": 20.25},
    "any number": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 2},
    "nested": {
        "type": "object",
        "properties": {"who": PERSON, "of": {"type": "array", "items": PERSON, "maxItems": 2}},
        "required": ["who"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {name: {"type": "integer", "maximum": 9, "minimum": 0} for name in "abcd"},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "free names": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "properties": {"a": {"const": 1}},
        "required": ["a"],
        "maxProperties": 3,
    },
    "named by pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-c]{1,2}$": {"type": "null"}},
        "additionalProperties": False,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"const": 1}, {"type": "string", "pattern": "^[a-f]{2,4}$"}],
        "items": {"type": "boolean"},
        "minItems": 2,
        "maxItems": 4,
    },
    "lengths": {"type": "string", "minLength": 2, "maxLength": 4},
    "date": {"type": "string", "format": "date"},
    "references": {
        "$defs": {
            "leaf": {"type": "integer", "minimum": 1, "maximum": 3},
            "tree": {
                "anyOf": [
                    {"$ref": "#/$defs/leaf"},
                    {
                        "type": "array",
                        "items": {"$ref": "#/$defs/tree"},
                        "minItems": 1,
                        "maxItems": 2,
                    },
                ]
            },
        },
        "$ref": "#/$defs/tree",
    },
    "one of several": {
        "anyOf": [PERSON, {"type": "null"}, {"type": "array", "items": PERSON, "maxItems": 1}]
    },
    "told apart": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "size": {"enum": sizes}},
                "required": ["kind", "size"],
                "additionalProperties": False,
            }
            for kind, sizes in (("round", [1, 2]), ("square", [3, 4]))
        ]
    },
    "all of several": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {
                "properties": {"a": {"minimum": 5, "maximum": 8}, "b": {"type": "null"}},
                "additionalProperties": False,
            },
        ]
    },
    "several types": {"type": ["integer", "null", "boolean"], "title": "x", "description": "y"},
    "loosened": {"type": "integer", "x-guidance": {"lenient": True}, "maximum": 3, "minimum": 0},
    "anything": True,
}


# Each takes llguidance minutes and more memory than there is, or overflows its stack.
HEAVY = {
    "multiples": {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967)]},
    "within": {
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "b": {
                "allOf": [
                    {"type": "string", "pattern": f"(.*[a-{chr(98 + n)}].*){{{n + 3}}}"}
                    for n in range(20)
                ]
            },
        },
    },
    "a long chain": {
        "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(5000)} | {"d5000": {}},
        "$ref": "#/$defs/d0",
    },
}


def valid(schema: Any, text: str) -> bool:
    """Whether a text is JSON that a schema allows."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return Draft202012Validator(schema).is_valid(value)


def walk(
    grammar: Grammar, tokenizer: Tokenizer, end: Sequence[int], seed: int, most: int = 400
) -> tuple[list[int], list[bool]]:
    """A document at random, token by token, and before each token whether it may end there. It
    does not end by itself where ``most`` is too little.
    """
    draw = random.Random(seed)
    matcher = grammar.guide()._matcher
    tokens: list[int] = []
    ends: list[bool] = []
    while len(tokens) < most:
        allowed = _allowed(matcher)
        assert allowed is not None, matcher.get_error()
        may_end = bool(allowed[end].any())
        assert may_end == allowed[end].all()
        ends.append(may_end)
        allowed[end] = False
        ids = np.nonzero(allowed)[0].tolist()
        if not ids or (may_end and draw.random() < 0.5):
            break
        # Closing is made likelier than the many ways of going on.
        closing = [i for i in ids if tokenizer.token_bytes(i)[:1] in (b'"', b"]", b"}")]
        token = draw.choice(closing if closing and draw.random() < 0.3 else ids)
        assert matcher.consume_token(token)
        tokens.append(token)
    return tokens, ends
