"""The application: routes, and what is around them."""

import time
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from mlx_onevision.plugins.hosts.http import chat, embeddings, status, videos
from mlx_onevision.plugins.hosts.http.bodies import Reader
from mlx_onevision.plugins.hosts.http.faults import not_routed
from mlx_onevision.plugins.hosts.http.guards import Guards
from mlx_onevision.plugins.hosts.http.metrics import Measured
from mlx_onevision.plugins.hosts.http.operations import Operation
from mlx_onevision.plugins.hosts.http.serving import Serving, answered
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.interface import Backend

THREADS = 64

OPERATIONS: tuple[Operation, ...] = (
    *status.OPERATIONS,
    chat.OPERATION,
    embeddings.OPERATION,
    *videos.OPERATIONS,
)
"""Every route. What one is stands beside what answers it."""


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
        threads=ThreadPoolExecutor(THREADS, thread_name_prefix="mlx-onevision-http"),
    )
    app = Starlette(
        routes=[
            Route(one.path, answered(one.make(serving)), methods=[one.method]) for one in OPERATIONS
        ],
        exception_handlers={HTTPException: not_routed},
    )
    app.router.redirect_slashes = False  # a redirect would repeat what the request said
    paths = frozenset(one.path for one in OPERATIONS)
    return Measured(Guards(app, settings), serving.metrics, paths)
