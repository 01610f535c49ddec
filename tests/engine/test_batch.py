"""Batches: every row is what it would be alone, and what befalls one row befalls no other."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write

from examples.demo_model.cases import make_cases
from mlx_onevision.api import Model, load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.batch import Batch, serve
from mlx_onevision.engine.options import Options
from mlx_onevision.engine.prefix_cache import LEAST_MATCH
from mlx_onevision.engine.request import ActiveRequest, PromptRequest, TokenText, request_size
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import CancelledError, OutOfMemoryError, RequestError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.memory_sizes import SMALLEST
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Medium, Processor
from mlx_onevision.sampling.sampler import Sampling

LONG = "one two three four five six seven eight nine ten " * 30  # prompts of several chunks
TOKENS = 16
GREEDY = Sampling()


def picture(seed: int, height: int = 150, width: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def turn(text: str, *media: Any) -> dict[str, Any]:
    """One message about pictures, and arrays of four axes, which are videos."""
    kinds = ["video" if getattr(medium, "ndim", 3) == 4 else "image" for medium in media]
    blocks = [{"type": kind, kind: medium} for kind, medium in zip(kinds, media, strict=True)]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


ROWS: list[list[dict[str, Any]]] = [
    [turn("hello")],
    [turn("what is in this image", picture(0))],
    [turn("which of the two", picture(1), picture(2, 40, 90))],
    [turn(LONG)],
    [
        turn("what is it", picture(0)),
        {"role": "assistant", "content": "a red star"},
        turn("where"),
    ],
    [turn(LONG + "and this", picture(3, 300, 500))],
    [turn("what moves here", np.stack([picture(n, 40, 60) for n in range(5)]))],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tied=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    model = load(folder)
    yield model
    model.close()


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[int, ...]]:
    """The greedy answer to each row, asked by itself."""
    return [model.generate(messages=row, max_tokens=TOKENS).tokens for row in ROWS]


# Through the library.


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


# On the inference thread.


class Waiting(ActiveRequest):
    """Keeps its tokens and ends, and is cancelled after so many tokens."""

    def __init__(
        self,
        prompt: Inputs,
        cancel_after: int | None = None,
        sampling: Sampling = GREEDY,
        max_tokens: int = TOKENS,
    ) -> None:
        request = PromptRequest(prompt, sampling, max_tokens)
        super().__init__(request, NoText(), max_tokens, (), threading.Event())
        self.tokens: list[int] = []
        self._cancel_after = cancel_after

    def check(self, *_: object) -> None:
        if self._cancel_after is not None and len(self.tokens) >= self._cancel_after:
            raise CancelledError("the request was cancelled")

    def accept(self, token: int) -> None:
        super().accept(token)
        self.tokens.append(token)

    def drain(self) -> None:
        items = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        assert all(isinstance(item, TokenText) for item in items[:-1]), "something after the end"
        self.failure = items[-1]
        assert self.failure is None or isinstance(self.failure, BaseException)


class NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""


@pytest.fixture(scope="module")
def inputs(folder: Path) -> list[Inputs]:
    processor = Processor.from_folder(folder, load_checkpoint(folder).config)
    return [processor.prepare(normalise_messages(messages=row)) for row in ROWS]


@pytest.fixture
def runner(folder: Path) -> Runner:
    runner = Runner(load_checkpoint(folder))
    runner.model.budget = replace(runner.model.budget, chunk=2048)
    return runner


def together(
    runner: Runner, inputs: Sequence[Inputs], cancel_after: Sequence[int | None] | None = None
) -> list[Waiting]:
    after = cancel_after or [None] * len(inputs)
    requests = [Waiting(*pair) for pair in zip(inputs, after, strict=True)]
    serve(runner, deque(requests))
    for request in requests:
        request.drain()
    runner.model.bank.capacity = 0
    with runner.model.bank.in_use([]):
        pass
    assert runner.model.bank.nbytes == 0  # no request holds on to its media
    return requests


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("chunk", [256, 2048])
def test_memory_changes_who_waits_and_not_what_is_said(
    runner: Runner,
    inputs: list[Inputs],
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tight: bool,
    chunk: int,
) -> None:
    runner.model.budget = replace(runner.model.budget, chunk=chunk)
    sizes, arithmetic = [request_size(prompt, TOKENS) for prompt in inputs], runner.memory
    if tight:
        runner.limit = max(arithmetic.request(size, SMALLEST).total for size in sizes)
    most, step = 0, Batch._step

    def watched(batch: Batch) -> None:
        nonlocal most
        active = [request.size for request in batch.requests]
        assert arithmetic.batch(active, runner.model.budget).total <= runner.limit
        most = max(most, len(active))
        step(batch)

    monkeypatch.setattr(Batch, "_step", watched)
    requests = together(runner, inputs)
    assert [tuple(request.tokens) for request in requests] == alone
    assert 1 <= most < 7 if tight else most == 7


def test_a_picture_of_several_rows_is_encoded_once(runner: Runner, inputs: list[Inputs]) -> None:
    requests = together(runner, [inputs[1], inputs[4], inputs[2], inputs[1]])
    assert [request.counters.encoded_media for request in requests] == [1, 0, 2, 0]


def test_requests_that_begin_together_share_groups_of_tiles(
    runner: Runner,
    inputs: list[Inputs],
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    features = runner.model.vision_features

    def watched(pixels: Any) -> Any:
        sizes.append(len(pixels))
        return features(pixels)

    monkeypatch.setattr(runner.model, "vision_features", watched)
    runner.model.budget = replace(runner.model.budget, tile_group=4)
    requests = together(runner, [inputs[1], inputs[2]])
    assert [tuple(request.tokens) for request in requests] == [alone[1], alone[2]]
    tiles = sum(len(medium.tiles) for number in (1, 2) for medium in inputs[number].media)
    assert sizes == [4] * (tiles // 4) + [tiles % 4] * (tiles % 4 > 0)
    assert all(request.counters.encode_seconds > 0 for request in requests)


def test_cancelled_before_within_and_after_the_prompt(
    runner: Runner, inputs: list[Inputs], alone: list[tuple[int, ...]]
) -> None:
    requests = together(runner, inputs, [None, 0, 3, None, 1, None, 2])
    assert [request.failure for request in requests] == [None] * 7
    lengths = [TOKENS, 0, 3, TOKENS, 1, TOKENS, 2]
    for request, length, expected in zip(requests, lengths, alone, strict=True):
        assert tuple(request.tokens) == expected[:length]


def test_a_row_that_cannot_be_encoded_fails_alone(
    runner: Runner,
    inputs: list[Inputs],
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = runner.model.encode_groups

    def failing(media: list[Medium], *rest: Any) -> Any:
        if inputs[1].media[0].key in [medium.key for medium in media]:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return encode(media, *rest)

    monkeypatch.setattr(runner.model, "encode_groups", failing)
    requests = together(runner, [inputs[0], inputs[1], inputs[2]])
    assert [tuple(requests[n].tokens) for n in (0, 2)] == [alone[0], alone[2]]
    assert requests[1].tokens == [] and isinstance(requests[1].failure, OutOfMemoryError)


def test_those_that_wait_outlive_a_failure(
    runner: Runner,
    inputs: list[Inputs],
    alone: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rows at a time; the step in which the first two are decoding fails."""
    monkeypatch.setattr(memory, "MAX_BATCH_SIZE", 2)
    step, calls = Batch._step, 0

    def failing(batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        step(batch)

    monkeypatch.setattr(Batch, "_step", failing)
    requests = together(runner, [inputs[0], inputs[1], inputs[2], inputs[4]])
    assert [isinstance(request.failure, OutOfMemoryError) for request in requests] == [
        *(True, True),
        *(False, False),
    ]
    assert [tuple(request.tokens) for request in requests[2:]] == [alone[2], alone[4]]


# Rows that begin alike.

WORDS = ("red", "blue", "green", "left of the star", "right", "above", "below", "the largest")
SYSTEM = "be brief and say only what is there to be seen, and nothing else at all, ever " * 2


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Inputs]:
    """Eight about one picture, and two about another, under the same system prompt."""
    processor = Processor.from_folder(folder, load_checkpoint(folder).config)
    asked = [turn(f"what is {word}", picture(4, 300, 500)) for word in WORDS]
    asked += [turn(f"what is {word}", picture(5)) for word in WORDS[:2]]
    return [processor.prepare(normalise_messages(messages=[m], system=SYSTEM)) for m in asked]


