"""The library on a small random checkpoint: answers, streams, caches, cancellation, threads."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write
from images import picture

import mlx_onevision
from mlx_onevision.api import Model, load
from mlx_onevision.checkpoint import hub
from mlx_onevision.errors import (
    CancelledError,
    CheckpointError,
    ContextOverflowError,
    MediaError,
    OneVisionError,
    RequestError,
)
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.service.service import Limits


@pytest.fixture
def cold(folder: Path) -> Iterator[Model]:
    model = load(folder)
    yield model
    model.close()


def video(seed: int, frames: int = 6) -> np.ndarray:
    return np.stack([picture(100 * seed + n, 40, 60) for n in range(frames)])


def asking(text: str, *media: np.ndarray) -> list[dict[str, Any]]:
    """One message about pictures, and arrays of four axes, which are videos."""
    kinds = ["video" if medium.ndim == 4 else "image" for medium in media]
    blocks = [{"type": kind, kind: medium} for kind, medium in zip(kinds, media, strict=True)]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


MEDIA = [(picture(1),), (picture(1), picture(2)), (video(1),), (picture(1), video(1))]


LONG = "one two three four five six seven eight nine ten " * 4


def test_greedy_is_the_argmax_of_the_logits(model: Model) -> None:
    messages = asking("what is in this image", picture(0))
    answer = model.generate(messages=messages, max_tokens=6)
    inputs = model.prepare(messages)
    expected = []
    for _ in range(6):
        expected.append(int(model.logits(inputs)[-1].argmax()))
        ids = np.append(inputs.input_ids, expected[-1]).astype(np.int32)
        inputs = type(inputs)(ids, inputs.media, inputs.prompt)
    assert list(answer.tokens) == expected
    assert answer.finish_reason == "length"


def test_a_prompt_and_a_conversation_are_the_same_thing(model: Model) -> None:
    one = model.generate("what is it", images=[picture(0)], max_tokens=4)
    other = model.generate(messages=asking("what is it", picture(0)), max_tokens=4)
    assert one.tokens == other.tokens
    assert one.usage.prompt_tokens == len(model.prepare(asking("what is it", picture(0))).input_ids)


def test_the_stream_joined_is_the_text(model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 2.0, "seed": 3}
    stream = model.stream("hello", **options)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(pieces) == stream.result().text == model.generate("hello", **options).text


def test_a_seed_repeats_an_answer(model: Model) -> None:
    def answer(seed: int) -> tuple[int, ...]:
        return model.generate("hello", max_tokens=12, temperature=2.0, seed=seed).tokens

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_stop_strings_end_the_text_and_are_not_in_it(model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 2.0, "seed": 3}
    whole = model.generate("hello", **options).text
    stop = whole[20:24]
    cut = model.generate("hello", **options, stop=stop)
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.usage.completion_tokens == len(cut.tokens) < 60


def shared(first: np.ndarray, second: np.ndarray) -> int:
    """How many ids two prompts begin with in common."""
    length = min(len(first), len(second))
    apart = np.flatnonzero(first[:length] != second[:length])
    return int(apart[0]) if len(apart) else length


@pytest.mark.parametrize("media", MEDIA, ids=["image", "two images", "video", "both"])
def test_the_same_media_are_encoded_once_and_read_once(
    cold: Model, media: tuple[np.ndarray, ...]
) -> None:
    """A second turn encodes nothing, and reads exactly what is new."""
    talk = asking(LONG, *media)
    first = cold.generate(messages=talk, max_tokens=5)
    assert (first.usage.encoded_media, first.usage.cached_tokens) == (len(media), 0)
    before = cold.prepare(talk).input_ids
    talk += [{"role": "assistant", "content": first.text}, *asking("and now")]
    second = cold.generate(messages=talk, max_tokens=5)
    ids = cold.prepare(talk).input_ids
    assert second.usage.encoded_media == 0 and second.usage.media_tokens > 0
    assert (second.usage.prompt_tokens, second.usage.cached_tokens) == (
        len(ids),
        shared(before, ids),
    )
    # All of the first prompt but for its last tokens, which the template ends differently.
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 5
    # The same again: all but the last token, whose logits are what an answer begins with.
    again = cold.generate(messages=talk, max_tokens=5)
    assert again.usage.cached_tokens == len(ids) - 1 and again.tokens == second.tokens


def test_a_warm_answer_is_the_cold_one(folder: Path, cold: Model) -> None:
    """Whatever was asked before: a picture or a video swapped for another of the same size is no
    less another.
    """
    cold.generate(messages=asking(LONG, picture(1)), max_tokens=5)
    for question in (
        asking(LONG + "six", picture(1)),
        asking(LONG, picture(2)),
        asking(LONG),
        asking(LONG, video(1)),
        asking(LONG + "six", video(1)),
        asking(LONG, video(2)),
    ):
        fresh = load(folder)
        expected = fresh.generate(messages=question, max_tokens=16, repetition_penalty=1.3).tokens
        fresh.close()
        warm = cold.generate(messages=question, max_tokens=16, repetition_penalty=1.3)
        assert warm.tokens == expected


@pytest.mark.parametrize("make", ["picture", "video"])
def test_another_medium_of_the_same_size_starts_afresh(cold: Model, make: str) -> None:
    made = {"picture": picture, "video": video}[make]
    one = cold.generate(messages=asking(LONG, made(1)), max_tokens=5)
    other = cold.generate(messages=asking(LONG, made(2)), max_tokens=5)
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert other.usage.cached_tokens == 0
    assert other.usage.encoded_media == 1


def test_reading_media_can_be_stopped(model: Model) -> None:
    """By what ``check`` raises; a row of a batch fails alone."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise CancelledError("enough")

    for media in ((video(1),), [picture(n) for n in range(9)]):
        calls = 0
        with pytest.raises(CancelledError, match="enough"):
            model.stream(messages=asking("what", *media), check=check)
        assert calls == 4
    calls = 0
    batch: list[Any] = [asking("what", video(1)), "hello"]
    rows = model.generate(batch=batch, options=[{"check": check}, {}], max_tokens=3)
    assert [row.finish_reason for row in rows] == ["error", "length"]
    assert isinstance(rows[0].error, CancelledError)
    with pytest.raises(KeyboardInterrupt):
        model.generate("what", videos=[video(1)], check=interrupt)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_cancelling_ends_the_answer_and_the_next_one_is_right(cold: Model) -> None:
    expected = cold.generate("hello", max_tokens=8).tokens
    stream = cold.stream("hello", max_tokens=4000, temperature=2.0, seed=1)
    next(stream)
    stream.cancel()
    result = stream.result()
    assert result.finish_reason == "cancelled"
    assert len(result.tokens) < 4000
    assert cold.generate("hello", max_tokens=8).tokens == expected


