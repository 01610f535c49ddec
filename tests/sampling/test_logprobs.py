"""Log probabilities of an answer's tokens, against the logits that the whole text has at once."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write

from mlx_onevision.api import Model, load
from mlx_onevision.engine.generation import Generation
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.logprobs import LOGPROB_FLOOR
from mlx_onevision.sampling.ranges import MOST_LOGPROBS

PICTURE = np.random.default_rng(5).integers(0, 256, (60, 80, 3), dtype=np.uint8)

# Sums of other lengths round differently: logits move by up to 5e-5 (see test_virtual_ids), and so
# does the logarithm of their sum.
BOUND = 1e-4

TOP = 5
SETTINGS: list[Options] = [
    {"max_tokens": 24},
    {"max_tokens": 12, "temperature": 2.0, "seed": 3, "top_k": 50},
    {"max_tokens": 9, "temperature": 1.5, "seed": 4, "top_p": 0.9},
    {"max_tokens": 16, "repetition_penalty": 1.6},
]
ASKED: list[tuple[str, list[np.ndarray]]] = [
    ("hello", []),
    ("what is it", [PICTURE]),
    ("one two " * 80, []),
    ("again", [PICTURE]),
]
TOLD: list[Options] = [{**settings, "logprobs": TOP} for settings in SETTINGS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = load(write(tmp_path_factory.mktemp("checkpoint"), tied=False))
    yield model
    model.close()


def message(text: str, media: list[np.ndarray]) -> list[dict[str, Any]]:
    blocks = [{"type": "image", "image": medium} for medium in media]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


def reference(model: Model, number: int, answer: Generation) -> np.ndarray:
    """The logarithm of each token's probability in each place of the answer, (tokens, vocab)."""
    text, media = ASKED[number]
    inputs = model.prepare(message(text, media))
    ids = np.concatenate([inputs.input_ids, np.array(answer.tokens, inputs.input_ids.dtype)])
    rows = model.logits(replace(inputs, input_ids=ids))[len(inputs.input_ids) - 1 : -1]
    penalty = SETTINGS[number].get("repetition_penalty") or 1.0
    for place, row in enumerate(rows):
        said = np.unique(ids[: len(inputs.input_ids) + place])
        row[said] = np.where(row[said] < 0, row[said] * penalty, row[said] / penalty)
    most = rows.max(axis=-1, keepdims=True)
    return rows - most - np.log(np.exp(rows - most).sum(axis=-1, keepdims=True))


def check(model: Model, number: int, answer: Generation) -> None:
    assert answer.logprobs is not None
    expected = reference(model, number, answer)
    made = [
        (token, row)
        for token, row in zip(answer.tokens, expected, strict=True)
        if model._processor.tokenizer.token_bytes(token)
    ]
    assert len(made) == len(answer.logprobs) > 0
    for (token, row), told in zip(made, answer.logprobs, strict=True):
        assert told.id == token and abs(told.logprob - row[token]) <= BOUND
        assert len(told.top) == TOP
        least = np.sort(row)[-TOP]
        for other in told.top:
            assert abs(other.logprob - row[other.id]) <= BOUND
            assert other.logprob >= least - BOUND
        values = [other.logprob for other in told.top]
        assert values == sorted(values, reverse=True)
        assert len({other.id for other in told.top}) == TOP
    check_text(answer)


def check_text(answer: Generation) -> None:
    assert answer.logprobs is not None
    data = b"".join(told.data for told in answer.logprobs)
    assert data.decode("utf-8", "replace") == answer.text
    for told in (t for chosen in answer.logprobs for t in (chosen, *chosen.top)):
        if told.data:
            assert told.token == told.data.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def alone(model: Model) -> list[Generation]:
    return [
        model.generate(messages=message(*asked), **options)
        for asked, options in zip(ASKED, TOLD, strict=True)
    ]


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_alone_they_are_those_of_the_logits(
    model: Model, alone: list[Generation], number: int
) -> None:
    check(model, number, alone[number])


def test_in_a_batch_they_are_too(model: Model, alone: list[Generation]) -> None:
    rows = [message(*asked) for asked in ASKED]
    answers = model.generate(batch=[*rows, "untold"], options=[*TOLD, {"max_tokens": 4}])
    assert answers.pop().logprobs is None
    for number, answer in enumerate(answers):
        assert answer.tokens == alone[number].tokens
        check(model, number, answer)


