"""Commands under ``mlx.launch``: the ranks share a model, or share out the files of a folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import click

from mlx_onevision.cli.loading import load
from mlx_onevision.cli.paths import local_path
from mlx_onevision.distributed import World, launched, rank, world
from mlx_onevision.files import seconds_of_mp4

POLL_SECONDS = 0.5  # between two looks at what other ranks have under way
BYTES_A_SECOND = 1_000_000  # of videos from telephones and cameras


def share_model(
    model: str | None,
    settings: dict[str, Any],
    refused: Mapping[str, object] | None = None,
    split: str | tuple[float, ...] | None = None,
) -> None:
    """Has the ranks of mlx.launch, where it has started this process, share the model: adds that to
    ``settings``, which ``load`` is given. The others compute what rank 0 does from here on, print
    nothing, and end when it has closed the model.

    refused : options that do not go with ranks, and what was given for them.

    Raises:
        click.UsageError: for one that was given.
    """
    if not launched():
        return
    for name, given in (refused or {}).items():
        if given not in (None, False, 0):
            raise click.UsageError(f"mlx.launch does not go with {name}; leave it out")
    settings |= {"sharded": True, "split": split}
    if rank():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and rank 0 decides

        load(model or "demo", **settings)


def share_files(given: Sequence[str], records: str | None) -> World:
    """The processes that share out the files of a folder, of which each loads the whole model; this
    one alone where mlx.launch has not started it, or ``given`` has no folder.

    records : the folder of what is done, None for the user's cache folder.

    Raises:
        click.UsageError: where the records of several machines would not be in one place.
    """
    here = world() if any(os.path.isdir(local_path(name)) for name in given) else World()
    if records is None and not here.local:
        raise click.UsageError(
            "The ranks are on several machines; give --sidecar FOLDER, on a disk they all share"
        )
    return here


def work_of(file: object) -> float:
    """An estimate of the work on a file, in seconds of video: as long as an MP4 or QuickTime file
    says that it is, and of others by their size; 0 for what is no file.
    """
    if not isinstance(file, str) or not os.path.isfile(file):
        return 0.0
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            return seconds_of_mp4(opened) or size / BYTES_A_SECOND
    except OSError:
        return 0.0
