"""Files as a command line names them: paths, ``file://`` addresses, URLs, folders, and ``-``."""

from __future__ import annotations

import os
import shlex
import sys
from os.path import expanduser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from mlx_onevision.errors import RequestError


def could_be_file(word: str) -> bool:
    """Whether a word that stands behind a file is rather another one than something else."""
    from mlx_onevision.media.sources import IMAGES, VIDEOS, is_url, similar_path

    if word.startswith("-"):
        return word == "-"
    return (
        is_url(word)
        or word[:7].lower() == "file://"
        or word.lower().endswith(IMAGES + VIDEOS)
        or os.path.exists(expanduser(word))
        or similar_path(word) is not None
    )


def local_path(text: str) -> str:
    """The path in a ``file://`` address; any other text as it is.

    Raises:
        RequestError: for a file of another machine.
    """
    if text[:7].lower() != "file://":
        return text
    try:
        address = urlsplit(text)
    except ValueError:  # a bracket that does not close
        address = None
    if address is None or address.netloc not in ("", "localhost"):
        raise RequestError(f"{text} is a file of another machine; give the path of one here")
    if not address.path:
        raise RequestError(f"{text} names no file; give its path, as file:///folder/file")
    return unquote(address.path)


def parse_path(argument: str) -> str:
    """The URL or path that the rest of a line means: a path as it is, or as a shell or a dropped
    file writes it, with quotes or backslashes.
    """
    from mlx_onevision.media.sources import is_url

    argument = local_path(argument)
    if is_url(argument) or argument[:5].lower() == "data:":
        return argument
    if Path(expanduser(argument)).exists():
        return expanduser(argument)
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a name
        words = []
    return expanduser(words[0] if len(words) == 1 else argument)


def media_argument(text: str) -> str | bytes:
    """An image or a video as a command line names it: a path or a URL; for ``-``, all of stdin.

    Raises:
        RequestError: for a folder, and where stdin is empty.
    """
    if text != "-":
        path = local_path(text)
        if os.path.isdir(expanduser(path)):
            raise RequestError(f"{text} is a folder; give files of it, as {path.rstrip('/')}/*.jpg")
        return path
    data = sys.stdin.buffer.read()
    if not data:
        raise RequestError("stdin is empty; pipe an image or a video into it")
    return data


def files_of(given: str, suffixes: tuple[str, ...], kind: str = "video") -> list[str]:
    """The file itself, or those right in a folder whose names end in one of ``suffixes``, by name.

    Raises:
        click.UsageError: for a folder without any, which are called ``kind``.
    """
    given = local_path(given)
    if not os.path.isdir(given):
        return [given]
    found = sorted(
        os.path.join(given, name)
        for name in os.listdir(given)
        if name.lower().endswith(suffixes) and not name.startswith(".")
    )
    if not found:
        raise click.UsageError(f"There is no {kind} in the folder {given}")
    return found