def test_where_company_comes_in_the_middle(model: Model, alone: list[Generation]) -> None:
    first = model.stream(messages=message(*ASKED[0]), **TOLD[0])
    next(first)
    others = [
        model.stream(messages=message(*asked), **options)
        for asked, options in zip(ASKED[1:], TOLD[1:], strict=True)
    ]
    for number, stream in enumerate([first, *others]):
        answer = stream.result()
        assert answer.tokens == alone[number].tokens
        check(model, number, answer)


def test_asking_for_them_changes_no_answer(model: Model, alone: list[Generation]) -> None:
    for answer, asked, options in zip(alone, ASKED, SETTINGS, strict=True):
        plain = model.generate(messages=message(*asked), **options)
        assert plain.logprobs is None and "logprobs" not in plain.to_dict()
        assert (plain.tokens, plain.text) == (answer.tokens, answer.text)


def test_they_come_with_the_pieces(model: Model) -> None:
    stream = model.stream("hello", max_tokens=60, temperature=2.0, seed=1, logprobs=0)
    text = ""
    for piece in stream:
        text += piece
        data = b"".join(told.data for told in stream.logprobs)
        assert data.decode("utf-8", "replace") in (text, text + "\ufffd")  # a part of a character
    answer = stream.result()
    assert answer.logprobs == tuple(stream.logprobs)
    assert not any(told.top for told in stream.logprobs)
    check_text(answer)


def test_a_stop_string_cuts_them_where_it_cuts_the_text(model: Model) -> None:
    """Wherever it begins and however long it is: the last token told is the last one shown."""
    options: Options = {"max_tokens": 40, "temperature": 2.0, "seed": 1, "logprobs": 0}
    whole = model.generate("hello", **options)
    assert whole.logprobs is not None and len(whole.text) > 30
    starts = list(range(1, len(whole.text) - 4, 3))
    stops = [whole.text[start : start + 1 + start % 4] for start in starts]
    answers = model.generate(
        batch=["hello"] * len(stops), options=[{"stop": stop} for stop in stops], **options
    )
    for stop, answer in zip(stops, answers, strict=True):
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.finish_reason == "stop" and answer.logprobs is not None
        told = list(answer.logprobs)
        assert [t.id for t in told] == [t.id for t in whole.logprobs[: len(told)]]
        data = b"".join(token.data for token in told)
        assert data.decode("utf-8", "replace").startswith(answer.text)
        if told:
            before = data[: -len(told[-1].data)].decode("utf-8", "ignore")
            assert len(before) < len(answer.text) or not answer.text


def test_what_cannot_come_has_the_least(model: Model) -> None:
    answer = model.generate("hello", json_schema={"const": "ab"}, logprobs=3, max_tokens=9)
    assert answer.text == '"ab"' and answer.finish_reason == "stop"
    assert answer.logprobs is not None
    for told in answer.logprobs:
        assert {0.0, LOGPROB_FLOOR} >= {other.logprob for other in told.top[1:]}
    assert json.loads(json.dumps(answer.to_dict(), allow_nan=False))["logprobs"][0]["top"]


@pytest.mark.parametrize("wanted", [-1, MOST_LOGPROBS + 1, 1.0, True, "3"])
def test_how_many_is_a_number(model: Model, wanted: Any) -> None:
    with pytest.raises(RequestError, match="logprobs"):
        model.generate("hello", logprobs=wanted)


def test_more_than_there_are(model: Model) -> None:
    answer = model.generate("hello", logprobs=MOST_LOGPROBS, max_tokens=2)
    assert answer.logprobs is not None
    assert all(len(told.top) == MOST_LOGPROBS for told in answer.logprobs)
    first = answer.logprobs[0].to_dict()
    assert first["top"][0]["token"] == first["token"] and first["bytes"]


def test_equal_ones_keep_the_chosen() -> None:
    """Half precision makes many of them; the device would take any."""
    import mlx.core as mx

    from mlx_onevision.sampling.logprobs import LogprobRecorder

    logprobs = mx.full((1, 1000), -6.9)
    for count in (1, 3):
        watch = LogprobRecorder(count)
        sampler = watch.sampler(lambda logprobs: mx.array([500]))
        sampler(logprobs)
        watch.record()
        ids, values = watch.take()
        assert ids[0] == 500 and 500 in ids[1:] and len(set(ids[1:])) == count
        assert values == pytest.approx([-6.9] * (count + 1))


def test_a_model_in_half_precision(tmp_path: Path) -> None:
    model = load(write(tmp_path / "model", tied=False, dtype="bfloat16"))
    try:
        answer = model.generate("hello", logprobs=2, max_tokens=12)
        assert answer.logprobs is not None
        for told in answer.logprobs:
            assert told.logprob == told.top[0].logprob and told.id in [t.id for t in told.top]
        check_text(answer)
    finally:
        model.close()
