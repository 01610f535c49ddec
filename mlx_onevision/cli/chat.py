"""``mlx-onevision chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_onevision.cli.options import (
    dtype_option,
    memory_options,
    model_option,
    model_or_demo,
    prompt_cache_option,
    revision_option,
    seed_option,
    share,
    speculation_options,
    split_option,
    system_option,
    temperature_option,
    top_p_option,
    video_options,
)


@click.command(short_help="Talk with a model.")
@model_option
@click.option("--image", "images", multiple=True, metavar="FILE", help="Shown with the first line.")
@click.option("--video", "videos", multiple=True, metavar="FILE", help="Shown with the first line.")
@video_options
@system_option
@click.option("--max-tokens", default=1024, show_default=True, help="The longest answer.")
@temperature_option
@top_p_option
@seed_option
@speculation_options
@prompt_cache_option
@click.option("--verbose", is_flag=True, help="After each answer: tokens, cached tokens, seconds.")
@revision_option
@dtype_option
@memory_options
@split_option
@click.pass_context
def chat(
    ctx: click.Context,
    model: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    verbose: bool,
    revision: str | None,
    dtype: str | None,
    memory: dict[str, Any],
    split: str | tuple[float, ...] | None,
    draft_model: str | None,
    prompt_cache: Path | None,
    **options: Any,
) -> None:
    """Talk with a model, about images, videos or neither; /help says how.

    Each line is a message. Ctrl-C cancels an answer, Ctrl-D ends. With --prompt-cache, the
    conversation in FILE goes on, and is written again at the end.
    """
    settings = {"revision": revision, "dtype": dtype, **memory}
    refused = {
        "--prompt-cache": prompt_cache,
        "--draft-model": draft_model,
        "--prompt-lookup": options["prompt_lookup"],
    }
    share(model, settings, refused, split)
    model = model_or_demo(model)

    from mlx_onevision.api import load
    from mlx_onevision.cli.conversation import Conversation, Terminal
    from mlx_onevision.cli.terminal import line_reader

    loaded = load(model, draft_model=draft_model, **settings)
    try:
        talk = Conversation(loaded, **options)
        resumed = prompt_cache if prompt_cache and prompt_cache.exists() else None
        if resumed is not None:
            talk.resume(resumed)
        for image in images:
            talk.attach("image", image)
        for video in videos:
            talk.attach("video", video)
        read, interactive = line_reader()
        terminal = Terminal(
            talk,
            read,
            show=lambda piece: click.echo(piece, nl=False),
            note=lambda line: click.echo(line, err=True),
            interactive=interactive,
            verbose=verbose,
            resumed=resumed,
        )
        failed = terminal.run()
        if prompt_cache is not None:
            talk.keep(prompt_cache)
    finally:
        loaded.close()
    if failed and not interactive:
        ctx.exit(1)
