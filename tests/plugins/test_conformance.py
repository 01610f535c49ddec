"""The conformance suite, run on this package's own backends."""

from pathlib import Path
from typing import Any

import pytest
from changed_checkpoints import endless

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.conformance import BackendConformance
from mlx_onevision.plugins.conformance.answers import (
    Answers,
    Embeddings,
    LogprobsAndSchemas,
    Videos,
)
from mlx_onevision.plugins.interface import Backend, GenerateRequest

VIDEO = Path(__file__).parents[2].joinpath("examples/circle.mp4").read_bytes()


class TestFake(BackendConformance):
    video = VIDEO

    @classmethod
    def open_backend(cls) -> Backend:
        return open_backend("fake", delay=0.01)

    def long_request(self, **settings: Any) -> GenerateRequest:
        """It repeats what it is asked, so this is asked at length."""
        return GenerateRequest.ask("a very long story " * 100, **{"max_tokens": 2000, **settings})


class TestPlain(Answers, LogprobsAndSchemas, Embeddings, Videos):
    """One that claims nothing but answers: what it does not claim it refuses."""

    @classmethod
    def open_backend(cls) -> Backend:
        claims = ("embed", "describe_video", "images", "videos", "logprobs", "json_schema")
        return open_backend("fake", without=claims)


class TestEngine(BackendConformance):
    video = VIDEO
    folder: Path

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def make(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.folder = endless(tmp_path_factory.mktemp("endless") / "model")

    @classmethod
    def open_backend(cls) -> Backend:
        return open_backend("engine", model=cls.folder)
