"""``mlx-onevision embed``: files in, vectors out.

A file that cannot be embedded is reported on stderr and left out, and the exit code is 1 in the
end: a folder of ten thousand images is not lost to one broken download.

Ranks of mlx.launch share out a folder in portions, as ``describe`` does videos: whoever has locked
the file for a portion's vectors embeds it. Rank 0 joins them all in the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.loading import load, model_or_demo
from mlx_onevision.cli.options import FRAMES, LOADING, error_line, gathered, option, options
from mlx_onevision.cli.paths import files_of
from mlx_onevision.cli.ranks import POLL_SECONDS, share_files, share_model, work_of
from mlx_onevision.cli.values import Output
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.files import cache_folder, claim

if TYPE_CHECKING:
    from mlx_onevision.api import Model
    from mlx_onevision.embed.embeddings import Embeddings

BATCH = 100  # items whose vectors are held until they are printed or joined
MOST_GROUPS = 4  # of the embedder, in a portion that a rank takes


@click.command()
@click.argument("files", nargs=-1, type=click.Path(), metavar="FILE|FOLDER...")
@option("model")
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
@click.option(
    "--output", type=Output(".npz"), metavar="FILE.npz", help="Write all vectors into one npz file."
)
@option("sidecar")
@click.option("--jsonl", is_flag=True, help="Print one JSON object a vector, as they come.")
@click.option("--no-normalize", is_flag=True, help="Leave the vectors' lengths as they are.")
@option(
    "tiling", help="How the joint space sees images; never is a tenth of the work for a large one."
)
@options(*FRAMES)
@gathered("loading", *LOADING)
@click.pass_context
def embed(
    ctx: click.Context,
    files: tuple[str, ...],
    model: str | None,
    space: str,
    texts: tuple[str, ...],
    output: Path | None,
    sidecar: str | None,
    jsonl: bool,
    no_normalize: bool,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Turn images, videos or texts into vectors: one for each.

    What cannot be embedded is reported and left out; the exit code is 1 then. Under mlx.launch, the
    files of a folder are shared out, each rank loads the whole model, and the same command goes on
    where one was stopped.

    \b
    mlx-onevision embed photos/*.jpg --output vectors.npz
    mlx-onevision embed holiday.mp4 --frames 8 --jsonl
    mlx.launch -n 2 mlx-onevision embed photos/ --output vectors.npz
    mlx-onevision embed --space joint a.jpg --text "a red circle" --jsonl
    """
    if (output is not None) == jsonl:
        raise click.UsageError("Give either --output FILE.npz or --jsonl")
    if not files and not texts:
        raise click.UsageError("Give files, or --text with --space joint")
    if texts and space != "joint":
        raise click.UsageError("--text needs --space joint; the vision space knows no text")

    from mlx_onevision.media.sources import IMAGES, VIDEOS

    kinds = IMAGES + VIDEOS
    found = [name for file in files for name in files_of(file, kinds, "image or video")]
    rank, size, _ = share_files(files, sidecar)
    if sidecar and size == 1:
        raise click.UsageError("--sidecar is for a FOLDER under mlx.launch; leave it out")
    about = {name: value for name, value in loading.items() if name != "revision"}
    if size == 1:
        share_model(model, loading)
    if not rank:
        model = model_or_demo(model)

    from mlx_onevision.embed.embeddings import Embeddings

    items = [*found, *({"type": "text", "text": text} for text in texts)]
    options |= {"space": space, "normalize": not no_normalize}
    failed: list[str] = []
    loaded = load(model or "demo", **loading)
    parts: list[Embeddings] = []
    try:
        if size > 1:
            records = Path(sidecar) if sidecar else cache_folder("vectors")
            records.mkdir(mode=0o700, parents=True, exist_ok=True)
            joined = shared(loaded, items, options, [about, options], records, rank, failed)
        else:
            joined = in_batches(loaded, items, options, failed)
        for part in joined:
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
                item = batch[index]
                name = item if isinstance(item, str) else repr(item["text"][:40])
                reason = str(error).partition(": ")[2]  # the number before it counts in the batch
                failed.append(error_line(reason, "embed", name))
                with bar.external_write_mode(file=sys.stderr):
                    click.echo(f"error: {failed[-1]}", err=True)

            def show(done: int, _: int, start: int = start) -> None:
                bar.update(start + done - bar.n)

            yield model.embed(batch, **options, on_error=report, progress=show)


