"""One table of ranges, for the library, the plugin contract, HTTP and ``llm``."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_onevision.errors import RequestError
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import GenerateRequest, TokenBias
from mlx_onevision.plugins.hosts.http.schemas import Penalties as HTTPSampling
from mlx_onevision.plugins.hosts.llm.models import OneVisionOptions
from mlx_onevision.sampling.ranges import RANGES
from mlx_onevision.sampling.sampler import Sampling

SAMPLING = [name for name in vars(Sampling()) if name != "logit_bias"]
# Values at and beside every bound of any setting.
VALUES = [
    -2,
    -2 - 1e-9,
    2 + 1e-9,
    -0.5,
    -1e-9,
    0,
    1e-9,
    0.5,
    1,
    1 + 1e-9,
    2,
    20,
    21,
    2**64 - 1,
    2**64,
    math.nan,
    math.inf,
]


def accepted(make: Callable[..., Any], values: dict[str, Any]) -> bool:
    try:
        make(**values)
    except (RequestError, PluginError, ValidationError):
        return False
    return True


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("value", VALUES)
def test_every_layer_takes_the_same_numbers(name: str, value: float) -> None:
    if RANGES[name].whole and not isinstance(value, int):
        value = 2  # JSON clients send whole numbers here; the types are checked elsewhere
    allowed = RANGES[name].holds(value)
    values = {name: value}
    assert accepted(Sampling, values) is allowed
    assert accepted(partial(GenerateRequest.ask, "a"), values) is allowed
    if math.isfinite(value):
        assert accepted(HTTPSampling, values) is allowed
        if name in OneVisionOptions.model_fields:
            assert accepted(OneVisionOptions, values) is allowed


def test_every_layer_takes_the_same_biases() -> None:
    for token, bias, allowed in (
        *((5, 100.0, True), (0, -100, True), (5, 100.1, False), (5, -101, False)),
        *((-1, 1, False), (5, True, False), ("5", 1, False)),
    ):
        assert accepted(Sampling, {"logit_bias": {token: bias}}) is allowed
        assert accepted(TokenBias, {"token": token, "bias": bias}) is allowed
        if token != "5":  # JSON's keys are texts
            assert accepted(HTTPSampling, {"logit_bias": {str(token): bias}}) is allowed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("temperature", "0 or more"),
        ("top_p", "above 0 and at most 1"),
        ("seed", "0 or more and below 2**64"),
        ("logprobs", "0 or more and at most 20"),
    ],
)
def test_a_range_says_itself(name: str, words: str) -> None:
    assert str(RANGES[name]) == words
