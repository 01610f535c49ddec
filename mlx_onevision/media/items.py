"""What stands for one thing among many: a picture, a video, a text, or pictures in a list."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from mlx_onevision.errors import RequestError
from mlx_onevision.prompt.messages import normalise_messages

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# How MP4 and MOV, Matroska and WebM, and AVI begin; HEIF, which is a picture, begins as MP4 does.
_VIDEO = re.compile(
    rb"....(ftyp(?!heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis)|moov|mdat|wide)"
    rb"|\x1a\x45\xdf\xa3|RIFF....AVI ",
    re.DOTALL,
)
LONGEST_NAME = 4096


def item_blocks(item: object) -> list[dict[str, Any]]:
    """An item as a message's content, in its one form."""
    parts = item if isinstance(item, list | tuple) else [item]
    content = [part if isinstance(part, Mapping) else _block(part) for part in parts]
    if not content:
        raise RequestError("it is an empty list")
    return normalise_messages(messages=[{"role": "user", "content": content}])[0]["content"]


def _block(source: object) -> dict[str, Any]:
    kind = "video" if _is_video(source) else "image"
    return {"type": kind, kind: source}


def _is_video(source: object) -> bool:
    """By how it begins, and by its name where it cannot be looked into, as behind an address."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _VIDEO.match(bytes(source[:16])) is not None
    if not isinstance(source, str | os.PathLike):
        return getattr(source, "ndim", None) == 4
    path = str(os.fspath(source))
    if path[:5].lower() == "data:":
        return path[:11].lower() == "data:video/"
    try:
        # Not waiting: opening a pipe that nobody writes to would never end.
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return urlsplit(path).path.lower().endswith(VIDEOS)
    with os.fdopen(descriptor, "rb") as file:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        begins = _VIDEO.match(file.read(16)) if regular else None
    return begins is not None or path.lower().endswith(VIDEOS)


def item_name(blocks: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    """Paths, addresses and texts as they were given; other things have no name."""
    given = [block[block["type"]] for block in blocks]
    if any(not isinstance(value, str | os.PathLike) for value in given):
        return otherwise
    names = [str(os.fspath(value)) for value in given]
    if any(len(name) > LONGEST_NAME or name.startswith("data:") for name in names):
        return otherwise
    return " + ".join(names)
