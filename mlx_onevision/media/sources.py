"""The bytes of an image or a video, from a path, an http(s) URL, base64 or a file object, and what
errors call it.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import stat
import unicodedata
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.files import SNIFF_BYTES, sniff
from mlx_onevision.media.deadline import Deadline

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

IMAGES = (
    *(".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".qoi"),
    *(".heic", ".heif", ".avif"),
)
VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"),
    *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".ogv"),
)
IMAGE_KINDS = "JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, ICO, JPEG 2000, QOI, AVIF, HEIC"
VIDEO_KINDS = "MP4, MOV, Matroska, WebM, AVI, GIF, MPEG-TS, M2TS, MPEG-PS, Ogg"
MAX_DOWNLOAD = 256 << 20  # bytes
TIMEOUT = 30.0  # seconds to connect, and between two pieces of an answer
DEADLINE = 120.0  # seconds for a whole download

Kind: TypeAlias = Literal["image", "video"]

_ARTICLES = {"image": "an image", "video": "a video"}
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BLANKS = b" \t\n\r\f\v"  # allowed between the letters of base64
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", re.ASCII)


def _is_bytes(source: object) -> TypeGuard[bytes | bytearray | memoryview]:
    return isinstance(source, bytes | bytearray | memoryview)


def _is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, str | os.PathLike)


def is_file(source: object) -> bool:
    """Whether ``source`` has to be read and decoded; otherwise it holds pixels already."""
    encoded = hasattr(source, "read") and not hasattr(source, "shape")
    return _is_bytes(source) or _is_path(source) or encoded


def is_video(source: object) -> bool:
    """Whether ``source`` is a video: by its first bytes; by its name where it cannot be opened, as
    behind a URL; an array, by its four axes.
    """
    if _is_bytes(source):
        return sniff(bytes(memoryview(source)[:SNIFF_BYTES])) == "video"
    if not _is_path(source):
        return getattr(source, "ndim", None) == 4
    name = os.fsdecode(source)
    if name[:5].lower() == "data:":
        return name[:11].lower() == "data:video/"
    try:
        with open_path(name, "video")[0] as file:
            if sniff(file.read(SNIFF_BYTES)) == "video":
                return True
    except (MediaError, OSError):
        if not os.path.exists(os.path.expanduser(name)):  # a URL
            name = name.partition("?")[0].partition("#")[0]
    return name.lower().endswith(VIDEOS)


def open_source(source: Any, kind: Kind) -> tuple[bytes | FileIO, str]:
    """The bytes of a source for which :func:`is_file` holds, or the open file, and what errors call
    it. A string is a data URI, a URL, a path, or, if it can be nothing else, base64.

    Raises MediaError, and TooLargeError for too large a download.
    """
    if _is_bytes(source):
        return bytes(source), f"the {kind} given as bytes"
    if hasattr(source, "read"):
        return _read_file(source, name := file_name(source, kind)), name
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return data_uri(source), f"the {kind} in the data URI"
        if is_url(source):
            return download(source), quoted(source)
        data = bare_base64(source)
        if data is not None:
            return data, f"{quoted(source)} (read as base64, for there is no such file)"
        if not source or "\0" in source:
            raise MediaError(f"{quoted(source)} is not the path of {_ARTICLES[kind]}")
    return open_path(source, kind)


def _read_file(file: Any, name: str) -> bytes:
    """The bytes of an open file that a caller gave. Raises MediaError."""
    try:
        data = file.read()
    except UnicodeError:  # opened as text, which an image or a video is not
        data = ""
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise MediaError(f"cannot read {name}: {reason(error)}") from error
    if not _is_bytes(data):
        raise MediaError(f"{name} does not give bytes; open the file in binary mode")
    return bytes(data)


def open_path(path: str | os.PathLike[str], kind: Kind) -> tuple[FileIO, str]:
    """An ordinary file, open, and what errors call it. Raises MediaError for anything else."""
    path = Path(os.path.expanduser(path))
    name = quoted(str(path))
    try:
        # Non-blocking: opening a pipe that nobody writes to would never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        similar = similar_path(str(path))
        if similar is not None:
            return open_path(similar, kind)
        raise MediaError(f"{name} does not exist; give the path of {_ARTICLES[kind]}") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"cannot read {name}: {reason(error)}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise MediaError(f"{name} is {found}, not {_ARTICLES[kind]}")
    return FileIO(descriptor), name


def similar_path(path: str) -> str | None:
    """Where there is no such file, the one beside it whose name looks the same."""
    folder, name = os.path.split(path)
    try:
        similar = similar_name(name, os.listdir(folder or "."))
    except OSError:
        return None
    return None if similar is None else os.path.join(folder, similar)


def similar_name(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that looks like ``name``: macOS puts a narrow no-break space into those
    of screenshots, and disks may keep accents as characters of their own. None for several.
    """
    found = [other for other in names if _looks(other) == _looks(name)]
    return found[0] if len(found) == 1 else None


def _looks(name: str) -> str:
    folded = unicodedata.normalize("NFKC", name)
    return "".join(" " if character.isspace() else character for character in folded)


def file_name(file: Any, kind: str) -> str:
    """What errors call an open file that a caller gave."""
    name = getattr(file, "name", None)
    return quoted(name) if isinstance(name, str) else f"the {kind} given as a file object"


