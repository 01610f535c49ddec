"""The options that say which model is meant; every command has the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    pass


model_option = click.option(
    "--model",
    metavar="MODEL",
    help="A folder, a Hugging Face id, 0.5b, 7b, 72b or demo. Default: the embedded demo model.",
)
revision_option = click.option(
    "--revision", metavar="REV", help="A branch, tag or commit of a Hugging Face model."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Compute in this type. Default: the checkpoint's.",
)


DEBUG = "mlx_onevision.debug"


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--debug``, which the group reads when the command has failed."""
    option = click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )
    return option(command)
