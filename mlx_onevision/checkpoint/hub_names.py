"""What a hub says about files, checked before huggingface_hub makes paths of it and of its bytes.

The client names a file in its cache by the ETag, and a folder by the commit, that the server sends;
a server that is not the real one (``HF_ENDPOINT``, a proxy) could have it write anywhere.
"""

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import Any, cast

from mlx_onevision.errors import ModelNotFoundError, short

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
CLOCKS = 2.0  # seconds by which a disk's clock may be behind
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # an ETag: a hash, in other hubs two parts
# Where in the JSON about a repository, and in the headers about a file, such names stand.
_KEYS = {"sha": COMMIT, "oid": _NAME, "sha256": _NAME, "xetHash": _NAME}
_HEADERS = {"x-repo-commit": COMMIT, "x-xet-hash": _NAME}


@contextmanager
def checked_names() -> Generator[None]:
    """Checks every answer of a hub meanwhile.

    Raises:
        ModelNotFoundError: for an answer with a name of a file or a commit that is none.
    """
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks["response"]
    hooks.append(_check)
    try:
        yield
    finally:
        hooks.remove(_check)


def _check(response: Any) -> None:
    host, headers = response.request.url.host, response.headers
    found = [(pattern, headers[name]) for name, pattern in _HEADERS.items() if name in headers]
    if response.request.method == "HEAD":
        etag = headers.get("x-linked-etag") or headers.get("etag")
        if etag is not None:  # as the client reads it
            found.append((_NAME, etag.lstrip("W/").strip('"')))
    elif "/api/" in response.request.url.path and "json" in headers.get("content-type", ""):
        response.read()
        try:
            found += _names(response.json())
        except ValueError:
            pass  # the client says that it is no JSON
    for pattern, name in found:
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise ModelNotFoundError(
                f"{host} names a file or a commit {short(ascii(name))}, which is no such name; "
                "check HF_ENDPOINT"
            )


def _names(value: Any) -> Iterator[tuple[re.Pattern[str], Any]]:
    """The names in the JSON of an answer, each with the pattern that it must have."""
    for entry in cast(list[Any], value) if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            fields = cast(dict[str, Any], entry)
            yield from ((_KEYS[key], fields[key]) for key in _KEYS & fields.keys() if fields[key])
            yield from _names(fields.get("lfs"))


def check_bytes(repository: str, folder: Path, since: float) -> None:
    """Of a downloaded folder, the files that came since (a time): where the Hub gives a SHA-256, in
    whose name the cache keeps the file, it is that of the bytes.

    Raises:
        ModelNotFoundError: for a file of which it is not; the file is removed.
    """
    for path in folder.iterdir():
        kept = path.resolve()
        if not SHA256.fullmatch(kept.name) or kept.stat().st_mtime < since - CLOCKS:
            continue
        with kept.open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
        if found != kept.name:
            path.unlink()
            kept.unlink()
            raise ModelNotFoundError(
                f"{path.name} of {repository} did not arrive as the Hub has it (its SHA-256 is "
                f"{found[:12]}…, not {kept.name[:12]}…); run it again"
            )
