"""``mlx-onevision chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import Any

import click

from mlx_onevision.cli.options import dtype_option, model_option, revision_option
from mlx_onevision.errors import sentence


@click.command(short_help="Talk with a model.")
@model_option
@click.option("--image", "images", multiple=True, metavar="FILE", help="Shown with the first line.")
@click.option("--video", "videos", multiple=True, metavar="FILE", help="Shown with the first line.")
@click.option("--frames", "num_frames", type=int, metavar="N", help="N frames of each video.")
@click.option("--fps", type=float, metavar="F", help="F frames of each second of a video instead.")
@click.option("--start", type=float, metavar="S", help="Begin S seconds into each video.")
@click.option("--end", type=float, metavar="S", help="End S seconds into each video.")
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--max-tokens", default=1024, show_default=True, help="The longest answer.")
@click.option("--temperature", type=float, help="0 is greedy. Default: the model's own.")
@click.option("--top-p", type=float, help="Sample from the likeliest tokens of this total mass.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--verbose", is_flag=True, help="After each answer: what was read, cached, encoded.")
@revision_option
@dtype_option
@click.pass_context
def chat(
    ctx: click.Context,
    model: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    verbose: bool,
    revision: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """Talk with a model, about images, videos or neither; /help says how.

    Each line is a message. Ctrl-C cancels an answer, Ctrl-D ends.
    """
    if model is None:
        click.echo(
            "No --model: the embedded demo model answers; it knows coloured shapes only.", err=True
        )

    from mlx_onevision.api import load
    from mlx_onevision.cli.conversation import Conversation, Terminal
    from mlx_onevision.cli.terminal import line_reader

    def show(piece: str) -> None:
        click.echo(piece, nl=False)

    def note(line: str) -> None:
        click.echo(line, err=True)

    loaded = load("demo" if model is None else model, revision=revision, dtype=dtype)
    try:
        talk = Conversation(loaded, **options)
        for image in images:
            talk.attach("image", image)
        for video in videos:
            talk.attach("video", video)
        read, interactive = line_reader()
        terminal = Terminal(
            *(talk, read, show, note, sentence), interactive=interactive, verbose=verbose
        )
        failed = terminal.run()
    finally:
        loaded.close()
    if failed and not interactive:
        ctx.exit(1)
