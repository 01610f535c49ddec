"""Batches through the library: every request is what it would be alone, and fails alone."""

import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from engine.batches import LONG, ROWS, TOKENS, turn

from examples.demo_model.cases import make_cases
from mlx_onevision.api import Model, load
from mlx_onevision.engine.batch import Batch
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import OutOfMemoryError, RequestError


def test_mixed_rows_are_what_they_are_alone(model: Model, alone: list[tuple[int, ...]]) -> None:
    answers = model.generate(batch=ROWS, max_tokens=TOKENS)
    assert [answer.tokens for answer in answers] == alone
    for row, answer in zip(ROWS, answers, strict=True):
        inputs = model.prepare(row)
        assert answer.usage.prompt_tokens == len(inputs.input_ids)
        assert answer.usage.media_tokens == sum(medium.tokens for medium in inputs.media)
        assert answer.usage.completion_tokens == len(answer.tokens) == TOKENS
        assert answer.finish_reason == "length" and answer.error is None
        assert answer.usage.prefill_seconds > 0 and answer.usage.decode_seconds > 0


def test_every_row_has_settings_of_its_own(model: Model) -> None:
    settings: list[Options] = [
        {"temperature": 2.0, "seed": 1},
        {"temperature": 2.0, "seed": 2, "top_k": 20, "max_tokens": 5},
        {"repetition_penalty": 1.5},
        {"temperature": 2.0, "seed": 1, "top_p": 0.9},
        {"system": "be brief", "temperature": 1.5, "min_p": 0.01, "seed": 2**64 - 1},
        {"temperature": 2.0, "seed": 3, "repetition_penalty": 1.2},
        {"num_frames": 2, "max_tokens": 7},
    ]
    answers = model.generate(batch=ROWS, options=settings, max_tokens=TOKENS)
    for row, own, answer in zip(ROWS, settings, answers, strict=True):
        merged: Options = {"max_tokens": TOKENS, **own}
        assert answer.tokens == model.generate(messages=row, **merged).tokens, own
    assert answers[-1].usage.media_tokens == 2 * 1 + 1


def test_the_penalty_sees_the_whole_prompt_of_a_row(model: Model) -> None:
    """So strong that nothing of the prompt, the placeholder included, can be said again."""
    answers = model.generate(batch=ROWS, max_tokens=TOKENS, repetition_penalty=1e6)
    for row, answer in zip(ROWS, answers, strict=True):
        said = answer.tokens
        known = set(model.prepare(row).input_ids.tolist())
        assert known.isdisjoint(said) and len(set(said)) == len(said)


def test_a_stop_string_ends_its_row_only(model: Model) -> None:
    options: Options = {"max_tokens": 60, "temperature": 2.0, "seed": 3}
    whole = model.generate("hello", **options)
    stop = whole.text[20:24]
    first, second = model.generate(batch=["hello"] * 2, options=[{"stop": stop}, {}], **options)
    assert first.text == whole.text[: whole.text.index(stop)]
    assert first.finish_reason == "stop" and len(first.tokens) < 60
    assert second.tokens == whole.tokens


def test_the_models_own_end_is_the_last_token(folder: Path, tmp_path: Path) -> None:
    """A token that some of the greedy answers hold is made the end of text."""
    import json
    import shutil

    ended = tmp_path / "ended"
    shutil.copytree(folder, ended)
    plain = load(folder)
    free = [answer.tokens for answer in plain.generate(batch=ROWS[:3], max_tokens=TOKENS)]
    plain.close()
    eos = free[1][4]
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))
    model = load(ended)
    for answer, tokens in zip(model.generate(batch=ROWS[:3], max_tokens=TOKENS), free, strict=True):
        if eos in tokens:
            assert answer.tokens == tokens[: tokens.index(eos) + 1]
            assert answer.finish_reason == "stop"
        else:
            assert answer.tokens == tokens and answer.finish_reason == "length"
    model.close()


def test_a_bad_row_fails_alone(model: Model, alone: list[tuple[int, ...]]) -> None:
    bad: list[Any] = [
        [turn("what is it", "no/such/picture.png")],
        "   ",
        [{"role": "nobody", "content": "x"}],
        [turn(LONG * 300)],
        [{"role": "user", "content": [{"type": "video", "path": __file__}]}],
    ]
    batch = [ROWS[0], *bad, ROWS[1], ROWS[2]]
    settings: list[Options] = [Options() for _ in batch]
    settings[-1] = {"temperature": -1.0}
    answers = model.generate(batch=batch, options=settings, max_tokens=TOKENS)
    assert [answers[n].tokens for n in (0, 6)] == alone[:2]
    failed = [answer for answer in answers if answer.finish_reason == "error"]
    named = ["picture.png", "empty", "nobody", "context", "test_batch.py", "temperature"]
    assert len(failed) == len(named)
    for answer, part in zip(failed, named, strict=True):
        assert part in str(answer.error) and answer.tokens == ()
        assert answer.to_dict()["error"]["message"] == str(answer.error)
    assert [answer.error.code for answer in failed[:4:3] if answer.error] == [
        "unsupported_media",
        "context_overflow",
    ]


