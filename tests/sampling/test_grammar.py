"""Answers that keep to a JSON schema."""

import json
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write
from schemas import HEAVY, PERSON, SCHEMAS, valid, walk

from mlx_onevision.api import Model, load
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.sampling import grammar as grammars
from mlx_onevision.sampling.grammar import Grammar, Grammars, Guide
from mlx_onevision.sampling.json_schema import normal

PICTURE = np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = load(write(tmp_path_factory.mktemp("checkpoint"), tied=False))
    yield model
    model.close()


def end_of(model: Model) -> int:
    (end,) = model._engine.defaults.eos_token_ids
    return end


@pytest.fixture(scope="module")
def known(model: Model) -> dict[str, Grammar]:
    """Without the process that works schemas through first, which the others are for."""
    tokenizer = grammars._tokenizer(model._processor.tokenizer, frozenset([end_of(model)]))
    return {
        name: Grammar(grammars._matcher(tokenizer, normal(schema)))
        for name, schema in SCHEMAS.items()
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_may_end_where_it_is_a_document_and_nowhere_else(
    model: Model, known: dict[str, Grammar], name: str
) -> None:
    tokenizer, whole = model._processor.tokenizer, 0
    for seed in range(6):
        tokens, ends = walk(known[name], tokenizer, [end_of(model)], seed, most=120)
        data = [tokenizer.token_bytes(token) for token in tokens]
        for place, may_end in enumerate(ends):
            text = b"".join(data[:place]).decode("utf-8", "replace")
            # llguidance does not write a zero as -0.
            assert may_end == valid(SCHEMAS[name], text) or text == "-0", text
        whole += len(tokens) < 120
    assert whole >= 1


QUESTIONS: list[tuple[list[np.ndarray], Options]] = [
    ([], {}),
    ([PICTURE], {}),
    ([], {"temperature": 1.0, "seed": 1}),
    ([PICTURE, PICTURE], {"temperature": 3.0, "seed": 2, "repetition_penalty": 1.3}),
    ([PICTURE], {"temperature": 1.5, "seed": 3, "top_p": 0.8, "min_p": 0.01, "top_k": 30}),
]


def asking(media: list[np.ndarray]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = [{"type": "image", "image": medium} for medium in media]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "who is it"}]}]


def test_alone_and_together_answers_are_documents(model: Model) -> None:
    """Begun alone, in the middle of a batch, and with rows beside them that have no schema."""
    options: Options = {"max_tokens": 120, "json_schema": PERSON}
    asked: list[tuple[list[np.ndarray], Options]] = [(m, {**options, **s}) for m, s in QUESTIONS]
    alone = [model.generate(messages=asking(media), **own) for media, own in asked]
    for answer in alone:
        assert answer.finish_reason == "stop" and valid(PERSON, answer.text), answer.text
        assert answer.tokens[-1] == end_of(model)
    plain = model.generate("hello", max_tokens=20)
    batch = [*(asking(media) for media, _ in QUESTIONS), "hello"]
    settings: list[Options] = [*(own for _, own in QUESTIONS), {"json_schema": None}]
    settings[-1]["max_tokens"] = 20
    together = model.generate(batch=batch, options=settings, **options)
    assert [a.tokens for a in together] == [a.tokens for a in (*alone, plain)]
    first = model.stream(messages=asking([]), **options)
    next(first)
    streams = [model.stream(messages=asking(media), **own) for media, own in asked[1:]]
    assert [stream.result().tokens for stream in (first, *streams)] == [a.tokens for a in alone]


def test_what_is_cut_off_is_the_beginning_of_one(model: Model) -> None:
    whole = model.generate("who", json_schema=PERSON, max_tokens=120).text
    answer = model.generate("who", json_schema=json.dumps(PERSON), max_tokens=9)
    assert answer.finish_reason == "length" and len(answer.tokens) == 9
    assert whole.startswith(answer.text) and not valid(PERSON, answer.text)


