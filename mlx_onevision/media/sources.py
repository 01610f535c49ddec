"""Bytes of a medium that is not a file: behind an http(s) URL, or written out as base64."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from urllib.parse import urlsplit

from mlx_onevision.errors import MediaError, TooLargeError

# What stands for one thing among many: a picture, a video, a text, or pictures in a list.

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
# How MP4 and MOV, Matroska and WebM, and AVI begin; HEIF, which is a picture, begins as MP4 does.
_VIDEO = re.compile(
    rb"....(ftyp(?!heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis)|moov|mdat|wide)"
    rb"|\x1a\x45\xdf\xa3|RIFF....AVI ",
    re.DOTALL,
)


def is_video(source: object) -> bool:
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


MAX_DOWNLOAD = 256 << 20  # bytes
TIMEOUT = 30.0  # seconds without a sign of life
DEADLINE = 120.0  # seconds for a whole download

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def quoted(text: str) -> str:
    """``text`` as a sentence can name it: in quotes, on one line, its middle left out if long."""
    if len(text) > 160:
        text = f"{text[:90]}…{text[-60:]}"
    return f"'{text}'" if text.isprintable() else repr(text)


def is_url(text: str) -> bool:
    """Whether ``text`` is an http(s) URL. MediaError for an address of any other kind."""
    address = _ADDRESS.match(text)
    if address and address[1].lower() not in ("http", "https"):
        raise MediaError(f"cannot read {quoted(text)}: of addresses, only http and https are read")
    return address is not None


def data_uri(text: str) -> bytes:
    """The bytes of ``data:…;base64,…``."""
    head, _, data = text.partition(",")
    if not head.endswith(";base64"):
        raise MediaError(f"{quoted(text)} is not a base64 data URI")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"the data URI {quoted(text)} is not valid base64") from None


def bare_base64(text: str) -> bytes | None:
    """The bytes of ``text`` if it reads as base64 and names no file, else None."""
    if not _BASE64.fullmatch(text) or os.path.exists(text):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def download(url: str, most: int = MAX_DOWNLOAD) -> bytes:
    """The body behind an http(s) URL, of at most ``most`` bytes.

    Redirects are followed, to http(s) only.

    Raises:
        MediaError: no network, no such host, an error status, an answer that does not end.
        TooLargeError: more than ``most`` bytes.
    """
    from http.client import HTTPException
    from time import monotonic
    from urllib import request
    from urllib.error import HTTPError

    # urllib's own opener would follow a redirect to ftp as well.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
        request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    too_large = f"{quoted(url)} is larger than {most >> 20:,} MB, the most that is downloaded"
    deadline = monotonic() + DEADLINE
    body = bytearray()
    try:
        asked = request.Request(url, headers={"User-Agent": "mlx-onevision"})
        with opener.open(asked, timeout=TIMEOUT) as answer:
            promised = int(answer.headers.get("Content-Length") or 0)
            if promised > most:
                raise TooLargeError(too_large)
            while chunk := answer.read1(1 << 20):
                body += chunk
                if len(body) > most:
                    raise TooLargeError(too_large)
                if monotonic() > deadline:
                    raise TimeoutError(f"not done after {DEADLINE:.0f} seconds")
            if len(body) < promised:
                raise ConnectionError(f"it broke off after {len(body):,} of {promised:,} bytes")
    except HTTPError as error:
        error.close()
        raise MediaError(f"cannot read {quoted(url)}: the server answers {error.code}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise MediaError(f"cannot read {quoted(url)}: {text}") from error
    return bytes(body)
