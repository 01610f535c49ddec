"""What stands for one thing among many: a picture, a video, a text, or pictures in a list."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_onevision.errors import RequestError
from mlx_onevision.messages import normalise_messages

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LONGEST_NAME = 4096


def item_blocks(item: object) -> list[dict[str, Any]]:
    """An item as a message's content, in its one form."""
    parts = item if isinstance(item, list | tuple) else [item]
    content = [part if isinstance(part, Mapping) else _block(part) for part in parts]
    if not content:
        raise RequestError("it is an empty list")
    return normalise_messages(messages=[{"role": "user", "content": content}])[0]["content"]


def _block(source: object) -> dict[str, Any]:
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    kind = "video" if str(path).lower().endswith(VIDEOS) else "image"
    return {"type": kind, kind: source}


def item_name(blocks: Sequence[Mapping[str, Any]], otherwise: str) -> str:
    """Paths, addresses and texts as they were given; other things have no name."""
    given = [block[block["type"]] for block in blocks]
    if any(not isinstance(value, str | os.PathLike) for value in given):
        return otherwise
    names = [str(os.fspath(value)) for value in given]
    if any(len(name) > LONGEST_NAME or name.startswith("data:") for name in names):
        return otherwise
    return " + ".join(names)
