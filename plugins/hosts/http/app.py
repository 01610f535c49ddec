"""The application: routes, and what is around them."""

import time
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_onevision.plugins.hosts.http import (
    chat,
    embeddings,
    openapi,
    page,
    responses,
    status,
    videos,
)
from mlx_onevision.plugins.hosts.http.errors import not_routed
from mlx_onevision.plugins.hosts.http.middleware import Guards, Measured, Places
from mlx_onevision.plugins.hosts.http.operations import Operation, Serving, answered
from mlx_onevision.plugins.hosts.http.request_body import Reader
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

THREADS = 64

_SERVED: tuple[Operation, ...] = (
    *status.OPERATIONS,
    chat.OPERATION,
    responses.OPERATION,
    embeddings.OPERATION,
    *videos.OPERATIONS,
)
OPERATIONS = (*_SERVED, openapi.operation(_SERVED))
"""Every route for programs. What one is stands beside what answers it."""


def _by_path() -> dict[str, list[Operation]]:
    paths: dict[str, list[Operation]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, []).append(one)
    return paths


def _route(path: str, ones: list[Operation], serving: Serving) -> Route:
    """One for all methods of a path, so that a refusal says which there are."""
    endpoints = {one.method: answered(one.make(serving)) for one in ones}

    async def endpoint(request: Request) -> Response:
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, endpoint, methods=list(endpoints))


def create_app(backend: Backend, settings: ServerSettings | None = None) -> ASGIApp:
    """An ASGI application over ``backend``, which stays its owner's to close.

    Raises:
        PluginError: ``model_not_found``.
    """
    settings = settings or ServerSettings()
    serving = Serving(
        backend,
        settings,
        model=settings.model or backend.info().id,
        created=int(time.time()),
        reader=Reader(settings),
        jobs=Jobs(backend),
        threads=ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-onevision-http"),
    )
    routes = [_route(path, ones, serving) for path, ones in _by_path().items()]
    pages, sent = page.paths(), answered(page.endpoint(serving))
    app = Starlette(
        routes=[*routes, *(Route(path, sent, methods=["GET"]) for path in sorted(pages))],
        exception_handlers={HTTPException: not_routed},
    )
    app.router.redirect_slashes = False  # a redirect would repeat what the request said
    return Measured(
        Guards(Places(app, settings.places), settings, pages),
        serving.metrics,
        pages.union(route.path for route in routes),
        {route.endpoint: route.path for route in routes},
    )
