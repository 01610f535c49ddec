"""The conformance suite over MCP: what is behind the server is the same backend as in process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.conformance import BackendConformance
from mlx_onevision.plugins.interface import Backend, GenerateRequest

ROOT = Path(__file__).parents[2]
VIDEO = ROOT.joinpath("examples/circle.mp4").read_bytes()
PROGRAM = str(Path(__file__).with_name("mcp_server.py"))


class TestFake(BackendConformance):
    video = VIDEO

    @classmethod
    def open_backend(cls) -> Backend:
        asked = {"settings": {"contract": True}, "fake": {"delay": 0.01}}
        return open_backend("mcp", command=[sys.executable, PROGRAM, json.dumps(asked)])

    def long_request(self, **settings: Any) -> GenerateRequest:
        """It repeats what it is told, so this is told at length."""
        return GenerateRequest.ask("a very long story " * 100, **{"max_tokens": 2000, **settings})


class TestEngine(BackendConformance):
    """The demo model, which here does not know how to end an answer: a long one is long."""

    video = VIDEO
    folder: Path

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def endless(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.folder = tmp_path_factory.mktemp("endless") / "model"
        shutil.copytree(EMBEDDED, cls.folder)
        settings = cls.folder / "generation_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps({**values, "eos_token_id": [0]}), encoding="utf-8")

    @classmethod
    def open_backend(cls) -> Backend:
        program = [sys.executable, "-m", "mlx_onevision", "mcp", "--contract"]
        return open_backend("mcp", command=[*program, "--model", str(cls.folder)])
