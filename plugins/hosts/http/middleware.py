"""Who may speak to the server, looked at before anything of a request is read.

A web page can send requests to this machine from its visitor's browser, and with a name that it
points here (DNS rebinding) read the answers, too. So the name that a request calls the server by
has to be the server's own; a request that another page sent says so in ``Origin`` and is refused;
and no header ever allows a page to read an answer.
"""

import asyncio
import hmac
import ipaddress
import re
import threading
from collections import Counter
from collections.abc import Mapping
from time import monotonic

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import ModelInfo, Usage
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.settings import WILDCARDS, ServerSettings

# Counts for Prometheus, in its text format.

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


# How many requests for the model there are at once. The one after the last is refused as soon as it
# has been read, and before anything is made of it: in a crowd, looking into what is refused anyway
# would hold up everybody.

_KEY = "mlx_onevision.place"


class Places:
    """Around the application.

    most : None for as many as the backend takes.
    """

    def __init__(self, app: ASGIApp, most: int | None) -> None:
        self._app, self._most = app, most
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = scope[_KEY] = _Place(self)

        async def watched(message: Message) -> None:
            # Before the client hears of the end: it may ask again at once.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                place.leave()
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            place.leave()

    def take(self) -> None:
        if self._most is not None and self._taken >= self._most:
            raise PluginError(
                "busy", f"{self._taken} requests are under way or wait", "try again in a moment"
            )
        self._taken += 1

    def leave(self) -> None:
        self._taken -= 1


class _Place:
    """One request's, until its answer has been sent or nobody waits for it."""

    def __init__(self, places: Places) -> None:
        self._places, self._taken = places, False

    def take(self) -> None:
        self._places.take()
        self._taken = True

    def leave(self) -> None:
        if self._taken:
            self._taken = False
            self._places.leave()


def take(request: Request) -> None:
    """A place for a request. Raises PluginError ``busy`` when there is none."""
    place: _Place = request.scope[_KEY]
    place.take()


_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


class Guards:
    """Around the application: Host, Origin and token.

    public : paths that are read without a token; their answers are the same for everybody.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, public: frozenset[str] = frozenset()
    ) -> None:
        self._app, self._settings, self._public = app, settings, public
        self._any_address = settings.host in WILDCARDS
        self._further = {_plain(name) for name in settings.names}
        named = (settings.host, *settings.names, "127.0.0.1", "localhost", "::1")
        self._names = {_plain(name) for name in named if name not in WILDCARDS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no lifespan, no web sockets
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        try:
            self._check(scope["method"], scope["path"], headers)
        except HTTPError as fault:
            extra = {"Connection": "close"}  # what else it sends is not read
            if fault.status == 401:
                extra["WWW-Authenticate"] = "Bearer"
            await fault.response(extra)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: dict[bytes, list[bytes]]) -> None:
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._is_named(hosts[0]):
            raise HTTPError(421, "the Host header does not name this server", "misdirected")
        for origin in headers.get(b"origin", []):
            # Its own page may speak to it; the host that it names was checked above.
            if origin.lower() not in self._own_origins(hosts[0].lower()):
                raise HTTPError(403, "requests from other pages are refused", "forbidden_origin")
        public = method in ("GET", "HEAD") and path in self._public
        if self._settings.token is not None and not public:
            given = headers.get(b"authorization", [])
            wanted = b"bearer " + self._settings.token.encode()
            good = len(given) == 1 and hmac.compare_digest(_lower_scheme(given[0]), wanted)
            if not good:
                raise HTTPError(
                    401,
                    "the token is missing or wrong; send it as Authorization: Bearer",
                    "invalid_api_key",
                )

    def _own_origins(self, host: bytes) -> tuple[bytes, ...]:
        """Of the page at ``host``; by a further name perhaps behind a proxy with a certificate."""
        found = _HOST.fullmatch(host.decode("latin-1"))
        proxied = found is not None and _plain(found[1]) in self._further
        return (b"http://" + host, b"https://" + host) if proxied else (b"http://" + host,)

    def _is_named(self, host: bytes) -> bool:
        found = _HOST.fullmatch(host.decode("latin-1"))
        if found is None or int(found[2] or 0) > 65535:
            return False
        name = _plain(found[1])
        return name in self._names or (self._any_address and _is_address(name))


def _lower_scheme(value: bytes) -> bytes:
    scheme, space, token = value.partition(b" ")
    return scheme.lower() + space + token


def _plain(name: str) -> str:
    return name.strip("[]").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
