"""Batches on the inference thread: memory, media that are shared, cancelling and failures."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine.batches import TOKENS, Waiting

from mlx_onevision.engine.batch import Batch, serve
from mlx_onevision.engine.request import request_size
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.network import memory_budget as memory
from mlx_onevision.network.memory_sizes import SMALLEST
from mlx_onevision.prompt.processor import Inputs, Medium


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
