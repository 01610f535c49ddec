"""Faults in every place: each ends requests that were under way, and the next one is answered as
ever.
"""

import io
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from checkpoints import write
from faults import BEFORE, PLACES, survived
from hostile.sizes import cases
from PIL import Image

from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.interface import GenerateRequest, Media
from mlx_onevision.plugins.service.service import Service

TIMES = cases(3, 25)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with open_engine(write(tmp_path_factory.mktemp("checkpoint") / "model", tied=False)) as backend:
        yield backend


def asked(number: int, image: int, stop: tuple[str, ...] = ()) -> GenerateRequest:
    pixels = np.random.default_rng(image).integers(0, 256, (30, 40, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    medium = Media("image", data=out.getvalue())
    return GenerateRequest.ask(
        f"what is {number}", medium, max_tokens=8, stop=stop, repetition_penalty=1.1
    )


@pytest.mark.parametrize("stop", [(), ("never said",)], ids=["reader", "watched"])
@pytest.mark.parametrize("place", PLACES)
def test_after_every_fault_comes_a_good_answer(
    engine: Service, place: str, stop: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """With a stop string the text is made on the inference thread, too."""
    caplog.set_level(logging.CRITICAL)
    requests = [asked(number, 0, stop) for number in range(3)]
    assert survived(engine, lambda _, n: requests[n], requests[0], place, TIMES) == TIMES


@pytest.mark.parametrize("place", BEFORE)
def test_after_a_fault_before_the_prompt_is_read(
    engine: Service, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    good = asked(0, 0)
    first = {"tokenizer": 1000, "preprocessing": 2000, "tower": 3000}[place]

    def ask(round_: int, number: int) -> GenerateRequest:
        return asked(number, first + 3 * round_ + number)

    assert survived(engine, ask, good, place, TIMES) == TIMES
