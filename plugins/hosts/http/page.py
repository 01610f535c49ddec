"""``GET /``: the page for people, and the files that it is made of. They need no token; what the
page asks for afterwards does. The headers make a browser load nothing but this server's files.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.hosts.http.operations import AppState, Handler
from mlx_onevision.plugins.hosts.http.server import ServerSettings

FILES = Path(__file__).with_name("static")
INDEX = "index.html"

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
}

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class File:
    data: bytes
    kind: str
    tag: str  # changes with the data


def read_files(settings: ServerSettings) -> dict[str, File]:
    """By path. All are read at the start: no request's path is ever looked for as a file."""
    files: dict[str, File] = {}
    for file in sorted(FILES.iterdir()):
        if file.suffix in KINDS:
            data, path = file.read_bytes(), f"/page/{file.name}"
            if file.name == INDEX:
                # The page refuses what is too large before it sends it.
                data, path = data.replace(b"$BODY_LIMIT", str(settings.body).encode()), "/"
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[path] = File(data, KINDS[file.suffix], tag)
    return files


def handler(files: Mapping[str, File]) -> Handler:
    async def answer(_: AppState, request: Request) -> Response:
        file = files[request.scope["path"]]
        headers = {**HEADERS, "ETag": file.tag}
        known = request.headers.get("if-none-match", "").split(",")
        if file.tag in {tag.strip().removeprefix("W/") for tag in known}:
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers=headers, media_type=file.kind)

    return answer
