"""``mlx-onevision describe``: videos in, what they show out.

Of several videos, one that cannot be described is reported on stderr, the others are described, and
the exit code is 1 in the end. What is done is kept at once, so the same command goes on where one
was stopped.

Ranks of mlx.launch share out a folder without a word between them: whoever has locked the record of
a video describes it, and a dead rank's locks are gone. All but rank 0 end when no video is left for
them; rank 0 waits for the others' and describes, or reports, what they have not. Only it may fail:
mlx.launch ends all ranks when one of them does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import click

from mlx_onevision.cli.loading import load, model_or_demo, report_unused_filters
from mlx_onevision.cli.options import (
    LOADING,
    SAMPLING,
    SECONDS,
    error_line,
    gathered,
    option,
    options,
)
from mlx_onevision.cli.paths import files_of, local_path
from mlx_onevision.cli.ranks import POLL_SECONDS, share_files, share_model, work_of
from mlx_onevision.cli.values import Number, listed
from mlx_onevision.describe.formats import FORMS, SILENT, write
from mlx_onevision.errors import OneVisionError, RequestError, sentence
from mlx_onevision.files import cache_folder, save

if TYPE_CHECKING:
    from mlx_onevision.api import Model
    from mlx_onevision.describe.pipeline import Progress


SUFFIXES = {form: f".{form}" for form in FORMS} | {"text": ".txt"}
FORM_OF = {suffix: form for form, suffix in SUFFIXES.items()}
DOING = {"probe": "looking for scenes", "text": "describing"}


@click.command()
@click.argument("videos", nargs=-1, required=True, type=click.Path(), metavar="VIDEO|FOLDER...")
@option("model")
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMS)),
    help="Default: what --output FILE ends with, else text.",
)
@click.option(
    "--output",
    type=click.Path(),
    metavar="FILE|FOLDER",
    help="Default: stdout for one video; for several, a file beside each of them.",
)
@click.option(
    "--segments",
    default="scenes",
    show_default=True,
    metavar="scenes|SECONDS",
    help="Cut where a scene ends, or into parts of equal length.",
)
@option("num_frames", default=8, show_default=True, help="Of each segment.")
@options("start", "end")
@click.option(
    "--longest",
    type=Number(SECONDS),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Divide longer scenes; 0 divides none.",
)
@click.option(
    "--finder",
    type=click.Choice(["histogram", "pyscenedetect"]),
    default="histogram",
    show_default=True,
    help="How cuts are found; pyscenedetect needs the extra scenes.",
)
@option("system")
@option("max_tokens", default=128, show_default=True, help="Of each segment's text.")
@options(*SAMPLING, "sidecar")
@click.option("--force", is_flag=True, help="Start over, and replace files that are there.")
@gathered("loading", *LOADING)
@click.pass_context
def describe(
    ctx: click.Context,
    videos: tuple[str, ...],
    model: str | None,
    form: str | None,
    output: str | None,
    segments: str,
    longest: float,
    sidecar: str | None,
    force: bool,
    loading: dict[str, Any],
    **options: Any,
) -> None:
    """Say what happens in videos: scene by scene, with times, chapters and a summary. Only the
    picture is described, not the sound.

    \b
    mlx-onevision describe video.mp4
    mlx-onevision describe video.mp4 --output video.srt
    mlx-onevision describe holidays/ --format md --output texts/
    mlx.launch -n 2 mlx-onevision describe holidays/ --output texts/

    What is done is kept in the user's cache folder, so that the same command goes on where it was
    stopped, and videos that are done are skipped. A file that somebody else may have written is
    replaced with --force only. Under mlx.launch, the videos of a folder are shared out, the longest
    first, and each rank loads the whole model.
    """
    options |= {
        "segments": segments if segments == "scenes" else _seconds(segments),
        "longest": longest or None,
    }
    rank, size, _ = share_files(videos, sidecar)
    if size == 1:
        share_model(model, loading)
    tasks = tasks_for(videos, output, form)
    if size > 1:
        if force:
            raise click.UsageError(
                "--force would start every video over on every rank; give --sidecar and --output "
                "a new folder instead"
            )
        tasks.sort(key=lambda task: work_of(task.video), reverse=True)
    records = Path(sidecar) if sidecar else cache_folder("descriptions")
    records.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not rank:
        model = model_or_demo(model)
        click.echo(SILENT, err=True)

    from mlx_onevision.describe.journal import BusyError

    failed = 0
    loaded = load(model or "demo", **loading)
    try:
        if not rank:
            report_unused_filters(options, loaded)
        waiting = tasks
        while waiting:
            busy: list[DescribeTask] = []
            for task in waiting:
                try:
                    run(loaded, task, records, force, options, size > 1)
                except (OneVisionError, OSError) as error:
                    if size > 1 and isinstance(error, BusyError):
                        busy.append(task)
                    elif rank:
                        left = f"rank {rank} leaves this to rank 0"
                        click.echo(
                            f"{left}: {error_line(sentence(error), 'describe', task.video)}",
                            err=True,
                        )
                    elif len(tasks) == 1:
                        raise
                    else:
                        failed += 1
                        click.echo(
                            f"error: {error_line(sentence(error), 'describe', task.video)}",
                            err=True,
                        )
            waiting = [] if rank else busy
            if waiting:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        click.echo("\nWhat is done is kept; the same command goes on from there.", err=True)
        raise
    finally:
        loaded.close()
    if size > 1 and not rank:
        click.echo(f"{len(tasks) - failed} of {len(tasks)} are described.", err=True)
    if failed:
        click.echo(f"{failed} of {len(tasks)} could not be described.", err=True)
        ctx.exit(1)


def run(
    model: Model,
    task: DescribeTask,
    records: Path,
    force: bool,
    options: dict[str, Any],
    shared: bool = False,
) -> None:
    """Describes one video, and writes it down. Where it is ``shared``, nothing is said of what was
    done before, for each rank meets what others have just done.

    Raises:
        BusyError: for a video that another process describes.
        OneVisionError: for a video that cannot be described, and for a file in the way.
        OSError: for a file that cannot be written.
    """
    from mlx_onevision.describe.pipeline import Progress

    if task.target is not None and task.target.is_dir():
        raise RequestError(f"{task.target} is a folder; rename it, or give another --output")
    there = task.target is not None and not task.named and not force and task.target.exists()
    with (
        model.stream_description(task.video, sidecar=records, force=force, **options) as stream,
        _bar(Path(task.video).name) as show,
    ):
        for event in stream:
            if not isinstance(event, Progress):
                continue
            if there:
                raise RequestError(
                    f"{task.target} is there, and is not of a run like this; give --force to "
                    "replace it, or another --output"
                )
            show(event)
        described = stream.result()
    for warning in described.warnings:
        click.echo(f"{task.video}: {warning}", err=True)
    if task.target is None:
        click.echo(write(described, task.form), nl=False)
    elif there:
        if not shared:
            done = f"done before, in {task.target}"
            if task.target.read_bytes() != write(described, task.form).encode():
                done = (
                    f"{task.target} is there and differs from the description made before; it was "
                    "left alone. Delete it to have it written again, or give --force to describe "
                    "the video anew"
                )
            click.echo(f"{task.video}: {done}", err=True)
    else:
        save(task.target, write(described, task.form))
        click.echo(f"{task.video}: written to {task.target}", err=True)


@dataclass(frozen=True)
class DescribeTask:
    """A video, the form of its description, and the file for it; None is stdout.

    named : whether --output names that file, so that it may be replaced.
    """

    video: str
    form: str
    target: Path | None
    named: bool = False


def tasks_for(videos: Sequence[str], output: str | None, form: str | None) -> list[DescribeTask]:
    """What is to be described, and where it goes.

    Raises:
        click.UsageError: for arguments that do not fit together, for two videos with one output,
            and where a video would be replaced.
    """
    tasks = _tasks(videos, output, form)
    video_of: dict[str | Path, str] = {}
    sources = {_identity(task.video): task.video for task in tasks}
    for task in tasks:
        if task.target is None:
            continue
        target = _identity(task.target)
        if target is not None and target in sources:
            raise click.UsageError(
                f"the description would replace the video {sources[target]}; give another --output"
            )
        other = video_of.setdefault(_entry(str(task.target)), task.video)
        if other != task.video:
            raise click.UsageError(
                f"{other} and {task.video} would both be written to {task.target}; describe them "
                "one by one, each with its own --output"
            )
    if output is not None and not any(task.named for task in tasks):
        Path(output).mkdir(parents=True, exist_ok=True)
    return tasks


def _entry(video: str) -> str | Path:
    """What is the same of all paths of one entry of a folder; of what is no path, itself."""
    from mlx_onevision.media.sources import is_url

    if is_url(video) or video[:5].lower() == "data:":
        return video
    path = Path(video).expanduser()
    return path.parent.resolve() / path.name


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What is the same of all names of a file; None where there is none."""
    try:
        found = os.stat(os.path.expanduser(path))
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _tasks(videos: Sequence[str], output: str | None, form: str | None) -> list[DescribeTask]:
    from mlx_onevision.media.sources import VIDEOS

    named: dict[str | Path, str] = {}
    for name in (name for video in videos for name in files_of(video, VIDEOS)):
        named.setdefault(_entry(name), name)
    found = list(named.values())
    if len(videos) == 1 and found == [local_path(videos[0])]:
        target = None if output is None else Path(output)
        if target is None or not (target.is_dir() or str(output).endswith(os.sep)):
            if target is not None and not target.absolute().parent.is_dir():
                raise click.UsageError(f"There is no folder {target.parent} for --output")
            suffix = ".txt" if target is None else target.suffix.lower()
            if form is None and suffix not in FORM_OF:
                raise click.UsageError(
                    f"--output {target} does not end in {listed([*FORM_OF])}; name it so, say "
                    "--format, or end a folder's name with a slash"
                )
            return [DescribeTask(found[0], form or FORM_OF[suffix], target, named=True)]
    folder = None if output is None else Path(output)
    if folder is not None:
        if not folder.is_dir() and (folder.exists() or folder.suffix.lower() in FORM_OF):
            raise click.UsageError(f"--output {folder} is a file; several videos need a folder")
    form = form or "text"
    stems = [_place(name, folder).with_suffix("") for name in found]
    tasks: list[DescribeTask] = []
    for name, stem in zip(found, stems, strict=True):
        place = _place(name, folder)
        # a.mp4 and a.mov both have an a.srt; then it is a.mp4.srt and a.mov.srt.
        base = place.with_suffix("") if stems.count(stem) == 1 else place
        tasks.append(DescribeTask(name, form, base.with_name(base.name + SUFFIXES[form])))
    return tasks


def _place(video: str, folder: Path | None) -> Path:
    """Where the video lies, or would in ``folder``; what is on the network has no place of its
    own.
    """
    if video.startswith(("http://", "https://")):
        if folder is None:
            raise click.UsageError(f"{video} has no folder to write to; give --output FOLDER")
        name = Path(unquote(urlsplit(video).path)).name
        return folder / (name or "video")
    return Path(video) if folder is None else folder / Path(video).name


@contextmanager
def _bar(name: str) -> Generator[Callable[[Progress], None]]:
    """A bar on stderr, where that is a terminal."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    with tqdm(disable=None, leave=False, delay=0.3, file=sys.stderr, bar_format=form) as bar:
        now = ""

        def show(progress: Progress) -> None:
            nonlocal now
            if progress.stage not in DOING:
                return
            if progress.stage != now:
                now = progress.stage
                bar.set_description(f"{name}: {DOING[now]}", refresh=False)
                bar.reset(progress.total)
            bar.update(progress.done - bar.n)

        yield show


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(
            f"--segments {text} is neither scenes nor a number of seconds"
        ) from None