def test_no_row_beyond_the_words_is_ever_chosen(model: Model, known: dict[str, Grammar]) -> None:
    """Control tokens neither, whatever the model thinks of them."""
    tokenizer = model._processor.tokenizer
    vocabulary = model.config.text_config.vocab_size
    assert vocabulary > len(tokenizer)
    guide = known["lengths"].guide()
    logits = np.array(guide(mx.array([5, vocabulary + 3]), mx.zeros((1, vocabulary))))[0]
    control = set(tokenizer.specials.values())
    for token, value in enumerate(logits):
        if token >= len(tokenizer) or token in control or not tokenizer.token_bytes(token):
            assert value == -np.inf
    assert np.isfinite(logits).any()


@pytest.mark.parametrize("text", ["Käfer", "한국어", "Å and e\u0301", "\u2126 \u212b \ufb01"])
def test_decomposed_letters_are_kept(model: Model, text: str) -> None:
    """As macOS writes file names; and letters that composition replaces by others."""
    for form in (unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text), text):
        schema = {"enum": [form]}
        answer = model.generate("hello", json_schema=schema, max_tokens=100, temperature=0)
        assert json.loads(answer.text) == form


def test_an_end_that_is_a_word_is_no_word(model: Model) -> None:
    """Where a file calls an ordinary token the end of text, it is never said within a document."""
    tokenizer = model._processor.tokenizer
    word = max(range(len(tokenizer)), key=lambda token: len(tokenizer.token_bytes(token)))
    said = tokenizer.token_bytes(word).decode()
    wanted = [said, f"x{said}", said[:-1] + "yz"]
    made = Grammars(tokenizer, [word, end_of(model)]).of({"enum": wanted})
    for seed in range(6):
        tokens, _ = walk(made, tokenizer, [word, end_of(model)], seed)
        text = b"".join(map(tokenizer.token_bytes, tokens)).decode()
        assert word not in tokens and json.loads(text) in wanted


ENDLESS = {
    "$defs": {
        "man": {"type": "object", "properties": {"son": {"$ref": "#/$defs/son"}}},
        "son": {
            "anyOf": [
                {"type": "array", "prefixItems": [{"type": "null"}, {"$ref": "#"}], "minItems": 2},
                {"allOf": [{"$ref": "#/$defs/son"}, {"$ref": "#/$defs/man"}]},
            ]
        },
    },
    "type": "object",
    "properties": {"son": {"$ref": "#/$defs/son"}, "man": {"$ref": "#/$defs/man"}},
    "required": ["man", "son"],
}
REFUSED: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ("[1]", "give an object"),
    ({"const": float("nan")}, "not valid JSON"),
    ({"const": object()}, "not valid JSON"),
    ('{"items":' * 900 + "true" + "}" * 900, "nested too deeply"),
    ('{"items":' * 101 + "true" + "}" * 101, "nested too deeply"),
    ('{"enum":["' + "x" * (1 << 18) + '"]}', "characters"),
    (False, "allows no document"),
    ({"enum": []}, "allows no document"),
    ({"$ref": "#"}, "allows no document that ends"),
    (ENDLESS, "allows no document that ends"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "allows no document that ends"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "allows no document (minimum (5)"),
    ({"not": {}, "if": {}}, 'has "if", "not", which is not supported'),
    ({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, "write anyOf"),
    ({"type": "object", "minProperties": 2}, "minProperties above 1"),
    ({"type": "frob"}, "Invalid type: frob"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "format": "colour"}, "Unknown format: colour"),
    ({"$ref": "http://example.org/x"}, "example.org/x"),
    ({"$ref": "#/$defs/none"}, "/$defs/none"),
]


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_followed_is_said_in_one_sentence(
    model: Model, schema: Any, named: str
) -> None:
    with pytest.raises(RequestError) as raised:
        model.generate("who", images=["/no/such/picture.png"], json_schema=schema)
    said = str(raised.value)
    assert named in said and "JSON schema" in said
    assert "\n" not in said and len(said) < 300 and not said.endswith(".")


