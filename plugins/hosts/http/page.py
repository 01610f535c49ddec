"""``GET /``: the page for people, and the files that it is made of.

They hold nothing that is anybody's, so they are given without a token; what the page asks for
afterwards is not. A browser keeps to what the headers say: it runs and loads what this server sends
and nothing else, in nobody's frame, and asks each time whether a file has changed.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.hosts.http.operations import Endpoint, Serving
from mlx_onevision.plugins.hosts.http.settings import ServerSettings

FILES = Path(__file__).with_name("static")
INDEX = "index.html"

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def paths() -> frozenset[str]:
    """Every path that is answered; nothing else that is asked for is ever looked for as a file."""
    return frozenset(_path(file) for file in _files())


def _path(file: Path) -> str:
    return "/" if file.name == INDEX else f"/page/{file.name}"


def _files() -> Iterator[Path]:
    return (file for file in FILES.iterdir() if file.suffix in KINDS)


def endpoint(serving: Serving) -> Endpoint:
    """Answers any of :func:`paths`."""
    sent = {_path(file): _read(file, serving.settings) for file in _files()}

    async def page(request: Request) -> Response:
        data, kind, tag = sent[request.scope["path"]]
        headers = {**HEADERS, "ETag": tag}
        if tag in _tags(request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type=kind)

    return page


def _read(file: Path, settings: ServerSettings) -> tuple[bytes, str, str]:
    """What is sent: the bytes, their type, and a mark that changes with them."""
    data = file.read_bytes()
    if file.name == INDEX:
        # The page says what is too large before it sends it.
        data = data.replace(b"$BODY_LIMIT", str(settings.body).encode())
    return data, KINDS[file.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _tags(header: str) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}
