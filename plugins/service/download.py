"""Downloads for somebody else: only from where the policy allows, and not through tricks.

Every address, the first and each that a redirect leads to, is judged by its host's name, and by
what the name stands for: it is looked up once, and the very address that was judged is connected
to. Environment variables that name a proxy are not heeded here.

One deadline holds over all of it. Timeouts of sockets begin anew with every byte, so that a host
which drips could hold a request for ever: at the deadline the connection is cut from outside.
"""

import http.client
import ipaddress
import queue
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

from mlx_onevision.media.sources import encoded_url
from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.streams import background

MAX_REDIRECTS = 3
READ_TIMEOUT = 10.0  # seconds without a byte
DEADLINE = 60.0  # seconds for all of it
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """The parts of an http(s) address that a request is made of."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def named(self) -> str:
        """The host, with its port where it is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> Address:
    """``url`` in its parts. Raises PluginError: ``bad_request``, for what is not a plain http or
    https address.
    """
    shown = ascii(url if len(url) <= 80 else url[:77] + "…")
    bad = bad_request(f"{shown} is not an address that is read", "give an http or https one")
    if not url.isprintable() or "\\" in url:
        raise bad
    try:
        url = encoded_url(url)
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise bad from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc:
        raise bad
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(
        parts.scheme, parts.hostname.rstrip("."), port or DEFAULT_PORTS[parts.scheme], target
    )


def download(
    url: str, allowed: Callable[[str], None], *, most: int, private: bool = False, hint: str = ""
) -> bytes:
    """What is behind an address, of at most ``most`` bytes.

    allowed : raises for an address whose host is not.
    private : whether hosts may be on this machine or in its network. hint : the way out where not.

    Raises PluginError: what ``allowed`` raises; ``bad_request`` for a private address;
    ``unsupported_media`` when nothing comes; ``too_large``.
    """
    with _Deadline(DEADLINE) as deadline:
        for _ in range(MAX_REDIRECTS + 1):
            allowed(url)
            where = parse_url(url)
            try:
                connection = _connection(where, _resolved(where, private, hint, deadline), deadline)
                with closing(connection):
                    connection.request("GET", where.target, headers={"User-Agent": "mlx-onevision"})
                    with connection.getresponse() as answer:
                        if answer.status in (301, 302, 303, 307, 308):
                            url = urljoin(url, answer.getheader("Location") or "")
                            continue
                        if answer.status != 200:
                            raise _failed(where, f"it answers {answer.status}")
                        body = _body(answer, where, most)
                deadline.check()  # a connection that was cut looks like one that has ended
                return body
            except (OSError, http.client.HTTPException, ValueError) as error:
                late = f"it was not done after {DEADLINE:.0f} seconds"
                why = late if deadline.expired else _reason(error)
                raise _failed(where, why) from error
        raise _failed(parse_url(url), f"it redirects more than {MAX_REDIRECTS} times")


class _Deadline:
    """Cuts the connections that were made within it when its time is up."""

    def __init__(self, seconds: float) -> None:
        self._until = monotonic() + seconds
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        background.start()
        self._timer = background.call_later(seconds, self._cut)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for spare in self._sockets:
                spare.close()
            self._sockets.clear()

    @property
    def left(self) -> float:
        """Seconds. Raises TimeoutError where there are none."""
        self.check()
        return max(self._until - monotonic(), 0.001)

    @property
    def expired(self) -> bool:
        return monotonic() >= self._until

    def check(self) -> None:
        if self.expired:
            raise TimeoutError

    def watch(self, connected: socket.socket) -> None:
        """By a descriptor of its own: TLS takes the socket's."""
        with self._lock:
            self._sockets.append(connected.dup())

    def _cut(self) -> None:
        with self._lock:
            for spare in self._sockets:
                with suppress(OSError):
                    spare.shutdown(socket.SHUT_RDWR)


def _resolved(where: Address, private: bool, hint: str, deadline: _Deadline) -> str:
    """The one address that is connected to, judged."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM))
        except Exception as error:
            answers.put(error)

    # On a thread of its own: nothing else can end it before its time.
    threading.Thread(target=look_up, name="mlx-onevision-lookup", daemon=True).start()
    try:
        found = answers.get(timeout=min(READ_TIMEOUT, deadline.left))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, UnicodeError):
        raise _failed(where, _reason(found)) from None
    if isinstance(found, Exception):
        raise found
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not private:
        for address in addresses:
            if not _is_global(address):
                message = f"{where.named[:80]!r} is an address of this machine or its network"
                raise bad_request(message, hint)
    return addresses[0]


def _is_global(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        # An IPv4 address in another dress is judged as what it is.
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _is_global(str(inner))
        if address.teredo is not None or address in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return address.is_global and not address.is_multicast


def _connection(where: Address, address: str, deadline: _Deadline) -> http.client.HTTPConnection:
    secure = where.scheme == "https"
    cls = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = cls(where.host, where.port, timeout=READ_TIMEOUT)

    def connect(*_: object, **__: object) -> socket.socket:
        soon = min(READ_TIMEOUT, deadline.left)
        connected = socket.create_connection((address, where.port), timeout=soon)
        deadline.watch(connected)
        return connected

    # The hook that http.client itself opens sockets by; names and certificates stay the host's.
    connection._create_connection = connect  # pyright: ignore
    return connection


def _body(answer: http.client.HTTPResponse, where: Address, most: int) -> bytes:
    message = f"what {where.named[:80]!r} sends has more than {most / 2**20:,.1f} MB"
    too_large = PluginError("too_large", message, "send something smaller")
    promised = int(answer.getheader("Content-Length") or 0)
    if promised > most:
        raise too_large
    body = bytearray()
    while chunk := answer.read1(1 << 16):
        body += chunk
        if len(body) > most:
            raise too_large
    if len(body) < promised:
        raise ConnectionError(0, "it broke off")
    return bytes(body)


def _failed(where: Address, why: str) -> PluginError:
    return PluginError("unsupported_media", f"cannot read from {where.named[:80]!r}: {why}")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"its certificate or encryption is not good ({error.reason or 'unknown'})"
    return getattr(error, "strerror", None) or type(error).__name__
