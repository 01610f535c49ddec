"""Sampling numbers are checked, and penalties never see a virtual id."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling import Sampling


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -5},
        {"top_k": 2.5},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**70},
        {"seed": True},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_no_temperature_is_greedy() -> None:
    choose = Sampling().sampler()
    assert choose(mx.array([[0.1, 0.7, 0.2]])).item() == 1


def test_a_seed_repeats_the_draws() -> None:
    choose = Sampling(temperature=1.0).sampler()
    logprobs = mx.log(mx.full((1, 1000), 1e-3))

    def draws(seed: int) -> list[int]:
        mx.random.seed(seed)
        return [choose(logprobs).item() for _ in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_the_penalty_sees_placeholders_where_virtual_ids_stand() -> None:
    vocab_size, placeholder = 6, 5
    (penalize,) = Sampling(repetition_penalty=2.0).logits_processors(
        vocab_size, placeholder, before=[0]
    )
    logits = mx.array([[4.0, 4.0, -4.0, 4.0, 4.0, 4.0]])
    penalized = penalize(mx.array([2, 1000, 1001]), logits)
    # 0 came from the cache, 2 from the prompt, 5 stands for the two virtual ids.
    assert penalized.tolist() == [[2.0, 4.0, -8.0, 4.0, 4.0, 2.0]]


def test_no_penalty_costs_nothing() -> None:
    assert Sampling().logits_processors(6, 5) == []
