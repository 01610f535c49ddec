"""``mlx-onevision embed``: files in, vectors out.

A file that cannot be embedded is reported on stderr and left out, and the exit code is 1 in the
end: a folder of ten thousand images is not lost to one broken download.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import (
    dtype_option,
    memory_options,
    model_option,
    model_or_demo,
    revision_option,
    video_options,
)
from mlx_onevision.errors import OneVisionError

if TYPE_CHECKING:
    from mlx_onevision.api import Model
    from mlx_onevision.embed.embeddings import Embeddings

BATCH = 100  # items whose vectors are held until they are printed or joined


@click.command(short_help="Turn images, videos or texts into vectors.")
@click.argument("files", nargs=-1, metavar="FILE...")
@model_option
@click.option(
    "--space",
    type=click.Choice(["vision", "joint"]),
    default="vision",
    show_default=True,
    help="vision: images that look alike. joint: text and images together; experimental.",
)
@click.option(
    "--text", "texts", multiple=True, metavar="TEXT", help="A text to embed, after the files."
)
@click.option("--output", metavar="FILE.npz", help="Write all vectors into one npz file.")
@click.option("--jsonl", is_flag=True, help="Print one JSON object a vector, as they come.")
@click.option("--no-normalize", is_flag=True, help="Leave the vectors' lengths as they are.")
@click.option(
    "--tiling",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="How the joint space sees images; never is a tenth of the work for a large one.",
)
@video_options
@revision_option
@dtype_option
@memory_options
@click.pass_context
def embed(
    ctx: click.Context,
    files: tuple[str, ...],
    model: str | None,
    space: str,
    texts: tuple[str, ...],
    output: str | None,
    jsonl: bool,
    no_normalize: bool,
    revision: str | None,
    dtype: str | None,
    memory: dict[str, Any],
    **options: Any,
) -> None:
    """Turn images, videos or texts into vectors: one for each.

    What cannot be embedded is reported and left out; the exit code is 1 then.

    \b
    mlx-onevision embed photos/*.jpg --output vectors.npz
    mlx-onevision embed holiday.mp4 --frames 8 --jsonl
    mlx-onevision embed --space joint a.jpg --text "a red circle" --jsonl
    """
    if bool(output) == jsonl:
        raise click.UsageError("Give either --output FILE.npz or --jsonl")
    if not files and not texts:
        raise click.UsageError("Give files, or --text with --space joint")
    if texts and space != "joint":
        raise click.UsageError("--text needs --space joint; the vision space knows no text")
    if output and not Path(output).absolute().parent.is_dir():
        raise click.UsageError(f"There is no folder {Path(output).parent} for --output")
    model = model_or_demo(model)

    from mlx_onevision.api import load
    from mlx_onevision.embed.embeddings import Embeddings

    items = [*files, *({"type": "text", "text": text} for text in texts)]
    options |= {"space": space, "normalize": not no_normalize}
    failed: list[str] = []
    loaded = load(model, revision=revision, dtype=dtype, **memory)
    parts = []
    try:
        for part in in_batches(loaded, items, options, failed):
            if jsonl:
                print_lines(part)
            elif len(part):
                parts.append(part)
    finally:
        loaded.close()
    if output and parts:
        Embeddings.concatenate(parts).save(output)
    if failed:
        click.echo(f"{len(failed)} of {len(items)} could not be embedded.", err=True)
        ctx.exit(1)


def in_batches(
    model: Model, items: Sequence[Any], options: dict[str, Any], failed: list[str]
) -> Iterator[Embeddings]:
    """Some vectors at a time; what has none is reported, and added to ``failed``."""
    from tqdm import tqdm

    with tqdm(total=len(items), unit="item", disable=None, delay=0.5, leave=False) as bar:
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]

            def report(index: int, error: OneVisionError, batch: Sequence[Any] = batch) -> None:
                failed.append(sentence(batch[index], error))
                with bar.external_write_mode(file=sys.stderr):
                    click.echo(f"error: {failed[-1]}", err=True)

            def show(done: int, _: int, start: int = start) -> None:
                bar.update(start + done - bar.n)

            yield model.embed(batch, **options, on_error=report, progress=show)


def sentence(item: Any, error: OneVisionError) -> str:
    """What is wrong with which item; the number in the message counts within a batch."""
    line = " ".join(str(error).partition(": ")[2].split())
    name = item if isinstance(item, str) else repr(item["text"][:40])
    return line if name in line else f"{name}: {line}"


def print_lines(part: Embeddings) -> None:
    """Each vector with all that has to be kept with it."""
    for name, vector in zip(part.names, part.vectors.tolist(), strict=True):
        click.echo(json.dumps({"name": name, **part.provenance, "vector": vector}))
