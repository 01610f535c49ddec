"""Answers to schemas at length: every kind of schema, made-up ones, many seeds; what is said is
JSON that the schema allows, by the reading of the ``jsonschema`` package.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from schemas import HEAVY, SCHEMAS, valid, walk

from mlx_onevision.api import Model, load
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import RequestError
from mlx_onevision.sampling import grammar as grammars
from mlx_onevision.sampling import json_schema as schemas
from mlx_onevision.sampling.grammar import Grammar
from mlx_onevision.sampling.json_schema import normal

SEEDS = 9
MOST = 150  # tokens of an answer
# Some documents of these are as long as one likes, and the demo model was not trained to end them.
ENDLESS = ("any number", "free names", "named by pattern", "references", "anything", "numbers")


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = load("demo")
    yield model
    model.close()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_model_that_knows_something_else_keeps_to_it(model: Model, name: str) -> None:
    """Greedy and sampled, with an image and without, in one batch with an answer in words."""
    picture = {"type": "image", "path": "examples/shapes.png"}
    said = {"type": "text", "text": "What is in the image?"}
    batch: list[Any] = [
        [{"role": "user", "content": [picture, said] if seed % 3 == 0 else [said]}]
        for seed in range(SEEDS)
    ]
    settings: list[Options] = [
        {"json_schema": SCHEMAS[name], "seed": seed, "temperature": (0.0, 1.0, 3.0)[seed % 3]}
        for seed in range(SEEDS)
    ]
    answers = model.generate(
        batch=[*batch, "Hello"], options=[*settings, Options()], max_tokens=MOST
    )
    assert answers.pop().finish_reason == "stop"
    whole = [answer.text for answer in answers if answer.finish_reason == "stop"]
    assert all(valid(SCHEMAS[name], text) for text in whole), whole
    cut = [answer for answer in answers if answer.finish_reason != "stop"]
    assert all(a.finish_reason == "length" and len(a.tokens) == MOST for a in cut)
    assert len(whole) == SEEDS or name in ENDLESS


def made_up(draw: random.Random, depth: int = 3) -> Any:
    """A schema; some of them allow nothing, or need what is not supported."""
    kind = draw.choice(["integer", "number", "string", "boolean", "null", "enum", "const"])
    if depth and draw.random() < 0.6:
        kind = draw.choice(["object", "array", "anyOf", "allOf", "types", "map"])
    low = draw.randint(-20, 20)
    if kind == "integer":
        bounds = {"minimum": low, "maximum": low + draw.randint(0, 300)}
        return {"type": kind, **bounds, **({"multipleOf": 3} if draw.random() < 0.2 else {})}
    if kind == "number":
        return {"type": kind, "minimum": low - 0.5, "exclusiveMaximum": low + draw.random() * 9}
    if kind == "string":
        least = draw.randint(0, 3)
        if draw.random() < 0.3:
            return {"type": kind, "pattern": draw.choice(["^a+b?$", "^[^x]{1,3}$", r"^\d\d:\d\d$"])}
        return {"type": kind, "minLength": least, "maxLength": least + draw.randint(0, 4)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": draw.sample([1, -2.5, "é", 'q"', None, True, [], {"a": [1]}, "", "🙂"], 3)}
    if kind == "const":
        return {"const": draw.choice([0, "x", [None], {"b": {"c": "\u2028"}}])}
    parts = [made_up(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    if kind == "object":
        named = dict(zip("abc", parts, strict=False))
        required = [name for name in named if draw.random() < 0.7]
        return {
            "type": kind,
            "properties": named,
            "required": required,
            **({"additionalProperties": False} if draw.random() < 0.8 else {}),
        }
    if kind == "array":
        least = draw.randint(0, 2)
        return {"type": kind, "items": parts[0], "minItems": least, "maxItems": least + 1}
    if kind == "map":
        return {"type": "object", "additionalProperties": parts[0], "maxProperties": 2}
    if kind == "types":
        return {"type": ["null", "integer", "string"], "maxLength": 3, "maximum": 9, "minimum": 0}
    return {kind: parts}


def test_made_up_schemas(model: Model) -> None:
    tokenizer = model._processor.tokenizer
    (end,) = model._engine.defaults.eos_token_ids
    words = grammars._tokenizer(tokenizer, frozenset([end]))
    draw = random.Random(0)
    followed = ended = 0
    for _ in range(400):
        schema = made_up(draw)
        try:
            grammar = Grammar(grammars._matcher(words, normal(schema)))
        except RequestError:
            continue
        followed += 1
        for seed in range(4):
            tokens, ends = walk(grammar, tokenizer, [end], seed, most=150)
            data = [tokenizer.token_bytes(token) for token in tokens]
            for place, may_end in enumerate(ends):
                if may_end:
                    text = b"".join(data[:place]).decode("utf-8", "replace")
                    assert valid(schema, text), (schema, text)
            ended += ends[-1]
    assert followed >= 250 and ended >= 2 * followed


@pytest.mark.parametrize("name", HEAVY)
def test_a_schema_that_is_too_much_costs_little(
    model: Model, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "SECONDS", 1.0)
    since = time.monotonic()
    with pytest.raises(RequestError, match=r"too much time or memory|too deeply"):
        model.generate("who", json_schema=HEAVY[name])
    assert time.monotonic() - since < 3
