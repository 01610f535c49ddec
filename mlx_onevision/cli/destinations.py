"""Which videos a command line names, and where the description of each goes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from mlx_onevision.describe.formats import FORMS

SUFFIXES = {form: f".{form}" for form in FORMS} | {"text": ".txt"}


@dataclass(frozen=True)
class Job:
    """A video, the form of its description, and the file for it; None is stdout.

    named : whether that very file was asked for, so that it may be replaced.
    """

    video: str
    form: str
    target: Path | None
    named: bool = False


def jobs_for(videos: Sequence[str], output: str | None, form: str | None) -> list[Job]:
    """What is to be described, and where it goes.

    Raises:
        click.UsageError: for arguments that do not fit together.
    """
    found = list(dict.fromkeys(name for video in videos for name in _files(video)))
    if len(videos) == 1 and not Path(videos[0]).is_dir():
        target = None if output is None else Path(output)
        if target is None or not (target.is_dir() or str(output).endswith(os.sep)):
            if target is not None and not target.absolute().parent.is_dir():
                raise click.UsageError(f"There is no folder {target.parent} for --output")
            known = {suffix: name for name, suffix in SUFFIXES.items()}
            suffix = "" if target is None else target.suffix.lower()
            return [Job(videos[0], form or known.get(suffix, "text"), target, named=True)]
    folder = None if output is None else Path(output)
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise click.UsageError(f"--output {folder} is a file; several videos need a folder")
        folder.mkdir(parents=True, exist_ok=True)
    form = form or "text"
    stems = [_place(name, folder).with_suffix("") for name in found]
    jobs: list[Job] = []
    for name, stem in zip(found, stems, strict=True):
        place = _place(name, folder)
        # a.mp4 and a.mov both have an a.srt; then it is a.mp4.srt and a.mov.srt.
        base = place.with_suffix("") if stems.count(stem) == 1 else place
        jobs.append(Job(name, form, base.with_name(base.name + SUFFIXES[form])))
    return jobs


def _files(video: str) -> list[str]:
    """The video itself, or those right in a folder, by name."""
    from mlx_onevision.media.items import VIDEOS

    if not os.path.isdir(video):
        return [video]
    found = sorted(
        os.path.join(video, name)
        for name in os.listdir(video)
        if name.lower().endswith(VIDEOS) and not name.startswith(".")
    )
    if not found:
        raise click.UsageError(f"There is no video in the folder {video}")
    return found


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


def cache_folder() -> Path:
    """Where records are kept: ``mlx-onevision/descriptions`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "mlx-onevision" / "descriptions"
