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
from mlx_onevision.plugins.hosts.http.serving import Serving, answered
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.interface import Backend

THREADS = 64


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
    made = [
        ("GET", "/health", status.health),
        ("GET", "/metrics", status.metrics),
        ("GET", "/v1/models", status.models),
        ("GET", "/v1/models/{name:path}", status.model),
        ("POST", "/v1/chat/completions", chat.endpoint),
        ("POST", "/v1/embeddings", embeddings.endpoint),
        ("POST", "/v1/video/describe", videos.endpoint),
    ]
    app = Starlette(
        routes=[Route(path, answered(make(serving)), methods=[how]) for how, path, make in made],
        exception_handlers={HTTPException: not_routed},
    )
    app.router.redirect_slashes = False  # a redirect would repeat what the request said
    paths = frozenset(path for _, path, _ in made)
    return Measured(Guards(app, settings), serving.metrics, paths)