def test_working_a_schema_through_can_be_given_up(model: Model) -> None:
    since = time.monotonic()

    def check() -> None:
        if time.monotonic() - since > 0.2:
            raise OneVisionError("not wanted any more")

    with pytest.raises(OneVisionError, match="not wanted"):
        model.generate("who", json_schema=HEAVY["multiples"], check=check)
    assert time.monotonic() - since < 2


def test_without_the_package_it_says_which(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'mlx-onevision\[structured\]'"):
        model.generate("who", json_schema=True)
    assert not grammars.available()


def test_a_model_without_an_end_is_told_so(model: Model) -> None:
    with pytest.raises(RequestError, match="end-of-text"):
        Grammars(model._processor.tokenizer, []).of({})


def test_it_is_worked_through_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(model._processor.tokenizer, [end_of(model)])
    first = made.of({"const": 1})
    monkeypatch.setattr(grammars.json_schema, "compile_schema", lambda *_: pytest.fail("again"))
    assert made.of('{"const": 1}') is first
    monkeypatch.undo()
    for number in range(2, grammars.MOST_KEPT + 2):
        monkeypatch.setattr(grammars.json_schema, "compile_schema", lambda *_: None)
        made.of({"const": number})
    assert len(made._kept) == grammars.MOST_KEPT and made.of({"const": 1}) is not first


def test_a_schema_that_fails_later_ends_its_answer_only(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Options = {"max_tokens": 60, "json_schema": PERSON}
    expected = model.generate("who", **options)
    guided, calls = Guide._guided, 0

    def failing(guide: Guide, *given: Any) -> Any:
        nonlocal calls
        calls += guide is guides[0]
        if guide is guides[0] and calls > 4:
            raise MemoryError("lexer")
        return guided(guide, *given)

    guides: list[Guide] = []
    begin = Grammar.guide
    monkeypatch.setattr(Grammar, "guide", lambda *given: guides.append(begin(*given)) or guides[-1])
    monkeypatch.setattr(Guide, "_guided", failing)
    for company in (0, 2):
        guides.clear()
        calls = 0
        answers = model.generate(batch=["who"] * (1 + company), **options)
        assert "too complex" in str(answers[0].error) and answers[0].finish_reason == "error"
        assert [answer.tokens for answer in answers[1:]] == [expected.tokens] * company
    assert model.healthy


def test_where_the_model_would_end_what_is_open_is_closed() -> None:
    """The demo model has its sentences, and wants to end after them: within a string, within an
    object. Without that an answer is as long as it may be.
    """
    text = {"type": "string"}
    shape = {"properties": {"shape": text, "tags": {"type": "array", "items": text}}}
    schema = {"type": "object", **shape, "required": ["shape", "tags"]}
    model = load("demo")
    try:
        for wanted in ({"type": "object"}, schema, {"anyOf": [{"type": "object"}, text]}):
            for temperature in (0.0, 1.0):
                asked: dict[str, Any] = {"json_schema": wanted, "temperature": temperature}
                answer = model.generate("Which shape?", max_tokens=100, seed=1, **asked)
                assert answer.finish_reason == "stop" and len(answer.tokens) < 50
                assert valid(wanted, answer.text), answer.text
        whole = model.generate("Which shape?", max_tokens=100, json_schema=schema)
        assert json.loads(whole.text)["shape"].endswith("I only know coloured shapes.")
    finally:
        model.close()


def test_a_keyword_that_is_not_supported_may_be_left_out(model: Model) -> None:
    names = {"type": "object", "propertyNames": {"maxLength": 3}, "maxProperties": 1}
    with pytest.raises(RequestError, match="propertyNames"):
        model.compile_schema(names)
    model.compile_schema({**names, "x-guidance": {"lenient": True, "whitespace_flexible": True}})
    assert json.loads(normal({"x-guidance": {"lenient": 1}})) == {}
