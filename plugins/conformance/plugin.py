"""A plugin of pytest that runs the suite on any backend that can be opened by its name.

    pytest -p mlx_onevision.plugins.conformance.plugin \
        --pyargs mlx_onevision.plugins.conformance.plugin \
        --backend mine --setting url=http://127.0.0.1:8000 --video some.mp4

Only who names it with ``-p`` loads it. Values of settings are JSON where they are, else texts.
"""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlx_onevision.plugins.conformance import BackendConformance
from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.discovery import backends, open_backend
from mlx_onevision.plugins.interface import Backend, GenerateRequest, Message


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options that name the backend and say what it needs."""
    group = parser.getgroup("mlx-onevision", "conformance of a backend of mlx-onevision")
    group.addoption("--backend", metavar="NAME", help="the backend that is tested")
    group.addoption(
        "--setting",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what it is opened with; may be given several times",
    )
    group.addoption("--video", metavar="FILE", help="a video of some seconds, if it takes videos")
    group.addoption(
        "--long-request", metavar="TEXT", help="what it answers for some seconds, when asked this"
    )
    group.addoption(
        "--no-unload", action="store_true", help="its model is not its own to free (over a wire)"
    )
    group.addoption(
        "--answer-timeout",
        type=float,
        default=Subject.answer_timeout,
        metavar="S",
        help="seconds after which an answer is given up (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Raises pytest.UsageError for options that name nothing."""
    given = config.option
    there_are = ", ".join(backends())
    if given.backend is None:
        raise pytest.UsageError(f"--backend is missing; there are {there_are}")
    if given.backend not in backends():
        raise pytest.UsageError(f"there is no backend {given.backend!r}; there are {there_are}")
    if given.video is not None and not Path(given.video).is_file():
        raise pytest.UsageError(f"there is no file {given.video!r}; --video takes one")
    for text in given.setting:
        parse_setting(text)


def parse_setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` as a name and its value, which is JSON or else a text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise pytest.UsageError(f"--setting takes KEY=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class TestBackend(BackendConformance):
    """The suite, on the backend that ``--backend`` names."""

    option: ClassVar[Namespace]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def choose(cls, pytestconfig: pytest.Config) -> None:
        cls.option = option = pytestconfig.option
        cls.answer_timeout, cls.can_unload = option.answer_timeout, not option.no_unload
        cls.video = None if option.video is None else Path(option.video).read_bytes()

    @classmethod
    def open_backend(cls) -> Backend:
        return open_backend(cls.option.backend, **dict(map(parse_setting, cls.option.setting)))

    def long_request(self, **settings: Any) -> GenerateRequest:
        usual = super().long_request(**settings)
        text = self.option.long_request
        return usual if text is None else replace(usual, messages=[Message("user", text)])