def test_a_request_can_be_cancelled_while_it_waits(cold: Model) -> None:
    busy = cold.stream("hello", max_tokens=4000, temperature=2.0, seed=1)
    waiting = cold.stream("hello", max_tokens=4000)
    waiting.cancel()
    busy.cancel()
    result = waiting.result()
    assert (result.finish_reason, result.tokens, result.text) == ("cancelled", (), "")


def test_closing_cancels_what_is_under_way(folder: Path) -> None:
    model = load(folder)
    stream = model.stream("hello", max_tokens=4000, temperature=2.0, seed=1)
    next(stream)
    model.close()
    assert stream.result().finish_reason == "cancelled"
    with pytest.raises(OneVisionError, match="closed"):
        model.generate("hello")


def test_every_thread_gets_its_own_answer(model: Model) -> None:
    questions = [f"question {n}" for n in range(6)]
    expected = [model.generate(question, max_tokens=6).tokens for question in questions]
    answers: dict[int, tuple[int, ...]] = {}

    def ask(number: int) -> None:
        answers[number] = model.generate(questions[number], max_tokens=6).tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number] for number in range(6)] == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": "5", "videos": ["nothing.mp4"]}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"stop": ""}, "stop"),
        ({"prompt": "  "}, "empty"),
        ({"messages": []}, "either a prompt or messages"),
    ],
)
def test_bad_requests_are_refused_by_name(
    model: Model, options: dict[str, Any], named: str
) -> None:
    given: dict[str, Any] = {"prompt": "hello", **options}
    with pytest.raises(RequestError, match=named):
        model.generate(**given)


def test_a_bad_picture_is_refused_before_the_model_is_asked(model: Model, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"nothing\.png"):
        model.generate("hello", images=[tmp_path / "nothing.png"])