def test_a_batch_of_one_or_none(model: Model, alone: list[tuple[int, ...]]) -> None:
    (only,) = model.generate(batch=[ROWS[1]], max_tokens=TOKENS)
    assert only.tokens == alone[1]
    assert model.generate(batch=[]) == []


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"batch": "hello"}, "str"),
        ({"batch": ROWS[0]}, "one conversation"),
        ({"batch": ["a", "b"], "options": [{}]}, "2 requests, but 1"),
        ({"batch": ["a"], "options": {"seed": 1}}, "list"),
        ({"batch": ["a"], "options": [{"temprature": 1}]}, "'temprature'"),
        ({"batch": ["a"], "options": [3]}, "request 1"),
        ({"batch": ["a"], "prompt": "b"}, "not both"),
        ({"batch": ["a"], "messages": ROWS[0]}, "not both"),
        ({"prompt": "a", "options": [{}]}, "options"),
    ],
)
def test_what_is_no_batch_is_refused_as_a_whole(
    model: Model, given: dict[str, Any], named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        model.generate(**given)


def test_rows_stream_and_one_is_cancelled(model: Model) -> None:
    options: Options = {"max_tokens": 400, "temperature": 2.0, "seed": 1}
    expected = model.generate("hello", **options).tokens
    streams = model.stream(batch=["hello", ROWS[1], "hello"], **options)
    next(streams[1])
    streams[1].cancel()
    cancelled = streams[1].result()
    assert cancelled.finish_reason == "cancelled" and 0 < len(cancelled.tokens) < 400
    assert streams[0].result().tokens == streams[2].result().tokens == expected
    assert "".join(streams[0]) == ""


def test_all_are_cancelled_and_the_next_is_right(
    model: Model, alone: list[tuple[int, ...]]
) -> None:
    streams = model.stream(batch=ROWS, max_tokens=4000, temperature=2.0, seed=1)
    next(streams[0])
    for stream in streams:
        stream.cancel()
    assert {stream.result().finish_reason for stream in streams} == {"cancelled"}
    assert model.generate(messages=ROWS[1], max_tokens=TOKENS).tokens == alone[1]


def test_closing_ends_every_row(folder: Path) -> None:
    model = load(folder)
    streams = model.stream(batch=ROWS, max_tokens=4000, temperature=2.0, seed=1)
    next(streams[0])
    model.close()
    assert {stream.outcome().finish_reason for stream in streams} == {"cancelled"}


def test_an_interrupt_cancels_every_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_onevision.engine.generation import Stream

    streams: list[Stream] = []

    def interrupted(stream: Stream) -> None:
        streams.append(stream)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "outcome", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(batch=["hello", "hello"], max_tokens=30_000, temperature=2.0)
    started = time.monotonic()
    model.generate("hello", max_tokens=1)  # waits for the batch to end
    assert time.monotonic() - started < 5


def test_batches_and_lone_requests_take_turns(model: Model, alone: list[tuple[int, ...]]) -> None:
    found: dict[str, Any] = {}

    def ask(name: str) -> None:
        if name == "batch":
            found[name] = [a.tokens for a in model.generate(batch=ROWS[:3], max_tokens=TOKENS)]
        else:
            found[name] = model.generate(messages=ROWS[4], max_tokens=TOKENS).tokens

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("batch", "lone")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"batch": alone[:3], "lone": alone[4]}


def test_the_demo_model_answers_drawings_together() -> None:
    batch: list[list[dict[str, Any]]] = []
    for case in [*islice(make_cases("pictures", 3), 3), *islice(make_cases("several", 1), 1)]:
        question = next(q for q in case.questions if not q.history)
        batch.append([turn(question.text, *case.draw())])
    batch.append([turn("What is in the image?", "examples/shapes.png")])
    model = load("demo", dtype="float32")
    together = model.generate(batch=batch, max_tokens=32)
    expected = [model.generate(messages=row, max_tokens=32) for row in batch]
    model.close()
    assert [answer.tokens for answer in together] == [answer.tokens for answer in expected]
    assert together[-1].text == "A red circle, a blue star and an orange triangle."
    assert {answer.finish_reason for answer in together} == {"stop"}


def test_no_memory_is_said_in_our_words(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr(Batch, "_step", failing)
    answers = model.generate(batch=["hello", "hello"])
    assert all(isinstance(answer.error, OutOfMemoryError) for answer in answers)


def test_a_defect_is_raised(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise ValueError("odd")

    monkeypatch.setattr(Batch, "_step", failing)
    with pytest.raises(ValueError, match="odd"):
        model.generate(batch=["hello", "hello"])


def test_a_row_with_a_wrong_setting_fails_alone(model: Model) -> None:
    wrong: Options = {"logit_bias": {10**6: 1.0}}
    rows = model.generate(batch=["hello", "there"], options=[{}, wrong], max_tokens=4)
    assert [row.finish_reason for row in rows] == ["length", "error"]
    assert isinstance(rows[1].error, RequestError) and "logit_bias" in str(rows[1].error)
