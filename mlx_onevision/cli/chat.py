"""``mlx-onevision chat``: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_onevision.cli.loading import draft_tokens, load, model_or_demo, report_unused_filters
from mlx_onevision.cli.options import (
    FRAMES,
    LOADING,
    SAMPLING,
    SPECULATION,
    TakesFiles,
    gathered,
    option,
    options,
)
from mlx_onevision.cli.paths import local_path
from mlx_onevision.cli.ranks import share_model


@click.command(cls=TakesFiles)
@option("model")
@option("images", help="Images, shown with the first line: files or URLs; several may follow.")
@option("videos", help="Videos, likewise.")
@options(*FRAMES, "tiling", "system")
@option("max_tokens", default=1024, show_default=True)
@options(*SAMPLING, "stop", *SPECULATION, "prompt_cache")
@option("verbose", help="After each answer: tokens, cached tokens, seconds.")
@gathered("loading", *LOADING)
@option("split")
@click.pass_context
def chat(
    ctx: click.Context,
    model: str | None,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    verbose: bool,
    loading: dict[str, Any],
    split: str | tuple[float, ...] | None,
    draft_model: str | None,
    prompt_cache: Path | None,
    **options: Any,
) -> None:
    """Talk with a model, about images, videos or neither; /help says how.

    Each line is a message. Ctrl-C cancels an answer, Ctrl-D ends. With --prompt-cache, the
    conversation in FILE goes on, and is written again at the end.
    """
    if "-" in (*images, *videos):
        raise click.UsageError("The lines on stdin are messages; give an image or a video by name")
    options["draft_tokens"] = draft_tokens(draft_model, options["draft_tokens"])
    refused = {
        "--prompt-cache": prompt_cache,
        "--draft-model": draft_model,
        "--prompt-lookup": options["prompt_lookup"],
    }
    share_model(model, loading, refused, split)
    model = model_or_demo(model)

    from mlx_onevision.cli.conversation import Conversation, Terminal
    from mlx_onevision.cli.terminal import line_reader

    loaded = load(model, draft_model=draft_model, **loading)
    try:
        report_unused_filters(options, loaded)
        talk = Conversation(loaded, **options)
        resumed = prompt_cache if prompt_cache and prompt_cache.exists() else None
        if resumed is not None:
            talk.resume(resumed)
        for image in images:
            talk.attach("image", local_path(image))
        for video in videos:
            talk.attach("video", local_path(video))
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
