"""The suite on the backend that the command line names; see :mod:`plugin`."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlx_onevision.plugins.conformance import BackendConformance
from mlx_onevision.plugins.conformance.plugin import parse_setting
from mlx_onevision.plugins.discovery import open_backend
from mlx_onevision.plugins.interface import Backend, GenerateRequest, Message


class TestBackend(BackendConformance):
    option: ClassVar[Namespace]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def choose(cls, pytestconfig: pytest.Config) -> None:
        cls.option = option = pytestconfig.option
        cls.patience, cls.can_unload = option.patience, not option.no_unload
        cls.video = None if option.video is None else Path(option.video).read_bytes()

    @classmethod
    def open_backend(cls) -> Backend:
        return open_backend(cls.option.backend, **dict(map(parse_setting, cls.option.setting)))

    def long_request(self, **settings: Any) -> GenerateRequest:
        usual = super().long_request(**settings)
        text = self.option.long_request
        return usual if text is None else replace(usual, messages=[Message("user", text)])
