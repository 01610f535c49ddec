"""Downloads for somebody else: only from where the policy allows, and not through tricks.

Every address, the first and each that a redirect leads to, is judged by its host's name, and by
what the name stands for: it is looked up once, and the very address that was judged is connected
to. Environment variables that name a proxy are not heeded here.

One deadline holds over all of it.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from mlx_onevision.media.deadline import Deadline
from mlx_onevision.media.sources import encoded_url
from mlx_onevision.plugins.contract.errors import PluginError, bad_request

MAX_REDIRECTS = 3
READ_TIMEOUT_SECONDS = 10.0  # seconds without a byte
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
    with Deadline(DEADLINE) as deadline:
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


def _resolved(where: Address, private: bool, hint: str, deadline: Deadline) -> str:
    """The one address that is connected to, judged."""
    try:
        found = deadline.addresses(where.host, where.port, READ_TIMEOUT_SECONDS)
    except UnicodeError as error:
        raise _failed(where, _reason(error)) from None
    addresses = [address.partition("%")[0] for address in found]
    if not private:
        for address in addresses:
            if not _is_global(address):
                message = f"{where.named[:80]!r} is an address of this machine or its network"
                raise bad_request(message, hint)
    return addresses[0]


def _is_global(text: str) -> bool:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        # IPv4 addresses embedded in IPv6 are judged as IPv4.
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _is_global(str(inner))
        if address.teredo is not None or address in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return address.is_global and not address.is_multicast


def _connection(where: Address, address: str, deadline: Deadline) -> http.client.HTTPConnection:
    secure = where.scheme == "https"
    cls = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = cls(where.host, where.port, timeout=READ_TIMEOUT_SECONDS)

    def connect(*_: object, **__: object) -> socket.socket:
        return deadline.connect(address, where.port, READ_TIMEOUT_SECONDS)

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
