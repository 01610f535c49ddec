"""Around the application: guards, and counts for Prometheus.

A web page can send requests to this machine from its visitor's browser and, with DNS rebinding,
read the answers. So ``Host`` has to be a name of this server, ``Origin`` must not be another page,
and no header allows one to read an answer, unless the server was started with that origin; all
before anything of a body is read.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import secrets
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from time import monotonic

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_onevision.plugins.contract.results import ModelInfo, Usage
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.server import WILDCARD_HOSTS, ServerSettings

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")

logger = logging.getLogger("mlx_onevision.requests")

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


class Guards:
    """Checks Host, Origin and token; the paths in ``public`` need no token."""

    def __init__(self, settings: ServerSettings, public: frozenset[str] = frozenset()) -> None:
        self._token, self._public = settings.token, public
        self._origins = [origin.lower().encode() for origin in settings.origins]
        self._any_address = settings.host in WILDCARD_HOSTS
        self._further = {_plain(name) for name in settings.names}
        named = (settings.host, *settings.names, "127.0.0.1", "localhost", "::1")
        self._names = {_plain(name) for name in named if name not in WILDCARD_HOSTS}

    def check_origin(self, scope: Scope) -> bytes | None:
        """The origin of another page that was allowed, if one asks. Raises HTTPError 421 or 403."""
        headers = _headers(scope)
        hosts = headers[b"host"]
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._names or (self._any_address and _is_address(name))):
            raise HTTPError(421, "the Host header does not name this server", "misdirected")
        # Its own page may speak to it; by a further name perhaps behind a proxy with a certificate.
        schemes = (b"http://", b"https://") if name in self._further else (b"http://",)
        allowed = None
        for origin in headers[b"origin"]:
            if origin.lower() in [scheme + hosts[0].lower() for scheme in schemes]:
                continue
            if len(headers[b"origin"]) > 1 or not self._is_allowed(origin.lower()):
                message = "requests from other pages are refused; --allow-origin allows one"
                raise HTTPError(403, message, "forbidden_origin")
            allowed = origin
        return allowed

    def _is_allowed(self, origin: bytes) -> bool:
        return any(
            origin.startswith(one + b"//") if one.endswith(b":") else origin == one
            for one in self._origins
        )

    def check_token(self, scope: Scope) -> None:
        """Raises HTTPError 401."""
        headers = _headers(scope)
        public = scope["method"] in ("GET", "HEAD") and scope["path"] in self._public
        if self._token is not None and not public:
            given = headers[b"authorization"]
            scheme, space, token = given[0].partition(b" ") if len(given) == 1 else (b"",) * 3
            wanted = b"bearer " + self._token.encode()
            if not hmac.compare_digest(scheme.lower() + space + token, wanted):
                message = "the token is missing or wrong; send it as Authorization: Bearer"
                raise HTTPError(401, message, "invalid_api_key")


def _headers(scope: Scope) -> defaultdict[bytes, list[bytes]]:
    headers: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for name, value in scope["headers"]:
        headers[name.lower()].append(value)
    return headers


_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{0,2000}")


def preflight(scope: Scope) -> Response | None:
    """What a browser is answered that asks whether an allowed page may send a request."""
    headers = _headers(scope)
    if scope["method"] != "OPTIONS" or not headers[b"access-control-request-method"]:
        return None
    asked = b", ".join(headers[b"access-control-request-headers"])
    answer = {
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": asked.decode() if _HEADER_NAMES.fullmatch(asked) else "",
        "Access-Control-Max-Age": "600",
    }
    if headers[b"access-control-request-private-network"] == [b"true"]:
        answer["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=answer)


def _name(host: bytes) -> str | None:
    found = _HOST.fullmatch(host.decode("latin-1"))
    return None if found is None or int(found[2] or 0) > 65535 else _plain(found[1])


def _plain(name: str) -> str:
    return name.strip("[]").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _readable_by(origin: bytes) -> list[tuple[bytes, bytes]]:
    """Headers with which a browser lets a page of this origin read the answer."""
    return [
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", b"Retry-After"),
        (b"vary", b"Origin"),
    ]


class Metrics:
    """Counts of what the server has done since it was started, as Prometheus reads them."""

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._tokens = {"prompt": 0, "cached": 0, "media": 0, "completion": 0}

    def add_request(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds

    def add_usage(self, usage: Usage) -> None:
        with self._lock:
            for kind in self._tokens:
                self._tokens[kind] += getattr(usage, f"{kind}_tokens")

    def text(self, info: ModelInfo) -> str:
        with self._lock:
            requests, seconds = sorted(self._requests.items()), sorted(self._seconds.items())
            tokens = dict(self._tokens)
        counts = [(f'{{route="{r}",status="{status}"}}', count) for (r, status), count in requests]
        took = [(f'{{route="{route}"}}', f"{s:.6f}") for route, s in seconds]
        spent = [(f'{{kind="{kind}"}}', count) for kind, count in tokens.items()]
        lines: list[str] = []
        for name, kind, meaning, samples in (
            ("requests_total", "counter", "Requests answered.", counts),
            ("request_seconds_total", "counter", "Seconds spent on requests.", took),
            ("tokens_total", "counter", "Tokens read and written.", spent),
            ("requests_active", "gauge", "Requests under way.", [("", info.active)]),
            ("requests_waiting", "gauge", "Requests in line.", [("", info.waiting)]),
            ("model_loaded", "gauge", "1 while weights are held.", [("", int(info.loaded))]),
        ):
            whole = f"mlx_onevision_{name}"
            lines += [f"# HELP {whole} {meaning}", f"# TYPE {whole} {kind}"]
            lines += [f"{whole}{labels} {value}" for labels, value in samples]
        return "\n".join(lines) + "\n"


class Middleware:
    """Around the application: guards, and the counts.

    routes : the path of each endpoint; others are not named in the metrics, as they could fill the
        memory.
    release : called at the end of each request.

    Each request has an id, which is made here, and which its answer has as ``X-Request-Id``. At its
    end the logger ``mlx_onevision.requests`` gets a line of JSON: the id, the time, the method, the
    route (not the address itself), status and seconds. Nothing that a client has written is in it.
    """

    def __init__(
        self,
        app: ASGIApp,
        guards: Guards,
        metrics: Metrics,
        routes: Mapping[object, str],
        release: Callable[[Scope], None],
    ) -> None:
        self._release = release
        self._app, self._guards, self._metrics = app, guards, metrics
        self._routes, self._paths = routes, frozenset(routes.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no lifespan, no web sockets
        status, began, origin = 0, monotonic(), None
        id = f"req_{secrets.token_hex(8)}"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
                if origin is not None:
                    message["headers"] = [*message["headers"], *_readable_by(origin)]
            await send(message)

        app = self._app
        try:
            origin = self._guards.check_origin(scope)
            answer = None if origin is None else preflight(scope)
            if answer is None:
                self._guards.check_token(scope)
            app = answer or app
        except HTTPError as error:
            extra = {"Connection": "close"}  # what else it sends is not read
            if error.status == 401:
                extra["WWW-Authenticate"] = "Bearer"
            app = error.response(extra)
        try:
            await app(scope, receive, watched)
        except asyncio.CancelledError:
            pass  # the server ends; what runs it would write a traceback
        finally:
            self._release(scope)
            path = scope["path"]
            route = path if path in self._paths else self._routes.get(scope.get("endpoint"))
            self._metrics.add_request(route or "other", status, monotonic() - began)
            if logger.isEnabledFor(logging.INFO):
                logger.info(
                    "%s", _log_line(id, scope["method"], route, status, monotonic() - began)
                )


def log_to_stderr() -> None:
    """Writes the lines about requests, by themselves, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _log_line(id: str, method: str, route: str | None, status: int, seconds: float) -> str:
    """A request as JSON. ``status`` : 0 where the client left before there was one."""
    values = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": id,
        "method": method if method in METHODS else "other",
        "route": route or "other",
        "status": status,
        "seconds": round(seconds, 4),
    }
    return json.dumps(values)
