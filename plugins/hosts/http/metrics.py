"""Counts for Prometheus, in its text format."""

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_onevision.plugins.contract.results import ModelInfo, Usage

TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What the server has done since it was started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def request(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds  # pyright: ignore[reportArgumentType]

    def usage(self, usage: Usage) -> None:
        with self._lock:
            self._tokens["prompt"] += usage.prompt_tokens
            self._tokens["cached"] += usage.cached_tokens
            self._tokens["media"] += usage.media_tokens
            self._tokens["completion"] += usage.completion_tokens

    def text(self, info: ModelInfo) -> str:
        """Everything, a line each."""
        with self._lock:
            requests, seconds = dict(self._requests), dict(self._seconds)
            tokens = {kind: self._tokens[kind] for kind in _KINDS}
        counts = [
            (f'{{route="{route}",status="{status}"}}', count)
            for (route, status), count in sorted(requests.items())
        ]
        took = [(f'{{route="{route}"}}', f"{s:.6f}") for route, s in sorted(seconds.items())]
        said = [(f'{{kind="{kind}"}}', count) for kind, count in tokens.items()]
        lines: list[str] = []
        for name, kind, meaning, samples in (
            ("requests_total", "counter", "Requests answered.", counts),
            ("request_seconds_total", "counter", "Seconds spent on requests.", took),
            ("tokens_total", "counter", "Tokens read and written.", said),
            ("requests_active", "gauge", "Requests under way.", [("", info.active)]),
            ("requests_waiting", "gauge", "Requests in line.", [("", info.waiting)]),
            ("model_loaded", "gauge", "1 while weights are held.", [("", int(info.loaded))]),
        ):
            whole = f"mlx_onevision_{name}"
            lines += [f"# HELP {whole} {meaning}", f"# TYPE {whole} {kind}"]
            lines += [f"{whole}{labels} {value}" for labels, value in samples]
        return "\n".join(lines) + "\n"


_KINDS = ("prompt", "cached", "media", "completion")


class Measured:
    """Around the application: counts its answers. Only routes that exist have a name of their own;
    anything else that is asked for could fill the memory with names.

    routes : the paths of them, ``{name}`` and all. endpoints : which of them each answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: frozenset[str],
        endpoints: Mapping[object, str],
    ) -> None:
        self._app, self._metrics = app, metrics
        self._routes, self._endpoints = routes, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 0, monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            pass  # the server ends; what runs it would write a traceback
        finally:
            self._metrics.request(self._route(scope), status, monotonic() - began)

    def _route(self, scope: Scope) -> str:
        if scope["path"] in self._routes:
            return scope["path"]
        return self._endpoints.get(scope.get("endpoint"), "other")
