"""One request to a server: sent, its answer read, and cut off from any thread; standard library
only.

Every call has a connection of its own, so that closing it is all that cancelling takes: the server
stops working for a client that has left. Environment variables that name a proxy are not heeded.
"""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from mlx_onevision.plugins.contract.errors import CODES, Code, PluginError, bad_request, cancelled
from mlx_onevision.plugins.service.download import Where, split

CONNECTING = 10.0  # seconds that a server may take to be there
SILENCE = 60.0  # seconds without a sign of life in a stream; the server gives one every few
LONGEST_ERROR = 1 << 20  # bytes
LONGEST_LINE = 64 << 20

# By the names that are sent: the contract's own, and OpenAI's for what it calls otherwise.
_CODES: dict[str, Code] = {
    **{code: code for code in CODES},
    "context_length_exceeded": "context_overflow",
    "rate_limit_exceeded": "busy",
}


@dataclass(frozen=True)
class Server:
    """Where a server is, and what opens it.

    Raises:
        PluginError: ``bad_request``, for what is not a plain http or https address.
    """

    url: str
    token: str | None = None

    def __post_init__(self) -> None:
        split(self.url)
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise bad_request("the token is not printable ASCII")

    @property
    def where(self) -> Where:
        return split(self.url)

    @property
    def named(self) -> str:
        return f"{self.where.scheme}://{self.where.named}"

    def path(self, route: str) -> str:
        """A route of the server, whether its address was given with ``/v1`` or without."""
        return self.where.target.rstrip("/").removesuffix("/v1") + route


class Call:
    """A request that can be cut off; the end of ``with`` closes it.

    silence : seconds for which the server may say nothing.
    """

    def __init__(self, server: Server, *, silence: float | None = SILENCE) -> None:
        self._server, self._silence = server, silence
        where = server.where
        secure = where.scheme == "https"
        cls = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = cls(where.host, where.port, timeout=CONNECTING)
        self._answer: http.client.HTTPResponse | None = None
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cut = False

    def cut(self) -> None:
        """Ends it, from any thread: whoever reads or writes is woken."""
        with self._lock:
            self._cut = True
            if self._socket is not None:
                with suppress(OSError):  # it has ended by itself
                    self._socket.shutdown(socket.SHUT_RDWR)

    def ask(self, method: str, route: str, body: Any = None) -> Any:
        """The JSON that is answered.

        Raises:
            PluginError: as :meth:`begin`.
        """
        self.begin(method, route, body)
        assert self._answer is not None
        try:
            return json.loads(self._answer.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error
        except ValueError:
            raise self._strange() from None

    def events(self, route: str, body: Any) -> Iterator[str]:
        """The data of each server-sent event that is answered. Where the server breaks off, they
        end: what has to come last is for the caller to know.

        Raises:
            PluginError: as :meth:`begin`.
        """
        self.begin("POST", route, body)
        assert self._answer is not None
        data: list[str] = []
        try:
            while line := self._answer.readline(LONGEST_LINE):
                text = line.decode().rstrip("\r\n")
                if text.startswith("data:"):
                    data.append(text[5:].removeprefix(" "))
                elif not text and data:
                    yield "\n".join(data)
                    data.clear()
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error
        except ValueError:
            raise self._strange() from None

    def begin(self, method: str, route: str, body: Any = None) -> None:
        """Sends it, and waits for the head of a good answer.

        Raises:
            PluginError: what the server refuses it with; ``model_not_found`` where there is no
                server; ``cancelled`` when it was cut off.
        """
        headers = {"Connection": "close", "User-Agent": "mlx-onevision"}
        if self._server.token is not None:
            headers["Authorization"] = f"Bearer {self._server.token}"
        data = None
        if body is not None:
            data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        self._connect()
        connection = self._connection
        try:
            # A server that refuses a long body does so before it has all of it.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._server.path(route), data, headers)
            self._answer = connection.getresponse()
            if not 200 <= self._answer.status < 300:
                raise refusal(self._answer.status, self._answer.read(LONGEST_ERROR))
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._socket = None
        if self._answer is not None:
            self._answer.close()
        self._connection.close()

    def _connect(self) -> None:
        try:
            self._connection.connect()
        except (OSError, http.client.HTTPException) as error:
            raise PluginError(
                "model_not_found",
                f"there is no server at {self._server.named} ({_reason(error)})",
                "start one there with mlx-onevision serve, or name another",
            ) from error
        opened: socket.socket = self._connection.sock
        opened.settimeout(self._silence)
        with self._lock:
            if self._cut:
                raise cancelled()
            self._socket = opened

    def _failure(self, error: Exception) -> PluginError:
        if self._cut:
            return cancelled()
        return PluginError(
            "internal",
            f"the connection to {self._server.named} broke off ({_reason(error)})",
            "the log of the server may say more",
        )

    def _strange(self) -> PluginError:
        return strange(f"what {self._server.named} answers is no JSON")


def strange(message: str) -> PluginError:
    """The error of an answer that no mlx-onevision server gives."""
    return PluginError("internal", message, "check that mlx-onevision serve is what runs there")


def refusal(status: int, body: bytes) -> PluginError:
    """An error's status and body, as the contract says it."""
    try:
        return error_of(json.loads(body), status)
    except (ValueError, RecursionError):
        return strange(f"the server answers {status}")


def error_of(body: Any, status: int = 500) -> PluginError:
    """The error that a body of OpenAI's form holds.

    Raises:
        ValueError: for one of another form.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        raise ValueError("no error in it")
    usual: Code = "bad_request" if status < 500 else "internal"
    message, _, hint = error["message"].partition("; ")
    return PluginError(_CODES.get(str(error.get("code")), usual), message, hint)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
