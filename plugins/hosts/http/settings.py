"""What whoever starts the server decides; no request can change it. Standard library only."""

import ipaddress
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
WILDCARDS = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class ServerSettings:
    """Address, token and limits of a server.

    host : the address that is listened on.
    names : further names that requests may call the server by.
    token : what ``Authorization: Bearer`` must hold; None for nothing.
    model : the name that the model is served under; None for the backend's own.
    max_tokens : the backend's limit for one answer.
    body, bodies : bytes of one request, and of all that are being read.
    depth, values : how deep, and how many, a request's JSON may hold.
    header_timeout : seconds that a request's head may take, and that its body may stand still.
    keep_alive_interval : seconds without an event after which a stream gets a comment.
    """

    host: str = LOOPBACK
    names: tuple[str, ...] = ()
    token: str | None = None
    model: str | None = None
    max_tokens: int | None = None
    body: int = 32 << 20
    bodies: int = 256 << 20
    depth: int = 64
    values: int = 500_000
    header_timeout: float = 15.0
    keep_alive_interval: float = 5.0

    @property
    def default_segment_tokens(self) -> int:
        """Tokens of the caption of one segment of a described video without a limit of its own."""
        return min(128, self.max_tokens or 128)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
