"""The server itself: its socket, its token, its end."""

import os
import secrets
import socket
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from mlx_onevision.plugins.errors import bad_request
from mlx_onevision.plugins.hosts.http.connections import patient
from mlx_onevision.plugins.hosts.http.settings import ServerSettings

GRACE_SECONDS = 2  # that answers under way have, when the server is told to stop
BACKLOG = 256


def listening(settings: ServerSettings, port: int) -> socket.socket:
    """The socket; port 0 is any that is free.

    Raises:
        PluginError: ``bad_request``, where that is not possible.
    """
    where = (settings.host, port)
    try:
        family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(where, family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise bad_request(
            f"cannot listen on {settings.host} port {port} ({why})", "choose another with --port"
        ) from None


def server(app: ASGIApp, settings: ServerSettings) -> uvicorn.Server:
    """What runs the application; ``run(sockets=[…])`` does, and ``should_exit`` ends it."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=patient(settings.patience),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # a request does not say who it is from
            server_header=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )


def token_file() -> Path:
    """Where a token that was made up is kept."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "mlx-onevision" / "token"


def new_token() -> str:
    """A token that nobody guesses."""
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
