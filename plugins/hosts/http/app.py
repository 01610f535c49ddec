"""The application: routes, and what is around them."""

import time
from concurrent.futures import ThreadPoolExecutor
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
    openapi,
    page,
    responses,
    status,
    videos,
)
from mlx_onevision.plugins.hosts.http.errors import HTTPError, not_routed, to_http_error
from mlx_onevision.plugins.hosts.http.middleware import Guards, Metrics, Middleware
from mlx_onevision.plugins.hosts.http.operations import JSON, AppState, Handler, Operation
from mlx_onevision.plugins.hosts.http.request_body import BodyReader
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

THREADS = 64
GONE = 499  # nginx's status for a client that closed the connection; nobody reads it


async def openapi_file(state: AppState, _: Request) -> Response:
    if state.openapi is None:
        found = await state.blocking(lambda: openapi.document(OPERATIONS, state))
        state.openapi = JSONResponse(found)
    return state.openapi


OPERATIONS: tuple[Operation, ...] = (
    *status.OPERATIONS,
    chat.OPERATION,
    responses.OPERATION,
    embeddings.OPERATION,
    *videos.OPERATIONS,
    Operation("GET", "/openapi.json", openapi_file, "openapi", "This file", {JSON: dict[str, Any]}),
)
"""Every route for programs, each declared beside its handler."""


def create_app(backend: Backend, settings: ServerSettings | None = None) -> ASGIApp:
    """An ASGI application over ``backend``, which stays its owner's to close.

    Raises:
        PluginError: ``model_not_found``.
    """
    settings = settings or ServerSettings()
    state = AppState(
        backend,
        settings,
        model=settings.model or backend.info().id,
        created=int(time.time()),
        threads=ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-onevision-http"),
        reader=BodyReader(settings, backend),
        jobs=Jobs(backend),
        metrics=Metrics(),
    )
    files = page.read_files(settings)
    handlers: dict[str, dict[str, Handler]] = {path: {"GET": page.handler(files)} for path in files}
    for one in OPERATIONS:
        handlers.setdefault(one.path, {})[one.method] = one.handler
    routes = [_route(path, methods, state) for path, methods in handlers.items()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: not_routed})
    app.router.redirect_slashes = False  # a redirect would repeat the request's address
    return Middleware(
        app,
        Guards(settings, public=frozenset(files)),
        state.metrics,
        {route.endpoint: route.path for route in routes},
    )


def _route(path: str, handlers: dict[str, Handler], state: AppState) -> Route:
    """One for all methods of a path, so that ``Allow`` of a 405 lists them."""

    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        try:
            return await handlers[method](state, request)
        except HTTPError as error:
            unread = error.status in (408, 413, 415, 429)  # the rest of the body is not read
            return error.response({"Connection": "close"} if unread else None)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as error:
            return to_http_error(to_plugin_error(error)).response()

    return Route(path, endpoint, methods=list(handlers))
