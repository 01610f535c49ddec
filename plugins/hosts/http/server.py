"""The server itself: its settings, socket and connections, its token, its end."""

import asyncio
import errno
import gc
import ipaddress
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from mlx_onevision.plugins.contract.errors import bad_request
from mlx_onevision.plugins.hosts.http.connections import (
    ACCEPTED_AT_A_TIME,
    Connections,
    max_connections,
)
from mlx_onevision.plugins.interface import Backend

SHUTDOWN_GRACE_SECONDS = 2  # that answers under way have, when the server is to stop
CLOSE_WAIT_SECONDS = 1.5  # that the model has then, which may be in the midst of something long
SWITCH_INTERVAL_SECONDS = 0.0005  # that a thread has the interpreter, when others want it
LISTEN_BACKLOG = 256
END_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# No browser takes an answer for something else than what it says it is.
NO_SNIFF_HEADER = ("X-Content-Type-Options", "nosniff")

LOOPBACK = "127.0.0.1"
# As browsers send it, without a path; or a scheme.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*:(//[^\s/?#@*]+)?", re.IGNORECASE)
_UNBOUNDED_ORIGINS = ("http:", "https:", "file:", "data:", "blob:")
WILDCARD_HOSTS = ("0.0.0.0", "::", "")  # noqa: S104 (compared with, not bound to)


@dataclass(frozen=True)
class ServerSettings:
    """Address, token and limits of a server.

    host : the address that is listened on.
    names : further names that requests may call the server by.
    origins : other pages that may speak to it: an origin as browsers send it, or a scheme with its
        colon for all of it. Not http, https and file as a whole, and not ``*``.
    token : what ``Authorization: Bearer`` must hold; None for nothing.
    model : the name that the model is served under; None for the backend's own.
    ollama : whether Ollama's routes are there, too.
    max_tokens : the backend's limit for one answer.
    max_body_bytes : of one request.
    max_held_bytes : of all requests that are being read, wait or are answered; further ones are
        left unread until there is room.
    max_waiting_bodies : requests that wait for that.
    max_connections : requests at once, but for those about the server's health; None for as many
        as the limit of open files leaves room for.
    max_json_depth, max_json_values : levels and values of a request's JSON.
    header_timeout : seconds that a request's head may take, that its body may stand still, and that
        a client may not take its answer.
    keep_alive_interval : seconds without an event after which a stream gets a comment.
    """

    host: str = LOOPBACK
    names: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    token: str | None = None
    model: str | None = None
    ollama: bool = False
    max_tokens: int | None = None
    max_body_bytes: int = 32 << 20
    max_held_bytes: int = 256 << 20
    max_waiting_bodies: int = 1024
    max_connections: int | None = None
    max_json_depth: int = 64
    max_json_values: int = 500_000
    header_timeout: float = 15.0
    keep_alive_interval: float = 5.0

    def __post_init__(self) -> None:
        """Raises PluginError for an origin that is none, or is everybody's."""
        for origin in self.origins:
            if _ORIGIN.fullmatch(origin) is None or origin.lower() in _UNBOUNDED_ORIGINS:
                message = f"{origin[:80]!r} is no origin that can be allowed"
                raise bad_request(message, "name one, such as app://obsidian.md or https://host:80")

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


def listening(settings: ServerSettings, port: int) -> socket.socket:
    """The socket; port 0 is any that is free. Raises PluginError: ``bad_request``, where that is
    not possible.
    """
    where = (settings.host, port)
    try:
        family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(where, family=family, backlog=LISTEN_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        message = f"cannot listen on {settings.host} port {port} ({why})"
        hint = "choose another with --port"
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            message = f"another program, maybe another serve, listens on port {port} already"
            hint = f"end it, or choose another port: --port {port + 1 if port < 65535 else 0}"
        elif number == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            message = f"{settings.host} is no address of this machine"
            hint = "leave --host out, or give 0.0.0.0 for all of its addresses"
        elif number == errno.EACCES:
            message = f"port {port} is the system's own"
            hint = "choose one from 1024 on: --port 8000"
        raise bad_request(message, hint) from None


class Server(uvicorn.Server):
    """What runs the application; ``run(sockets=[…])`` does, and ``should_exit`` ends it.

    healthy : called every second; the server ends when it returns False.
    end : ends what is under way, when it has had its time; not waited for.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        healthy: Callable[[], bool] = lambda: True,
        end: Callable[[], object] = lambda: None,
    ) -> None:
        most = settings.max_connections or max_connections()
        self._connections = Connections(most, settings.header_timeout)
        config = uvicorn.Config(
            app,
            http=self._connections.protocol(),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="error",  # not a line for each client that speaks no HTTP
            backlog=ACCEPTED_AT_A_TIME,
            access_log=False,
            proxy_headers=False,  # headers do not decide who a request is from
            server_header=False,
            headers=[NO_SNIFF_HEADER],
            # A second after ``shutdown`` has ended the requests, what is still open is given up.
            timeout_graceful_shutdown=SHUTDOWN_GRACE_SECONDS + 1,
        )
        super().__init__(config)
        self._healthy, self._end = healthy, end
        self.failed = False  # whether it ended because it was not healthy
        self.signal: int | None = None  # that ended it

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._connections.failed)
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(LISTEN_BACKLOG)  # which asyncio has set to what it accepts at a time

    async def on_tick(self, counter: int) -> bool:
        if counter % 5 == 0:
            self._connections.sweep()
        if counter % 10 == 0 and not self._healthy():
            self.failed = True
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but requests that are still waiting end with an error."""
        ending = asyncio.get_running_loop().call_later(SHUTDOWN_GRACE_SECONDS, self._end)
        await super().shutdown(sockets)
        ending.cancel()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """As uvicorn's, but does not raise the signal again: it would end the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {kind: signal.signal(kind, self.handle_exit) for kind in END_SIGNALS}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signal = sig
        super().handle_exit(sig, frame)


def tune_interpreter() -> None:
    """Keeps other threads from holding up the event loop; for a process that only serves.

    Call it when everything has been imported.
    """
    # Python's own 5 ms add up to half a second while many requests prepare images.
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # A collection that looks through all modules stops every thread for 70 ms.
    gc.collect()
    gc.freeze()


class Closing:
    """Closes a backend on a thread of its own, as that may take long. Called from one thread."""

    def __init__(self, backend: Backend) -> None:
        name = "mlx-onevision-closing"
        self._thread = threading.Thread(target=backend.close, name=name, daemon=True)

    def begin(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def done(self) -> bool:
        """Whether it has ended; waits for that, but not long."""
        self.begin()
        self._thread.join(CLOSE_WAIT_SECONDS)
        return not self._thread.is_alive()


def token_file() -> Path:
    """Where a token that was made up is kept."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "mlx-onevision" / "token"


def new_token() -> str:
    """A token that cannot be guessed: 32 random bytes, as text."""
    return secrets.token_urlsafe(32)


def keep_token(token: str, file: Path) -> None:
    """Writes the token where only its owner can read it, in the place of an older one."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(token + "\n")
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
