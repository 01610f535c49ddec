"""A hundred faults and more, in every place: each ends requests that were under way, and the next
one is answered as ever.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import write
from faults import PLACES, survived

from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.interface import GenerateRequest, Media
from mlx_onevision.plugins.service.service import Service

PICTURE = Media(
    "image", data=Path(__file__).parents[2].joinpath("examples/shapes.png").read_bytes()
)
TIMES = 25


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with open_engine(write(tmp_path_factory.mktemp("checkpoint") / "model", tied=False)) as backend:
        yield backend


@pytest.mark.parametrize("stop", [(), ("never said",)], ids=["reader", "watched"])
@pytest.mark.parametrize("place", PLACES)
def test_after_every_fault_comes_a_good_answer(
    engine: Service, place: str, stop: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """With a stop string the text is made on the inference thread, too."""
    caplog.set_level(logging.CRITICAL)
    requests = [
        GenerateRequest.ask(
            f"what is {n}", PICTURE, max_tokens=8, stop=stop, repetition_penalty=1.1
        )
        for n in range(3)
    ]
    good = engine.generate(requests[0]).result().text
    assert survived(engine, requests, good, place, TIMES) == TIMES