def test_a_prompt_beyond_the_context_says_both_numbers(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    small = tmp_path / "small"
    shutil.copytree(folder, small)
    values = json.loads((small / "config.json").read_text())
    values["text_config"]["max_position_embeddings"] = 40
    (small / "config.json").write_text(json.dumps(values))
    model = load(small)
    with pytest.raises(ContextOverflowError, match=r"\d+ tokens.* 40"):
        model.generate(LONG)
    # An answer ends where the context does.
    used = model.generate("hello", max_tokens=4000).usage
    assert used.prompt_tokens + used.completion_tokens == 40
    model.close()


def test_rendering_and_preparing(model: Model) -> None:
    text = model.render(asking("what <image> is it", picture(0)))
    assert text.startswith("<|im_start|>user <image>\nwhat <image> is it")
    inputs = model.prepare(asking("what is it", picture(0)))
    (medium,) = inputs.media
    placeholders = (inputs.input_ids == model.config.image_token_index).sum()
    assert placeholders == medium.tokens
    assert medium.pixel_values.dtype == np.float32
    logits = model.logits(inputs)
    assert logits.shape == (len(inputs.input_ids), model.config.text_config.vocab_size)
    # As many rows at the end; sums of other lengths round differently.
    np.testing.assert_allclose(model.logits(inputs, last=3), logits[-3:], atol=1e-5)
    longer = model.prepare(asking("what is it " * 100, picture(0)))
    assert len(longer.input_ids) > 256  # several chunks
    whole = model.logits(longer)
    for last in (1, 300, len(whole), len(whole) + 1):
        np.testing.assert_allclose(model.logits(longer, last), whole[-last:], atol=1e-5)


def test_a_chat_template_of_the_callers_own(folder: Path) -> None:
    source = "{% for m in messages %}{{ m['role'] }}: <image>{% for b in m['content'] %}"
    source += "{{ b['text'] }}{% endfor %}{% endfor %}{{ eos_token }}"
    model = load(folder, chat_template=source)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert model.render(messages) == "user: <image>hi<|im_end|>"
    assert len(model.prepare(messages, images=[picture(0)]).media) == 1
    model.close()
    broken = load(folder, chat_template="{% for %}")
    with pytest.raises(CheckpointError, match="chat template"):
        broken.render(messages)
    broken.close()


def test_the_process_ends_cleanly(folder: Path) -> None:
    """MLX takes the process down when the inference thread leaves its streams behind."""
    program = (
        "from mlx_onevision import load\n"
        f"model = load({str(folder)!r})\n"
        "stream = model.stream('hello', max_tokens=4000, temperature=2.0, seed=1)\n"
        "next(stream)\n"
    )
    for ending in ("model.close()\n", "", "raise SystemExit(3)\n"):
        run = subprocess.run([sys.executable, "-c", program + ending], capture_output=True)
        assert (run.returncode, run.stderr) == (3 if "Exit" in ending else 0, b"")


def test_public_names() -> None:
    for name in mlx_onevision.__all__:
        assert getattr(mlx_onevision, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        mlx_onevision.nothing  # noqa: B018


def test_without_max_tokens_the_checkpoint_s_own_limit_holds(
    tmp_path: Path,
) -> None:
    own = write(tmp_path, tied=False)
    path = own / "generation_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "max_new_tokens": 5}))
    backend = open_engine(own, limits=Limits(max_tokens=3))
    model = load(own)
    try:
        assert len(model.generate("hello").tokens) == 5
        assert len(model.generate("hello", max_tokens=None).tokens) == 5
        assert len(model.generate("hello", max_tokens=7).tokens) == 7
        assert [len(a.tokens) for a in model.generate(batch=["a", "b"])] == [5, 5]
        # A server's limit caps it.
        assert backend.generate(GenerateRequest.ask("hello")).result().usage.completion_tokens == 3
    finally:
        model.close()
        backend.close()


def test_quantizing_while_loading_says_how_far_it_is(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = write(tmp_path, tied=False)
    with load(folder, progress=lambda *far: seen.append(far)):
        assert seen == []  # nothing is read yet
    with load(folder, quantize=8, progress=lambda *far: seen.append(far)):
        pass
    done, totals = zip(*seen, strict=True)
    assert len(seen) > 10 and list(done) == sorted(set(done))
    assert {done[-1]} == {*totals} and 0 < done[0] < done[-1]


def test_without_any_limit_an_answer_has_256_tokens(model: Model) -> None:
    assert model.checkpoint_max_tokens is None
    assert model.build_request([{"role": "user", "content": "hello"}]).max_tokens == 256


def test_a_model_is_resolved_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    resolve = hub.resolve

    def counted(*args: Any) -> Path:
        asked.append(args)
        return resolve(*args)

    monkeypatch.setattr(hub, "resolve", counted)
    load(folder).close()
    assert len(asked) == 1
