"""The conformance suite over HTTP: the client's backend, a real server, and what answers there."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from changed_checkpoints import endless
from served import EXAMPLES, Client, serving

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.conformance import BackendConformance
from mlx_onevision.plugins.interface import Backend, GenerateRequest


class OverHTTP(BackendConformance):
    """Every backend that is opened is another client of one server."""

    video = EXAMPLES.joinpath("circle.mp4").read_bytes()
    can_unload = False
    server: ClassVar[Client]

    @classmethod
    def open_backend(cls) -> Backend:
        return open_backend("http", url=cls.server.url)


class TestFake(OverHTTP):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def serve(cls) -> Iterator[None]:
        with serving(open_backend("fake", delay=0.01)) as cls.server:
            yield

    def long_request(self, **settings: Any) -> GenerateRequest:
        """It repeats what it is asked, so this is asked at length."""
        return GenerateRequest.ask("a very long story " * 100, **{"max_tokens": 2000, **settings})


class TestEngine(OverHTTP):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def serve(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        folder = endless(tmp_path_factory.mktemp("endless") / "model")
        with serving(open_backend("engine", model=folder)) as cls.server:
            yield
