"""Who may speak to the server, looked at before anything of a request is read.

A web page can send requests to this machine from its visitor's browser, and with a name that it
points here (DNS rebinding) read the answers, too. So the name that a request calls the server by
has to be the server's own; a request that another page sent says so in ``Origin`` and is refused;
and no header ever allows a page to read an answer.
"""

import hmac
import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_onevision.plugins.hosts.http.errors import HTTPFault
from mlx_onevision.plugins.hosts.http.settings import WILDCARDS, ServerSettings

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
        except HTTPFault as fault:
            extra = {"Connection": "close"}  # what else it sends is not read
            if fault.status == 401:
                extra["WWW-Authenticate"] = "Bearer"
            await fault.response(extra)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, method: str, path: str, headers: dict[bytes, list[bytes]]) -> None:
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._is_named(hosts[0]):
            raise HTTPFault(421, "the Host header does not name this server", "misdirected")
        for origin in headers.get(b"origin", []):
            # Its own page may speak to it; the host that it names was checked above.
            if origin.lower() not in self._own_origins(hosts[0].lower()):
                raise HTTPFault(403, "requests from other pages are refused", "forbidden_origin")
        public = method in ("GET", "HEAD") and path in self._public
        if self._settings.token is not None and not public:
            given = headers.get(b"authorization", [])
            wanted = b"bearer " + self._settings.token.encode()
            good = len(given) == 1 and hmac.compare_digest(_lower_scheme(given[0]), wanted)
            if not good:
                raise HTTPFault(
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