def portions(items: Sequence[Any]) -> list[list[int]]:
    """Places of items, in parts that ranks take one after another, the most work first. Each is
    made of whole groups of the embedder, so that the vectors are those of one process to the last
    bit; of several where there are many, so that files are read while others are embedded. The
    parts do not depend on how many ranks there are.
    """
    from mlx_onevision.embed.embedder import GROUP

    groups = [range(start, min(start + GROUP, len(items))) for start in range(0, len(items), GROUP)]
    # An incomplete group comes last: items that followed it would be grouped differently.
    groups.sort(
        key=lambda group: (len(group) == GROUP, sum(work_of(items[place]) for place in group)),
        reverse=True,
    )
    parts: list[list[int]] = []
    while groups:
        count = max(1, min(MOST_GROUPS, len(groups) // 8))
        parts.append([place for group in groups[:count] for place in group])
        del groups[:count]
    return parts


def shared(
    model: Model,
    items: Sequence[Any],
    options: dict[str, Any],
    about: Any,
    records: Path,
    rank: int,
    failed: list[str],
) -> Iterator[Embeddings]:
    """All vectors in order, on rank 0, after what has none was reported; on others nothing.

    A portion's vectors are in a file of ``records`` whose name says what they depend on, ``about``
    included. What cannot be embedded is left to rank 0, and so are portions with URLs.
    """
    from mlx_onevision.embed.embeddings import Embeddings

    def ignore(_: int, __: OneVisionError) -> None:
        """Rank 0 reports it."""

    mark = [model.embed([], **options).provenance, about]
    known: dict[int, Embeddings] = {}
    waiting = portions(items)
    while waiting:
        busy: list[list[int]] = []
        for places in waiting:
            part = [items[place] for place in places]
            try:
                text = json.dumps([mark, [_state(item) for item in part]])
            except (OSError, ValueError):  # no file, or none any more
                continue
            path = records / f"{blake2b(text.encode(), digest_size=16).hexdigest()}.npz"
            file = claim(path)
            if file is None:
                busy.append(places)
                continue
            with file:
                try:
                    vectors = Embeddings.load(path)
                except RequestError:  # nothing is in it yet
                    vectors = model.embed(part, **options, on_error=ignore)
                    vectors.save(path, private=True)
            rows = iter(range(0 if rank else len(vectors)))
            row = next(rows, None)
            for place, item in zip(places, part, strict=True):
                if row is not None and vectors.names[row] == _name(item):
                    one = vectors.vectors[row : row + 1]
                    known[place] = replace(vectors, vectors=one, names=(_name(item),))
                    row = next(rows, None)
        waiting = [] if rank else busy
        if waiting:
            time.sleep(POLL_SECONDS)
    for place, item in enumerate(() if rank else items):
        if place in known:
            yield known[place]
        else:
            yield from in_batches(model, [item], options, failed)


def _name(item: Any) -> str:
    return item if isinstance(item, str) else item["text"]


def _state(item: Any) -> Any:
    """What a vector depends on: the text, or a file's name, size and time. Raises OSError where
    there is no such file.
    """
    if not isinstance(item, str):
        return item
    stat = os.stat(item)
    return item, stat.st_size, stat.st_mtime_ns


def print_lines(part: Embeddings) -> None:
    """Each vector with all that has to be kept with it."""
    for name, vector in zip(part.names, part.vectors.tolist(), strict=True):
        click.echo(json.dumps({"name": name, **part.provenance, "vector": vector}))
