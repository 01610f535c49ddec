# pyright: reportMissingTypeArgument=false
# (click.ParamType takes type arguments in newer versions of click only)
"""The kinds of values that options have, and how a wrong one is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlx_onevision.distributed import launched
from mlx_onevision.sampling.ranges import Range

MODELS = ("demo", "0.5b", "7b", "72b")


class Number(click.ParamType):
    """A number within a range, refused in the words that the library has for it.

    otherwise : added where it is no number at all.
    """

    name = "number"

    def __init__(self, allowed: Range, otherwise: str = "") -> None:
        self._allowed, self._otherwise = allowed, otherwise

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        way = ""
        try:
            number = int(value) if self._allowed.whole else float(value)
        except ValueError:
            number, way = None, self._otherwise
        if number is None or not self._allowed.holds(number):
            kind = "whole number" if self._allowed.whole else "number"
            self.fail(f"it must be a {kind}, {self._allowed}, not {value!r}{way}", param, ctx)
        return number


class Model(click.ParamType):
    """A model's name. A shell completes the short ones, and folders."""

    name = "model"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        del ctx, param
        names = [CompletionItem(name) for name in MODELS if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="dir")]


class Output(click.Path):
    """A file to be written, in a folder that exists. Its name says its form: it ends in one of
    ``endings``, where there are some.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx))).expanduser()
        if self.endings and path.suffix.lower() not in self.endings:
            self.fail(f"{path.name} does not end in {listed(self.endings)}", param, ctx)
        if not path.absolute().parent.is_dir():
            self.fail(f"there is no folder {path.parent}; make it first", param, ctx)
        return path


class Plot(Output):
    """A drawing of matplotlib's, which is there."""

    def __init__(self) -> None:
        super().__init__(".png", ".svg", ".pdf")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if find_spec("matplotlib") is None:
            self.fail("it needs the extra plot; pip install 'mlx-onevision[plot]'", param, ctx)
        return path


def listed(words: Sequence[str], last: str = "or") -> str:
    """``.png, .svg or .pdf``, or with another word before the ``last`` one."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def parse_split(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> str | tuple[float, ...] | None:
    """The value of ``--split``: "auto", or the ranks' shares of the layers.

    Raises:
        click.BadParameter: for anything else, and where mlx.launch has not started this process.
    """
    if value is None:
        return None
    if not launched():
        raise click.BadParameter("one process has all layers; start several with mlx.launch")
    if value == "auto":
        return value
    try:
        shares = tuple(float(share) for share in value.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < float("inf") for share in shares):
        raise click.BadParameter(f"{value!r} is neither auto nor numbers above 0, as in 30,50")
    return shares
