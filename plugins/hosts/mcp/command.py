"""``mlx-onevision mcp``."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import click

from mlx_onevision.cli.loading import model_or_demo, report_unused_filters
from mlx_onevision.cli.options import LOADING, SAMPLING, decoding_options, gathered, option
from mlx_onevision.cli.ranks import share_model
from mlx_onevision.cli.values import Number
from mlx_onevision.errors import RequestError
from mlx_onevision.plugins.hosts.mcp import pipes
from mlx_onevision.sampling.ranges import Range


@click.command()
@option("model")
@click.option(
    "--allow-dir",
    "folders",
    multiple=True,
    metavar="FOLDER",
    help="Files below it may be read; can be given several times. Default: none.",
)
@option("max_tokens", default=4096, show_default=True, help="Of one answer, at most.")
@gathered("sampling", *SAMPLING)
@option(
    "timeout",
    default=50,
    show_default=True,
    type=Number(Range(ge=1, le=24 * 3600)),
    help="Seconds after which a call is answered with what there is; many hosts wait for 60.",
)
@option("keep_alive", help="Free the model after S seconds without calls. Default: never.")
@gathered("loading", *LOADING)
@decoding_options
@option("split")
def mcp(
    model: str | None,
    folders: tuple[str, ...],
    max_tokens: int,
    sampling: dict[str, Any],
    timeout: float,
    keep_alive: float | None,
    loading: dict[str, Any],
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
    share_model(model, loading, {"--keep-alive": keep_alive}, split)
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
    report_unused_filters(sampling)

    from mlx_onevision.media.parallel import share_heaps
    from mlx_onevision.plugins.adapters.engine import open_engine
    from mlx_onevision.plugins.contract.errors import PluginError
    from mlx_onevision.plugins.hosts.mcp.allowed_files import (
        ALLOW_DIR_HINT,
        MAX_IMAGE_PIXELS,
        McpSettings,
    )
    from mlx_onevision.plugins.service.media_policy import Hints, MediaPolicy
    from mlx_onevision.plugins.service.service import Limits

    share_heaps()
    try:
        hints = Hints(folders=ALLOW_DIR_HINT)
        policy = MediaPolicy(folders=folders, pixels=MAX_IMAGE_PIXELS, hints=hints, **decoding)
        backend = open_engine(
            model,
            **loading,
            defaults=sampling,
            policy=policy,
            # Calls have their own time, and descriptions take as long as they take.
            limits=Limits(
                timeout=None, video_timeout=None, max_tokens=max_tokens, keep_alive=keep_alive
            ),
        )
        if "sharded" in loading:
            backend.load()  # on other ranks, all that is done

        from mlx_onevision.plugins.hosts.mcp.server import serve

        serve(backend, taken, McpSettings(policy, timeout, max_tokens))
    except PluginError as error:
        raise RequestError(str(error)) from error
