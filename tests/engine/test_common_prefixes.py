"""Requests of a batch that begin alike: what they share is prefilled once."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine.batches import GREEDY, TOKENS, Waiting, picture, turn

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.prefix_cache import LEAST_MATCH
from mlx_onevision.engine.request import ActiveRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor
from mlx_onevision.sampling.sampler import Sampling

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
