"""A plugin of pytest that runs the suite on any backend that can be opened by its name, with no
file written:

    pytest -p mlx_onevision.plugins.conformance.plugin \
        --pyargs mlx_onevision.plugins.conformance.suite \
        --backend mine --setting url=http://127.0.0.1:8000 --video some.mp4

Only who names it with ``-p`` loads it. Values of settings are JSON where they are, else texts.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from mlx_onevision.plugins.conformance.subject import Subject
from mlx_onevision.plugins.discovery import backends


def pytest_addoption(parser: pytest.Parser) -> None:
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
        "--patience",
        type=float,
        default=Subject.patience,
        metavar="S",
        help="seconds after which an answer is given up (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    Chosen.of(config)


@dataclass(frozen=True)
class Chosen:
    """What the options say.

    long : what is asked for a long answer; None for what the suite asks.
    """

    backend: str
    settings: dict[str, Any]
    video: bytes | None
    long: str | None
    can_unload: bool
    patience: float

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """Raises pytest.UsageError for options that name nothing."""
        given: dict[str, Any] = vars(config.option)
        backend = given["backend"]
        there_are = ", ".join(backends())
        if backend is None:
            raise pytest.UsageError(f"--backend is missing; there are {there_are}")
        if backend not in backends():
            raise pytest.UsageError(f"there is no backend {backend!r}; there are {there_are}")
        video = given["video"]
        if video is not None and not Path(video).is_file():
            raise pytest.UsageError(f"there is no file {video!r}; --video takes one")
        return cls(
            backend=backend,
            settings=dict(map(_setting, given["setting"])),
            video=None if video is None else Path(video).read_bytes(),
            long=given["long_request"],
            can_unload=not given["no_unload"],
            patience=given["patience"],
        )


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise pytest.UsageError(f"--setting takes KEY=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
