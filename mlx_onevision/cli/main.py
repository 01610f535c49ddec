"""The ``mlx-onevision`` command.

Results go to stdout and nothing else does; notices, progress and errors go to stderr. An error is
one sentence, never a traceback. Exit codes: 0, 1 (not done), 2 (wrong usage), 130 (Ctrl-C), 143
(SIGTERM).

The modules of commands are imported when they are called: ``--help`` loads click and nothing more,
and a command what it needs.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from mlx_onevision.cli.options import DEBUG, debug_option, error_line
from mlx_onevision.cli.paths import could_be_file
from mlx_onevision.distributed import launched, prefix
from mlx_onevision.errors import sentence

INTERRUPTED, TERMINATED = 130, 143
AGAIN_SECONDS = 0.02


class Commands(click.Group):
    """A group whose commands end in one line on stderr and an exit code, whatever they raise."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._modules: dict[str, str] = {}  # of commands that are not imported yet

    def announce(self, name: str, module: str, text: str) -> None:
        """Adds the command of that name in ``module``; ``text`` is its line in ``--help``."""
        self._modules[name] = module
        self.add_command(click.Command(name, short_help=text))

    def load(self, name: str) -> click.Command:
        """The command itself."""
        if (module := self._modules.pop(name, None)) is not None:
            command: click.Command = getattr(import_module(module), name)
            command.short_help = self.commands[name].short_help
            self.add_command(debug_option(command))
        return self.commands[name]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises click.UsageError, for what is no command, with what to type."""
        name = args[0]
        if name in self.commands:
            return name, self.load(name), args[1:]
        if not ctx.resilient_parsing and not name.startswith("-"):
            raise click.UsageError(f"There is no command {name!r}; {self._way(name)}", ctx)
        return super().resolve_command(ctx, args)

    def _way(self, name: str) -> str:
        if name in ("help", "version"):
            return f"type mlx-onevision --{name}"
        if could_be_file(name):
            return f"to ask about a file, type mlx-onevision generate --image {name} --prompt TEXT"
        return f"the commands are {', '.join(sorted(self.commands))}"

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into ``error: ...`` and an exit code."""
        try:
            with _exit_on_sigterm():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own: usage (2), --help (0), a reader that closed the pipe (1, silent)
        except KeyboardInterrupt:
            click.echo(err=True)  # the answer may stand half way through a line
            ctx.exit(INTERRUPTED)
        except Exception as error:
            fail(ctx, error)


@contextmanager
def _exit_on_sigterm() -> Generator[None]:
    """SIGTERM ends the command as Ctrl-C does meanwhile: temporary files are removed, processes
    ended. A second one ends it at once. A rank is always ended at once: it may wait for others
    inside MLX, where no handler runs.
    """
    outside = threading.current_thread() is not threading.main_thread() or launched()
    if outside or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    ending = SystemExit(TERMINATED)
    unraisable = sys.unraisablehook

    def end(_: int, frame: FrameType | None) -> None:
        """Raises SystemExit. Python drops an exception that is raised inside a callback or a
        destructor, so an alarm calls this again and again until the exception is being handled.
        During an import nothing is raised, because that may abort the process (MLX's module is
        C++); the next alarm tries again.
        """
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        sys.unraisablehook = _ignore
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                return
            frame = frame.f_back
        handled = sys.exc_info()[1]
        while handled is not None and handled is not ending:
            handled = handled.__context__
        if handled is None:
            raise ending

    alarm = signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, alarm)
        sys.unraisablehook = unraisable


def _ignore(_: object) -> None:
    """What cannot be raised while the process ends is not printed."""


def fail(ctx: click.Context, error: Exception) -> NoReturn:
    """Print ``error`` as one sentence (after its traceback with ``--debug``) and exit with 1."""
    if ctx.meta.get(DEBUG):
        traceback.print_exception(error)
    line = error_line(sentence(error), ctx.invoked_subcommand).removesuffix(".")
    click.echo(f"error: {prefix()}{line}", err=True)
    ctx.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-onevision", message="%(prog)s %(version)s")
def cli() -> None:
    """LLaVA-OneVision in MLX: ask a model about images and videos."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may not fit the locale


for name, text in (
    ("generate", "Answer one prompt."),
    ("chat", "Talk with a model."),
    ("describe", "Say what happens in videos."),
    ("embed", "Turn images, videos or texts into vectors."),
    ("train", "Fine-tune a model on your own images, videos and answers."),
    ("models", "List, download and remove models."),
    ("bench", "Measure speed and memory."),
    ("doctor", "Say what a bug report needs to know about this machine."),
):
    cli.announce(name, f"mlx_onevision.cli.{name}", text)


def main() -> None:
    """The console script."""
    try:
        cli(prog_name="mlx-onevision")
    except SystemExit as ended:
        if ended.code not in (INTERRUPTED, TERMINATED):
            raise
        # The model's thread may be inside a step, which MLX aborts in at the interpreter's end.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(ended.code)
