"""What whoever starts the server decides; no request can change it. Standard library only."""

import ipaddress
from dataclasses import dataclass

LOOPBACK = "127.0.0.1"
USUAL_TOKENS, USUAL_TOLD = 1024, 128
WILDCARDS = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class ServerSettings:
    """How the server stands towards the network.

    host : the address that is listened on.
    names : further names that requests may call the server by.
    token : what ``Authorization: Bearer`` must hold; None for nothing.
    model : the name that the model is served under; None for the backend's own.
    max_tokens : of an answer, at most, where the backend's limits say so: a request that says
        nothing then asks for no more.
    places : requests for the model at once, those in line included; None leaves it to the backend.
    body : bytes of a request, at most.
    bodies : bytes of all requests that are being read, together.
    depth, values : how deep, and how many, a request's JSON may hold.
    patience : seconds that a request's head may take, and that its body may stand still.
    silence : seconds without an event after which a stream gets a comment, to be kept open.
    """

    host: str = LOOPBACK
    names: tuple[str, ...] = ()
    token: str | None = None
    model: str | None = None
    max_tokens: int | None = None
    places: int | None = None
    body: int = 32 << 20
    bodies: int = 256 << 20
    depth: int = 64
    values: int = 500_000
    patience: float = 15.0
    silence: float = 5.0

    @property
    def unsaid(self) -> int:
        """Tokens of an answer for which nothing is said."""
        return min(USUAL_TOKENS, self.max_tokens or USUAL_TOKENS)

    @property
    def told(self) -> int:
        """The same of what is told of a segment of a video."""
        return min(USUAL_TOLD, self.max_tokens or USUAL_TOLD)

    @property
    def open(self) -> bool:
        """Whether other machines can reach it."""
        return not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, for itself alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
