"""One request to a server: sent, its answer read, and cut off from any thread.

Every call has a connection of its own, so that closing it is all that cancelling takes: the server
stops working for a client that has left. Proxies and other settings of the environment are ignored,
redirects are not followed.
"""

import json
import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any

import httpx2

from mlx_onevision.plugins.contract.errors import CODES, Code, PluginError, bad_request, cancelled
from mlx_onevision.plugins.contract.wire import is_object
from mlx_onevision.plugins.service.download import parse_url

CONNECT_TIMEOUT_SECONDS = 10.0
# Seconds without a byte; in a stream the server sends one every few seconds.
READ_TIMEOUT_SECONDS = 60.0
MAX_ERROR_BYTES = 1 << 20
MAX_ANSWER_BYTES = 64 << 20  # of a JSON body or of one event

# By the names that are sent: the contract's own, and OpenAI's for what it calls otherwise.
_CODES: dict[str, Code] = {
    **{code: code for code in CODES},
    "context_length_exceeded": "context_overflow",
    "rate_limit_exceeded": "busy",
}


class Server:
    """Where a server is, with ``/v1`` or without, and the token that it asks for. Raises
    PluginError: ``bad_request``, for what is not a plain http or https address.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        where = parse_url(url)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise bad_request("the token is not printable ASCII")
        self.name = f"{where.scheme}://{where.named}"
        self._base = self.name + where.target.rstrip("/").removesuffix("/v1")
        self._headers = {"User-Agent": "mlx-onevision", "Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    @cached_property
    def client(self) -> httpx2.Client:
        """No connection is kept or shared, so that each call can be cut off by itself."""
        return httpx2.Client(
            base_url=self._base,
            headers=self._headers,
            trust_env=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )


class Call:
    """A request that can be cut off.

    read_timeout : seconds for which the server may send nothing.
    """

    def __init__(self, server: Server, *, read_timeout: float = READ_TIMEOUT_SECONDS) -> None:
        self._server = server
        self._timeout = httpx2.Timeout(read_timeout, connect=CONNECT_TIMEOUT_SECONDS)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cut = False

    def cut(self) -> None:
        """Ends it, from any thread: whoever reads or writes is woken."""
        with self._lock:
            self._cut = True
            self._shut_down()

    def ask(self, method: str, route: str, body: Any = None) -> Any:
        """The JSON that is answered. Raises PluginError: what the server refuses it with;
        ``model_not_found`` where there is no server; ``cancelled`` when it was cut off.
        """
        with self._sent(method, route, body) as response:
            try:
                return json.loads(_read(response, MAX_ANSWER_BYTES))
            except (ValueError, RecursionError):
                raise strange(f"what {self._server.name} answers is no JSON") from None

    def events(self, route: str, body: Any) -> Iterator[str]:
        """The data of each server-sent event that is answered. Where the server breaks off, they
        end: what has to come last is for the caller to know. Raises PluginError: as :meth:`ask`.
        """
        with self._sent("POST", route, body) as response:
            for event in httpx2.EventSource(response, MAX_ANSWER_BYTES):
                yield event.data

    @contextmanager
    def _sent(self, method: str, route: str, body: Any) -> Generator[httpx2.Response]:
        """A good answer, of which the head has come."""
        try:
            with self._server.client.stream(
                method, route, json=body, timeout=self._timeout, extensions={"trace": self._trace}
            ) as response:
                if not response.is_success:
                    raise refusal(response.status_code, _read(response, MAX_ERROR_BYTES))
                yield response
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._failure(error) from error
        finally:
            with self._lock:
                self._socket = None

    def _trace(self, name: str, info: dict[str, Any]) -> None:
        """Called by the connection as it goes: finds the socket, before any answer has come."""
        if name in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
                if self._cut:
                    self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)

    def _failure(self, error: Exception) -> PluginError:
        if self._cut:
            return cancelled()
        name = self._server.name
        if isinstance(error, httpx2.SSEError):
            return strange(f"what {name} answers is no stream of events")
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            message = f"there is no server at {name} ({_reason(error)})"
            hint = "start one there with mlx-onevision serve, or name another"
            return PluginError("model_not_found", message, hint)
        message = f"the connection to {name} broke off ({_reason(error)})"
        return PluginError("internal", message, "the log of the server may say more")


def _read(response: httpx2.Response, most: int) -> bytes:
    """The body, of at most ``most`` bytes."""
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > most:
            raise strange(f"the server's answer has more than {most >> 20} MB")
    return bytes(body)


def strange(message: str) -> PluginError:
    """The error of an answer that no mlx-onevision server gives."""
    return PluginError("internal", message, "check that mlx-onevision serve is what runs there")


def refusal(status: int, body: bytes) -> PluginError:
    """The error that a status and its body stand for."""
    try:
        return error_of(json.loads(body), status)
    except (ValueError, RecursionError):
        return strange(f"the server answers {status}")


def error_of(body: Any, status: int = 500) -> PluginError:
    """The error that a body of OpenAI's form holds. Raises ValueError: for one of another form."""
    error = body.get("error") if is_object(body) else None
    whole = error.get("message") if is_object(error) else None
    if not is_object(error) or not isinstance(whole, str):
        raise ValueError("no error in it")
    usual: Code = "bad_request" if status < 500 else "internal"
    message, _, hint = whole.partition("; ")
    return PluginError(_CODES.get(str(error.get("code")), usual), message, hint)


def _reason(error: BaseException) -> str:
    """What the system says, or the type of the error: its text may hold anything."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
