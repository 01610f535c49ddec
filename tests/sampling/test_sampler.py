"""Sampling numbers are checked, and penalties never see a virtual id."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.sampler import Sampling

LOGPROBS = mx.log(mx.full((1, 1000), 1e-3))


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


@pytest.mark.parametrize("least", [{"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}])
def test_next_to_no_choice_is_greedy(least: dict[str, Any]) -> None:
    choose = Sampling(**least, seed=0).sampler()
    logprobs = mx.log(mx.array([[0.1, 0.7, 0.2]]))
    assert {choose(logprobs).item() for _ in range(20)} == {1}


def test_a_seed_repeats_the_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        choose = Sampling(temperature=1.0, seed=seed).sampler()
        return [choose(LOGPROBS).item() for _ in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(2**64 - 1) != draws(0)
    assert draws(None) != draws(None)


def test_answers_do_not_disturb_each_others_draws() -> None:
    alone = Sampling(temperature=1.0, seed=5).sampler()
    expected = [alone(LOGPROBS).item() for _ in range(8)]
    first, second = (Sampling(temperature=1.0, seed=seed).sampler() for seed in (5, 6))
    found = []
    for _ in range(8):
        found.append(first(LOGPROBS).item())
        second(LOGPROBS)
    assert found == expected


def test_filters_leave_only_what_they_allow() -> None:
    logprobs = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1]]))
    allowed = {
        "top_k": (1, {0}),
        "top_p": (0.65, {0, 1}),
        "min_p": (0.4, {0, 1, 2}),
        "temperature": (0.01, {0}),
    }
    for name, (value, ids) in allowed.items():
        options: dict[str, Any] = {"temperature": 1.0, "seed": 0, name: value}
        choose = Sampling(**options).sampler()
        assert {choose(logprobs).item() for _ in range(100)} == ids, name


def test_a_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    choose = Sampling(temperature=1.0, top_k=1000, seed=0).sampler()
    assert 0 <= choose(LOGPROBS).item() < 1000


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        # 0.37, 0.26, 0.20 and 0.17 at this temperature: the second is short of 0.7, the third not.
        ({"temperature": 2.0, "top_p": 0.7}, {0, 1, 2}),
        ({"temperature": 0.5, "top_p": 0.7}, {0}),  # 0.73
        # The two that top_k leaves have 0.67 and 0.33.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, {0}),
        ({"temperature": 2.0, "min_p": 0.5}, {0, 1, 2}),  # relative to the first: 0.71, 0.55, 0.45
        ({"temperature": 0.01, "top_p": 0.9999}, {0}),  # the others underflow
    ],
)
def test_filters_act_on_what_temperature_and_the_filter_before_have_left(
    options: dict[str, Any], ids: set[int]
) -> None:
    choose = Sampling(**options, seed=0).sampler()
    logprobs = mx.log(mx.array([[0.5, 0.25, 0.15, 0.1]]))
    assert {choose(logprobs).item() for _ in range(100)} == ids


def test_a_tie_for_the_last_place_of_top_k_stays() -> None:
    """As in the reference; logits in half precision often tie."""
    choose = Sampling(temperature=1.0, top_k=2, seed=0).sampler()
    logprobs = mx.log(mx.array([[0.1, 0.25, 0.4, 0.25]]))
    assert {choose(logprobs).item() for _ in range(100)} == {1, 2, 3}


def test_tokens_that_no_float_holds_after_the_temperature_are_drawn_all_the_same() -> None:
    """Their probabilities before it are summed up by top_p, and would all be 0."""
    choose = Sampling(temperature=1e-3, top_p=0.9, seed=0).sampler()
    logprobs = mx.log(mx.full((1, 1000), 1e-3))
    assert len({choose(logprobs).item() for _ in range(50)}) > 20


@pytest.mark.parametrize("cached", [0, 1, 4])
def test_the_penalty_is_that_of_the_prompt_with_its_own_placeholders(cached: int) -> None:
    """0 and 2 are text, 4 is the video's placeholder and not the image's, which is 5. What comes
    from a KV cache is not among the ids that mlx-lm hands over.
    """
    vocab_size, prompt, virtual = 6, [0, 4, 4, 2], [0, 1000, 1001, 2]
    (penalize,) = Sampling(repetition_penalty=2.0).logits_processors(vocab_size, prompt)
    logits = mx.array([[4.0, 4.0, -4.0, 4.0, 4.0, 4.0]])
    generated = [1]
    penalized = penalize(mx.array(virtual[cached:] + generated), logits)
    assert penalized.tolist() == [[2.0, 2.0, -8.0, 4.0, 2.0, 4.0]]


def test_no_penalty_costs_nothing() -> None:
    assert Sampling().logits_processors(6, [5]) == []


def test_penalties_of_the_answer_alone() -> None:
    """Of what was said so far, before and after the processors were made; the prompt, and what of
    it comes from a KV cache, is not penalized.
    """
    settings = Sampling(presence_penalty=1.0, frequency_penalty=0.5)
    (penalize,) = settings.logits_processors(6, [0, 1, 2], [3])
    logits = mx.zeros((1, 6))
    assert penalize(mx.array([1, 2, 3]), logits).tolist() == [[0, 0, 0, -1.5, 0, 0]]
    assert penalize(mx.array([1, 2, 3, 4]), mx.zeros((1, 6))).tolist() == [[0, 0, 0, -1.5, -1.5, 0]]
    again = penalize(mx.array([1, 2, 3, 4, 3]), mx.zeros((1, 6)))
    assert again.tolist() == [[0, 0, 0, -2.0, -1.5, 0]]
    (first,) = settings.logits_processors(6, [0, 1, 2])
    assert first(mx.array([0, 1, 2]), mx.zeros((1, 6))).tolist() == [[0] * 6]


def test_biases() -> None:
    (bias,) = Sampling(logit_bias={1: 2.0, 5: -100}).logits_processors(6, [0])
    assert bias(mx.array([0]), mx.ones((1, 6))).tolist() == [[1, 3, 1, 1, 1, -99]]
    wrong: Any
    for wrong in ({1: 101}, {-1: 1}, {"1": 1}, {1: True}, [1]):
        with pytest.raises(RequestError, match="logit_bias"):
            Sampling(logit_bias=wrong)
