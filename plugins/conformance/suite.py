"""The suite on the backend that the command line names; see :mod:`plugin`."""

from typing import Any, ClassVar

import pytest

from mlx_onevision.plugins.conformance import BackendConformance
from mlx_onevision.plugins.conformance.plugin import Chosen
from mlx_onevision.plugins.discovery import open_backend
from mlx_onevision.plugins.interface import Backend, GenerateRequest


class TestBackend(BackendConformance):
    chosen: ClassVar[Chosen]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def choose(cls, pytestconfig: pytest.Config) -> None:
        cls.chosen = chosen = Chosen.of(pytestconfig)
        cls.video, cls.patience = chosen.video, chosen.patience
        cls.can_unload = chosen.can_unload

    @classmethod
    def open_backend(cls) -> Backend:
        return open_backend(cls.chosen.backend, **cls.chosen.settings)

    def long_request(self, **settings: Any) -> GenerateRequest:
        usual = super().long_request(**settings)
        if self.chosen.long is None:
            return usual
        values = {**usual.to_dict(), "messages": [{"role": "user", "content": self.chosen.long}]}
        return GenerateRequest.from_dict(values)
