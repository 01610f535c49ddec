"""Faults put into the engine while it answers, each in its own place and after so many calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_onevision.network.onevision import OneVision
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import ErrorEvent, EventStream, GenerateRequest
from mlx_onevision.plugins.service.service import Service
from mlx_onevision.prompt.processor import Processor
from mlx_onevision.prompt.tokenizer import Tokenizer
from mlx_onevision.sampling.detokenizer import Detokenizer
from mlx_onevision.sampling.sampler import Sampling

PLACES = ("step", "prefill", "sampler", "processor", "detokenizer")
BEFORE = ("tokenizer", "preprocessing", "tower")  # of a request that has an image of its own


@contextmanager
def fault(place: str, after: int) -> Iterator[None]:
    """The call number ``after``, from 0 on, raises; those before it and behind it do not."""
    left = after

    def count() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise RuntimeError("a fault of the device at /secret/path")

    def model_called(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: OneVision, inputs: Any, *given: Any, **named: Any) -> Any:
            if (inputs.shape[1] == 1) == (place == "step"):
                count()
            return real(model, inputs, *given, **named)

        return call

    def chosen(real: Callable[..., Any]) -> Callable[..., Any]:
        def make(sampling: Sampling, *given: Any) -> Any:
            made = real(sampling, *given)

            def call(*values: Any) -> Any:
                count()
                return made(*values) if place == "sampler" else values[1]

            return call if place == "sampler" else [*made, call]

        return make

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            count()
            return real(*given)

        return call

    with pytest.MonkeyPatch.context() as patch:
        if place in ("step", "prefill"):
            patch.setattr(OneVision, "__call__", model_called(OneVision.__call__))
        elif place == "sampler":
            patch.setattr(Sampling, "sampler", chosen(Sampling.sampler))
        elif place == "processor":
            patch.setattr(Sampling, "logits_processors", chosen(Sampling.logits_processors))
        else:
            kind, name = {
                "detokenizer": (Detokenizer, "add"),
                "tokenizer": (Tokenizer, "encode"),
                "preprocessing": (Processor, "_images"),
                "tower": (OneVision, "vision_features"),
            }[place]
            patch.setattr(kind, name, counted(getattr(kind, name)))
        yield
    assert left < 0, "it was never reached"


def error_of(stream: EventStream[Any]) -> PluginError:
    last = list(stream)[-1]
    assert isinstance(last, ErrorEvent), last
    return last.error


def survived(
    engine: Service,
    ask: Callable[[int, int], GenerateRequest],
    good: GenerateRequest,
    place: str,
    times: int,
) -> int:
    """How often one of the requests was put an end to, alone and beside others, and the good one
    answered as ever afterwards; out of ``times``.

    ask : the request of a number, 0 to 2, of a round.
    """
    well, wanted = 0, engine.generate(good).result().text
    for number in range(times):
        others = number % 3
        once = place in ("prefill", "preprocessing", "tower")
        with fault(place, after=0 if once else number % 3):
            streams = [engine.generate(ask(number, n)) for n in range(1 + others)]
            ends = [list(stream)[-1] for stream in streams]
        failed = [end.error for end in ends if isinstance(end, ErrorEvent)]
        if place in ("detokenizer", "tokenizer", "preprocessing"):  # which are each request's own
            assert len(failed) == 1
        # A group of tiles of several requests that fails is tried again for each.
        assert failed or (place == "tower" and others)
        assert all(error.code == "internal" for error in failed)
        assert not any("secret" in str(error) for error in failed)
        well += engine.generate(good).result().text == wanted and engine.info().healthy
    return well