def quoted(text: str) -> str:
    """``text`` in quotes, on one line, its middle left out if long."""
    if len(text) > 160:
        text = f"{text[:90]}…{text[-60:]}"
    return f"'{text}'" if text.isprintable() else repr(text)


def reason(error: object) -> str:
    """The first line of an error's message, without a full stop, for the end of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(". ")


def is_url(text: str) -> bool:
    """Whether ``text`` is an http(s) URL. MediaError for a URL of any other kind."""
    address = _ADDRESS.match(text)
    if address and address[1].lower() not in ("http", "https"):
        raise MediaError(f"cannot read {quoted(text)}: of addresses, only http and https are read")
    return address is not None


def data_uri(text: str) -> bytes:
    """The bytes of ``data:…;base64,…``."""
    head, _, data = text.partition(",")
    if not head.lower().endswith(";base64"):
        raise MediaError(f"{quoted(text)} is not a base64 data URI")
    decoded = _from_base64(data)
    if decoded is None:
        raise MediaError(f"the data URI {quoted(text)} is not valid base64")
    return decoded


def bare_base64(text: str) -> bytes | None:
    """The bytes of ``text`` if it reads as base64 and names no file, else None."""
    if not _BASE64.fullmatch(text) or os.path.exists(text):
        return None
    return _from_base64(text)


def _from_base64(text: str) -> bytes | None:
    try:  # as bytes: splitting at blanks would make an object of each piece
        return base64.b64decode(text.encode("ascii").translate(None, _BLANKS), validate=True)
    except ValueError:
        return None


def download(url: str, most: int = MAX_DOWNLOAD) -> bytes:
    """The body behind an http(s) URL; redirects are followed, to http(s) only. Raises MediaError,
    and TooLargeError beyond ``most`` bytes.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request

    too_large = f"{quoted(url)} is larger than {most >> 20:,} MB, the most that is downloaded"
    body = bytearray()
    deadline = Deadline(DEADLINE)
    try:
        get = Request(  # noqa: S310 (the opener has handlers for http and https alone)
            encoded_url(url), headers={"User-Agent": "mlx-onevision"}
        )
        with deadline, _opener(deadline).open(get, timeout=TIMEOUT) as response:
            promised = int(response.headers.get("Content-Length") or 0)
            if promised > most:
                raise TooLargeError(too_large)
            while chunk := response.read1(1 << 20):
                body += chunk
                if len(body) > most:
                    raise TooLargeError(too_large)
            deadline.check()
            if len(body) < promised:
                raise ConnectionError(f"it broke off after {len(body):,} of {promised:,} bytes")
    except (OSError, HTTPException, ValueError) as error:
        why = reason(getattr(error, "reason", None) or error)
        if isinstance(error, HTTPError):
            error.close()
            why = f"the server answers {error.code}"
        if deadline.expired:
            why = f"not done after {DEADLINE:.0f} seconds"
        raise MediaError(f"cannot read {quoted(url)}: {why}") from error
    return bytes(body)


def _opener(deadline: Deadline) -> OpenerDirector:
    """Opens http and https URLs within a deadline. urllib's default opener would also read file:
    and ftp: URLs, and follow redirects to ftp.
    """
    from http import client
    from urllib import request

    def within(cls: type[client.HTTPConnection]) -> Callable[..., client.HTTPConnection]:
        def connect(address: tuple[str, int], *_: object) -> socket.socket:
            error: OSError = OSError("it has no address")
            for found in deadline.addresses(*address, TIMEOUT):
                try:
                    return deadline.connect(found, address[1], TIMEOUT)
                except OSError as failed:
                    error = failed
            raise error

        def make(*arguments: Any, **options: Any) -> client.HTTPConnection:
            connection = cls(*arguments, **options)
            # The hook that http.client itself opens sockets by.
            connection._create_connection = connect  # pyright: ignore
            return connection

        return make

    class Plain(request.HTTPHandler):
        def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
            return super().do_open(within(http_class), req, **options)

    class Secure(request.HTTPSHandler):
        def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
            return super().do_open(within(http_class), req, **options)

    class Redirect(request.HTTPRedirectHandler):
        def redirect_request(
            self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
        ) -> Any:
            fp.close()  # urllib would read its body, however long
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    opener = request.OpenerDirector()
    for handler in (Plain, Secure, Redirect):
        opener.add_handler(handler())
    for name in ("Proxy", "HTTPDefaultError"):
        opener.add_handler(getattr(request, f"{name}Handler")())
    opener.add_handler(request.HTTPErrorProcessor())
    return opener


def encoded_url(url: str) -> str:
    """A URL as it is sent: host in IDNA, everything else that is not ASCII, or a space, in percent
    notation. ValueError for a host that cannot be one.
    """
    from urllib.parse import quote, urlsplit

    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        name, colon, port = host.partition(":")
        host = name.encode("idna").decode("ascii") + colon + port
    netloc = quote(user, safe="%:") + at + host
    safe = "%/:=&?~#+!$,;'@()*[]"
    path, query = (quote(part, safe=safe) for part in (parts.path, parts.query))
    return parts._replace(netloc=netloc, path=path, query=query, fragment="").geturl()