class Calls:
    """What goes through the model, in order: groups of tiles, chunks of prompts and decode steps,
    each with how many tiles, ids or rows it has.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, int]] = []
        call, features = OneVision.__call__, OneVision.vision_features

        def called(model: OneVision, ids: Any, *rest: Any, **named: Any) -> Any:
            self.made.append(("decode" if ids.shape[1] == 1 else "prefill", ids.size))
            return call(model, ids, *rest, **named)

        def seen(model: OneVision, pixels: Any) -> Any:
            self.made.append(("tiles", len(pixels)))
            return features(model, pixels)

        monkeypatch.setattr(OneVision, "__call__", called)
        monkeypatch.setattr(OneVision, "vision_features", seen)

    def count(self, kind: str) -> int:
        return sum(size for made, size in self.made if made == kind)


def answered(runner: Runner, prompt: Inputs, sampling: Sampling = GREEDY) -> list[int]:
    """By itself, with nothing kept from before."""
    runner.prefix.clear()
    request = Waiting(prompt, None, sampling)
    assert runner.run_alone(request)
    return request.tokens


def answer_all(runner: Runner, requests: Sequence[Waiting]) -> None:
    serve(runner, deque(requests))
    for request in requests:
        request.drain()


def test_what_rows_begin_with_is_prefilled_once(
    runner: Runner, questions: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    samplings = [
        Sampling(temperature=1.5, seed=n, repetition_penalty=1.3) if n % 2 else Sampling()
        for n in range(8)
    ]
    expected = [answered(runner, *pair) for pair in zip(questions[:8], samplings, strict=True)]
    runner.prefix.clear()
    calls = Calls(monkeypatch)
    requests = [
        Waiting(prompt, None, sampling)
        for prompt, sampling in zip(questions[:8], samplings, strict=True)
    ]
    answer_all(runner, requests)
    assert [request.tokens for request in requests] == expected
    longest = max(len(prompt.input_ids) for prompt in questions[:8])
    assert longest > 150 and calls.count("prefill") < longest + 8 * 32
    assert sum(request.counters.cached_tokens for request in requests) > 7 * (longest - 32)


def test_groups_of_rows_that_begin_alike_share_what_they_all_begin_with(
    runner: Runner, questions: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [questions[n] for n in (8, 0, 9, 1)]
    expected = [answered(runner, prompt) for prompt in prompts]
    runner.prefix.clear()
    calls = Calls(monkeypatch)
    requests = [Waiting(prompt) for prompt in prompts]
    answer_all(runner, requests)
    assert [request.tokens for request in requests] == expected
    once = [len(questions[n].input_ids) for n in (0, 8)]
    assert calls.count("prefill") < sum(once) - LEAST_MATCH + 4 * 32
    held = sorted(request.counters.cached_tokens for request in requests)
    assert held[0] == 0 and 300 > held[1] >= LEAST_MATCH and held[2] > once[1] - 32


def test_a_newcomer_goes_on_from_what_runs_and_from_what_is_kept(
    runner: Runner, questions: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [answered(runner, prompt) for prompt in questions[:4]]
    waiting: deque[ActiveRequest] = deque()
    newcomers = [Waiting(prompt) for prompt in questions[1:4]]

    class Joined(Waiting):
        def accept(self, token: int) -> None:
            super().accept(token)
            if len(self.tokens) == 3:  # it runs alone, and goes on with the others
                waiting.append(newcomers[0])
            if len(self.tokens) == 6:
                waiting.append(newcomers[1])

    first = Joined(questions[0])
    runner.prefix.clear()
    calls = Calls(monkeypatch)
    waiting.append(first)
    serve(runner, waiting)
    first.drain()
    assert first.failure is None
    waiting.extend([newcomers[2], Waiting(questions[8])])  # the others' caches have been kept
    serve(runner, waiting)
    assert [request.tokens for request in (first, *newcomers)] == expected
    for request in newcomers:
        assert request.counters.cached_tokens > len(request.ids) - TOKENS - 32
        assert request.counters.encoded_media == 0
    assert calls.count("prefill") < len(first.ids) + len(questions[8].input_ids) + 3 * 32


@pytest.mark.parametrize("how", ["cancelled", "fails"])
def test_the_others_outlive_the_row_that_reads_for_them(
    runner: Runner, questions: list[Inputs], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    runner.chunk = 64
    expected = [answered(runner, prompt) for prompt in questions[:4]]
    runner.prefix.clear()
    requests = [Waiting(prompt) for prompt in questions[:4]]
    call, calls = OneVision.__call__, 0

    def called(model: OneVision, ids: Any, *rest: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the midst of what all of them begin with
            reading = min(requests, key=lambda request: request.ids)
            if how == "fails":
                raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
            reading._cancel_after = 0
        return call(model, ids, *rest, **named)

    monkeypatch.setattr(OneVision, "__call__", called)
    answer_all(runner, requests)
    ended = [request for request in requests if not request.tokens]
    assert len(ended) == 1
    assert isinstance(ended[0].failure, OutOfMemoryError) == (how == "fails")
    for request, tokens in zip(requests, expected, strict=True):
        assert request.tokens == tokens or request is ended[0]


def test_others_decode_between_the_chunks_and_groups_of_tiles_of_a_newcomer(
    runner: Runner, questions: list[Inputs], inputs: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.chunk = 64
    runner.model.budget = replace(runner.model.budget, tile_group=1)
    prompts = [questions[0], inputs[6], inputs[3]]  # tiles, frames and a long text
    expected = [answered(runner, prompt) for prompt in [inputs[0], *prompts]]
    runner.prefix.clear()
    runner.model.bank.shrink(0)
    waiting: deque[ActiveRequest] = deque()
    newcomers = [Waiting(prompt) for prompt in prompts]

    class Joined(Waiting):
        def accept(self, token: int) -> None:
            super().accept(token)
            if len(self.tokens) == 3:
                waiting.extend(newcomers)

    first = Joined(inputs[0], max_tokens=80)
    waiting.append(first)
    calls = Calls(monkeypatch)
    serve(runner, waiting)
    assert first.tokens[:TOKENS] == expected[0]
    assert [request.tokens for request in newcomers] == expected[1:]
    kinds = [kind for kind, _ in calls.made[1:]]  # after the first one's own prompt
    assert kinds.count("tiles") > 10 and kinds.count("prefill") > 10
    others = [kind for kind in kinds[: len(kinds) - TOKENS] if kind != "decode"]
    steps = "".join(kind[0] for kind in kinds).split("d")
    assert len(others) == kinds.count("tiles") + kinds.count("prefill")
    assert max(map(len, steps)) == 1
    assert max(size for kind, size in calls.made if kind == "prefill") <= 64


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
