"""``mlx-onevision serve``."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import closing
from importlib.util import find_spec
from typing import Any

import click

from mlx_onevision.cli.loading import model_or_demo, report_unused_filters
from mlx_onevision.cli.options import (
    DEBUG,
    LOADING,
    SAMPLING,
    SOME_SECONDS,
    decoding_options,
    gathered,
    option,
    options,
)
from mlx_onevision.cli.ranks import share_model
from mlx_onevision.cli.values import Number
from mlx_onevision.distributed import prefix
from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.ranges import Range

TOKEN_VARIABLE = "MLX_ONEVISION_API_KEY"  # noqa: S105 (its name)
DEFAULT_MAX_TOKENS = 1024  # of an answer; what clients of OpenAI expect without max_tokens


@click.command()
@options("model", "name")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST",
    help="Where to listen; others need a token.",
)
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=Number(Range(ge=0, le=65535, whole=True)),
    metavar="N",
    help="Its port; 0 for any that is free.",
)
@click.option(
    "--allow-host", "names", multiple=True, metavar="NAME", help="A further name of this server."
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A page that may speak to the server: app://obsidian.md, or a scheme as vscode-webview:.",
)
@click.option("--ollama", is_flag=True, help="Serve Ollama's routes, too: /api/chat and others.")
@click.option(
    "--api-key",
    envvar=TOKEN_VARIABLE,
    metavar="TOKEN",
    help=f"Required of every request; better as {TOKEN_VARIABLE}. With --host one is made up.",
)
@click.option(
    "--require-token",
    is_flag=True,
    help="Make up a token on this machine's own address, too, where every user could ask.",
)
@click.option(
    "--media-root",
    "folders",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False),
    help="Requests may name files below it. Default: none.",
)
@click.option(
    "--allow-media-host",
    "media_hosts",
    multiple=True,
    metavar="NAME",
    help="Requests may name addresses of this host; * for every one. Default: none.",
)
@click.option(
    "--allow-private",
    is_flag=True,
    help="The hosts of --allow-media-host may be of this machine or its network.",
)
@click.option(
    "--concurrent",
    default=8,
    show_default=True,
    type=Number(Range(ge=1, whole=True)),
    metavar="N",
    help="Requests at once.",
)
@click.option(
    "--queue",
    "--waiting",
    "waiting",
    default=512,
    show_default=True,
    type=Number(Range(ge=0, whole=True)),
    metavar="N",
    help="Requests that wait; further ones are refused as busy.",
)
@click.option(
    "--max-request",
    default=32,
    show_default=True,
    metavar="MB",
    type=Number(Range(ge=1, le=4096, whole=True)),
    help="Of one request, its media as base64 included, and of what comes from a host.",
)
@click.option(
    "--max-upload",
    default=1024,
    show_default=True,
    metavar="MB",
    type=Number(Range(ge=1, le=1 << 20, whole=True)),
    help="Of a file that is sent by itself, onto the disk; all together take four times that.",
)
@click.option(
    "--max-pixels",
    default=120.0,
    show_default=True,
    metavar="M",
    type=Number(Range(ge=0.01, le=1000)),
    help="Millions of pixels of an image; each takes 7 bytes while it is read.",
)
@option("max_tokens", default=4096, show_default=True, help="Of one answer, at most.")
@gathered("sampling", *SAMPLING)
@option("timeout", default=300, show_default=True)
@click.option(
    "--video-timeout",
    default=6 * 3600,
    show_default=True,
    type=Number(SOME_SECONDS),
    metavar="S",
    help="Seconds for a video that is described.",
)
@click.option(
    "--log-requests",
    is_flag=True,
    help="A line of JSON for each request: id, route, status, seconds; nothing of its content.",
)
@option("keep_alive")
@gathered("loading", *LOADING)
@decoding_options
@option("split")
def serve(
    model: str | None,
    name: str | None,
    host: str,
    port: int,
    names: tuple[str, ...],
    origins: tuple[str, ...],
    ollama: bool,
    api_key: str | None,
    require_token: bool,
    folders: tuple[str, ...],
    media_hosts: tuple[str, ...],
    allow_private: bool,
    concurrent: int,
    waiting: int,
    max_request: int,
    max_upload: int,
    max_pixels: float,
    max_tokens: int,
    sampling: dict[str, Any],
    timeout: float,
    video_timeout: float,
    log_requests: bool,
    keep_alive: float | None,
    loading: dict[str, Any],
    decoding: dict[str, Any],
    split: str | tuple[float, ...] | None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it.

    Only programs on this machine reach it, images come with the requests, and no web page can
    speak to it. Sampling options are for requests without their own. Ctrl-C ends it.

    \b
    mlx-onevision serve --model 7b
    mlx-onevision serve --model 7b --media-root ~/Pictures --port 8080
    mlx-onevision serve --model 7b --quantize 4 --temp 0.5
    MLX_ONEVISION_API_KEY=… mlx-onevision serve --host 0.0.0.0
    """
    if any(find_spec(module) is None for module in ("starlette", "uvicorn", "pydantic")):
        needed = "serve needs what comes with the extra server"
        raise RequestError(f"{needed}; pip install 'mlx-onevision[server]'")
    share_model(model, loading, {"--keep-alive": keep_alive}, split)
    model = model_or_demo(model)
    report_unused_filters(sampling)

    from mlx_onevision.files import cache_folder
    from mlx_onevision.media.parallel import share_heaps
    from mlx_onevision.plugins.adapters.engine import import_engine, open_engine
    from mlx_onevision.plugins.contract.errors import PluginError
    from mlx_onevision.plugins.hosts.http import server
    from mlx_onevision.plugins.hosts.http.app import create_app
    from mlx_onevision.plugins.hosts.http.connections import raise_limit
    from mlx_onevision.plugins.hosts.http.middleware import log_to_stderr
    from mlx_onevision.plugins.hosts.http.server import ServerSettings, is_loopback
    from mlx_onevision.plugins.service.media_policy import Hints, MediaPolicy
    from mlx_onevision.plugins.service.service import Limits
    from mlx_onevision.plugins.service.spool import Spool

    if allow_private and (not media_hosts or "*" in media_hosts):
        raise click.UsageError("--allow-private needs hosts by name: --allow-media-host NAME")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise click.UsageError("--api-key has to be printable ASCII")
    try:
        made = api_key is None and (require_token or not is_loopback(host))
        token = server.new_token() if made else api_key
        server_settings = ServerSettings(
            host=host,
            names=names,
            origins=origins,
            max_body_bytes=max_request << 20,
            ollama=ollama,
            token=token,
            model=name,
            max_tokens=max_tokens,
        )
        raise_limit()
        share_heaps()
        if log_requests:
            log_to_stderr()
        if click.get_current_context().meta.get(DEBUG):
            logging.getLogger("mlx_onevision").setLevel(logging.DEBUG)  # tracebacks of errors
        largest = max_upload << 20
        spool = Spool(cache_folder("uploads"), max_file_bytes=largest, max_total_bytes=4 * largest)
        with server.listening(server_settings, port) as listening, closing(spool):
            backend = open_engine(
                model,
                **loading,
                defaults=sampling,
                policy=MediaPolicy(
                    folders=folders,
                    hosts=None if "*" in media_hosts else media_hosts,
                    private=allow_private,
                    uploads=spool,
                    size=max_request << 20,
                    pixels=int(max_pixels * 1e6),
                    **decoding,
                    hints=Hints(
                        folders="start serve with --media-root FOLDER",
                        hosts="start serve with --allow-media-host NAME",
                        private="start serve with --allow-private",
                    ),
                ),
                limits=Limits(
                    active=concurrent,
                    waiting=waiting,
                    timeout=timeout,
                    video_timeout=video_timeout,
                    max_tokens=max_tokens,
                    default_max_tokens=DEFAULT_MAX_TOKENS,
                    keep_alive=keep_alive,
                ),
            )
            with backend:
                if "sharded" in loading:
                    backend.load()  # the other ranks wait for it
                app = create_app(backend, server_settings)
                if made and token is not None:
                    file = server.token_file()
                    server.keep_token(token, file)
                    click.echo(f"The token for requests is in {file}", err=True)
                import_engine()  # or else the first request waits for it
                server.tune_interpreter()
                shown = f"[{host}]" if ":" in host else host
                address = f"http://{shown}:{listening.getsockname()[1]}"
                click.echo(f"Serving at {address}/v1, a page at {address} (Ctrl-C ends)", err=True)
                ending = server.Closing(backend)

                def healthy() -> bool:
                    return backend.info().healthy

                runner = server.Server(app, server_settings, healthy, ending.begin)
                runner.run(sockets=[listening])
                closed = ending.done()
                spool.close()  # the process may be ended at once
                _end(runner.failed or not healthy(), runner.signal, closed=closed)
    except PluginError as error:
        raise RequestError(str(error)) from error


def _end(failed: bool, number: int | None, *, closed: bool) -> None:
    """Ends the command as the server ended; at once where the model is busy and not closed."""
    outcome: BaseException | None = KeyboardInterrupt() if number == signal.SIGINT else None
    if failed:
        message = "the model cannot answer any more, so the server ends; start it again"
        outcome = RequestError(message)
    if not closed:
        if failed:
            click.echo(f"error: {prefix()}{outcome}", err=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1 if failed else 0 if outcome is None else 130)
    if outcome is not None:
        raise outcome
