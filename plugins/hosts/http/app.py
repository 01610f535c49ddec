"""The application: routes, what is around them, and the page for people."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_onevision.plugins.contract.errors import to_plugin_error
from mlx_onevision.plugins.hosts.http import (
    chat,
    embeddings,
    ollama,
    openapi,
    status,
    uploads,
    videos,
)
from mlx_onevision.plugins.hosts.http.errors import HTTPError, not_routed, to_http_error
from mlx_onevision.plugins.hosts.http.middleware import Guards, Metrics, Middleware
from mlx_onevision.plugins.hosts.http.operations import JSON, AppState, Handler, Operation
from mlx_onevision.plugins.hosts.http.request_body import BodyReader
from mlx_onevision.plugins.hosts.http.responses import route as responses
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.base import StreamingBackend
from mlx_onevision.plugins.service.jobs import Jobs

MAX_THREADS = 64
# Nginx's status for a client that closed the connection; nobody reads it.
CLIENT_CLOSED_STATUS = 499


async def openapi_file(state: AppState, _: Request) -> Response:
    """Answers with the OpenAPI file, made once."""
    if state.openapi is None:
        # Whoever else asks meanwhile waits for the same: it takes a while to make.
        make = state.blocking(lambda: JSONResponse(openapi.document(state.operations, state)))
        state.openapi = asyncio.create_task(make)
    return await asyncio.shield(state.openapi)


OPERATIONS: tuple[Operation, ...] = (
    *status.OPERATIONS,
    chat.OPERATION,
    *responses.OPERATIONS,
    embeddings.OPERATION,
    *videos.OPERATIONS,
    Operation("GET", "/openapi.json", openapi_file, "openapi", "This file", {JSON: dict[str, Any]}),
)
"""Every route for programs that is always there, each declared beside its handler."""


def create_app(backend: Backend, settings: ServerSettings | None = None) -> ASGIApp:
    """An ASGI application over ``backend``, which stays its owner's to close. Raises PluginError:
    ``model_not_found``.
    """
    settings = settings or ServerSettings()
    spool = backend.policy.uploads if isinstance(backend, StreamingBackend) else None
    state = AppState(
        backend,
        settings,
        model=settings.model or backend.info().id,
        created=int(time.time()),
        threads=ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="mlx-onevision-http"),
        reader=BodyReader(settings, backend),
        jobs=Jobs(backend),
        metrics=Metrics(),
        operations=OPERATIONS if spool is None else (*OPERATIONS, *uploads.OPERATIONS),
        uploads=spool,
    )
    files = read_page(settings, 0 if spool is None else spool.max_file_bytes)
    handlers: dict[str, dict[str, Handler]] = {path: {"GET": page_handler(files)} for path in files}
    for one in (*state.operations, *(ollama.OPERATIONS if settings.ollama else ())):
        handlers.setdefault(one.path, {})[one.method] = one.handler
    routes = [_route(path, methods, state) for path, methods in handlers.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: not_routed})
    app.router.redirect_slashes = False  # a redirect would repeat the request's address
    return Middleware(
        app,
        Guards(settings, public=frozenset(files)),
        state.metrics,
        {route.endpoint: route.path for route in routes},
        state.reader.release,
    )


def _route(path: str, handlers: dict[str, Handler], state: AppState) -> Route:
    """One for all methods of a path, so that ``Allow`` of a 405 lists them."""

    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        try:
            return await handlers[method](state, request)
        except HTTPError as error:
            unread = error.status in (408, 413, 415, 429, 507)  # the rest of the body is not read
            return error.response({"Connection": "close"} if unread else None)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_STATUS)
        except Exception as error:
            return to_http_error(to_plugin_error(error)).response()

    return Route(path, endpoint, methods=list(handlers))


# ``GET /``: the page for people, and the files that it is made of. They need no token; what it asks
# for afterwards does. The headers make a browser load nothing but this server's files.

STATIC_FOLDER = Path(__file__).with_name("static")
INDEX_FILE = "index.html"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".mp4": "video/mp4",
}

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is answered."""

    data: bytes
    kind: str
    tag: str  # changes with the data


def read_page(settings: ServerSettings, upload_limit: int) -> dict[str, PageFile]:
    """By path. All are read at the start: no request's path is ever looked for as a file."""
    files: dict[str, PageFile] = {}
    for file in sorted(STATIC_FOLDER.iterdir()):
        if file.suffix in MEDIA_TYPES:
            data, path = file.read_bytes(), f"/page/{file.name}"
            if file.name == INDEX_FILE:
                # The page refuses what is too large before it sends it.
                data = data.replace(b"$BODY_LIMIT", str(settings.max_body_bytes).encode())
                data, path = data.replace(b"$UPLOAD_LIMIT", str(upload_limit).encode()), "/"
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[path] = PageFile(data, MEDIA_TYPES[file.suffix], tag)
    return files


def page_handler(files: Mapping[str, PageFile]) -> Handler:
    """What answers for ``files``, which are known by their paths."""

    async def answer(_: AppState, request: Request) -> Response:
        file = files[request.scope["path"]]
        headers = {**PAGE_HEADERS, "ETag": file.tag}
        known = request.headers.get("if-none-match", "").split(",")
        if file.tag in {tag.strip().removeprefix("W/") for tag in known}:
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers=headers, media_type=file.kind)

    return answer
