"""``mlx-onevision mcp``."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import click

from mlx_onevision.cli.options import (
    decoder_options,
    dtype_option,
    memory_options,
    model_option,
    model_or_demo,
    revision_option,
    share,
    split_option,
)
from mlx_onevision.errors import RequestError
from mlx_onevision.plugins.hosts.mcp import pipes


@click.command(short_help="Serve a model over MCP, to Claude Desktop and other hosts.")
@model_option
@click.option(
    "--allow-dir",
    "folders",
    multiple=True,
    metavar="FOLDER",
    help="Files below it may be read; can be given several times. Default: none.",
)
@click.option(
    "--max-tokens",
    default=4096,
    show_default=True,
    type=click.IntRange(1),
    help="Of one answer, at most.",
)
@click.option(
    "--timeout",
    default=50.0,
    show_default=True,
    type=click.FloatRange(1, 24 * 3600),
    metavar="S",
    help="Seconds after which a call is answered with what there is; many hosts wait for 60.",
)
@click.option(
    "--keep-alive",
    type=click.FloatRange(0),
    metavar="S",
    help="Free the model after S seconds without calls. Default: never.",
)
@revision_option
@dtype_option
@memory_options
@decoder_options
@split_option
def mcp(
    model: str | None,
    folders: tuple[str, ...],
    max_tokens: int,
    timeout: float,
    keep_alive: float | None,
    revision: str | None,
    dtype: str | None,
    memory: dict[str, Any],
    decoding: dict[str, Any],
    split: str | tuple[float, ...] | None,
) -> None:
    """Serve a model over MCP, to Claude Desktop and other hosts.

    A host starts this itself and speaks to it on stdin and stdout; it ends with its host. Only
    files below the folders of --allow-dir are read.

    \b
    mlx-onevision mcp --model 7b --allow-dir ~/Pictures --allow-dir ~/Movies
    """
    if find_spec("mcp") is None:
        raise RequestError("mcp needs the extra of its name; pip install 'mlx-onevision[mcp]'")
    for folder in folders:
        if not os.path.isdir(os.path.expanduser(folder)):
            raise RequestError(f"--allow-dir {folder!r} is no folder; name one that exists")
    settings = {"revision": revision, "dtype": dtype, **memory}
    share(model, settings, {"--keep-alive": keep_alive}, split)
    try:  # before anything is imported that could print
        at_terminal = os.isatty(0)
        taken = pipes.take_stdio()
    except OSError:
        raise RequestError("mcp needs an open stdin and stdout; let a host start it") from None
    if at_terminal:
        click.echo(
            "This speaks MCP on stdin and stdout: let a host start it. Ctrl-C ends.", err=True
        )
    model = model_or_demo(model)

    from mlx_onevision.plugins.adapters.engine import open_engine
    from mlx_onevision.plugins.contract.errors import PluginError
    from mlx_onevision.plugins.hosts.mcp.allowed_files import OPTION, PIXELS, McpSettings
    from mlx_onevision.plugins.hosts.mcp.server import serve
    from mlx_onevision.plugins.service.media_policy import Hints, MediaPolicy
    from mlx_onevision.plugins.service.service import Limits

    try:
        hints = Hints(folders=OPTION)
        policy = MediaPolicy(folders=folders, pixels=PIXELS, hints=hints, **decoding)
        backend = open_engine(
            model,
            **settings,
            policy=policy,
            # Calls have their own time, and descriptions take as long as they take.
            limits=Limits(
                timeout=None, film_timeout=None, max_tokens=max_tokens, keep_alive=keep_alive
            ),
        )
        if "sharded" in settings:
            backend.load()  # the other ranks wait for it
        serve(backend, taken, McpSettings(policy, timeout, max_tokens))
    except PluginError as error:
        raise RequestError(str(error)) from error
