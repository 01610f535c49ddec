"""The ``mlx-onevision`` command.

Results go to stdout and nothing else does; notices, progress and errors go to stderr. An error is
one sentence, never a traceback. Exit codes: 0, 1 (not done), 2 (wrong usage), 130 (Ctrl-C).

``--help`` and ``--version`` load click and nothing heavier: commands import the library.
"""

from __future__ import annotations

import io
import sys
import traceback
from typing import Any, NoReturn

import click

from mlx_onevision.cli.bench import bench
from mlx_onevision.cli.chat import chat
from mlx_onevision.cli.describe import describe
from mlx_onevision.cli.doctor import doctor
from mlx_onevision.cli.embed import embed
from mlx_onevision.cli.generate import generate
from mlx_onevision.cli.models import models
from mlx_onevision.cli.options import DEBUG, debug_option
from mlx_onevision.cli.train import train
from mlx_onevision.distributed import prefix
from mlx_onevision.errors import sentence

INTERRUPTED = 130


class ErrorsAsSentences(click.Group):
    """A group whose commands end in one line on stderr and an exit code, whatever they raise."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into ``error: ...`` and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own: usage (2), --help (0), a reader that closed the pipe (1, silent)
        except KeyboardInterrupt:
            click.echo(err=True)  # the answer may stand half way through a line
            ctx.exit(INTERRUPTED)
        except Exception as error:
            fail(ctx, error)


def fail(ctx: click.Context, error: Exception) -> NoReturn:
    """Print ``error`` as one sentence (after its traceback with ``--debug``) and exit with 1."""
    if ctx.meta.get(DEBUG):
        traceback.print_exception(error)
    line = " ".join(sentence(error).split()).removesuffix(".")
    click.echo(f"error: {prefix()}{line}", err=True)
    ctx.exit(1)


@click.group(cls=ErrorsAsSentences, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-onevision", message="%(prog)s %(version)s")
def cli() -> None:
    """LLaVA-OneVision in MLX: ask a model about images and videos."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may not fit the locale


for command in (generate, chat, describe, embed, train, models, bench, doctor):
    debug_option(command)
    cli.add_command(command)


def main() -> None:
    """The console script."""
    cli(prog_name="mlx-onevision")
