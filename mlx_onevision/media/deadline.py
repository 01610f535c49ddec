"""One deadline over a whole download. Timeouts of sockets begin anew with every byte, so that a
host which drips could hold its client for ever: at the deadline its connections are cut.
"""

import queue
import socket
import threading
from contextlib import suppress
from time import monotonic
from typing import Any, Self


class Deadline:
    """Cuts the connections that were made within it when its time is up."""

    def __init__(self, seconds: float) -> None:
        self._until = monotonic() + seconds
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
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
        """Raises TimeoutError once the time is up; to be called at the end, too, for a connection
        that was cut looks like one that has ended.
        """
        if self.expired:
            raise TimeoutError

    def addresses(self, host: str, port: int, patience: float) -> list[str]:
        """What a host's name stands for. Raises what looking it up does, and TimeoutError after
        ``patience`` seconds.
        """
        answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:
                answers.put(error)

        # On a thread of its own: nothing else can end it before its time.
        threading.Thread(target=look_up, name="mlx-onevision-lookup", daemon=True).start()
        try:
            found = answers.get(timeout=min(patience, self.left))
        except queue.Empty:
            raise TimeoutError("timed out") from None
        if isinstance(found, Exception):
            raise found
        return [str(entry[4][0]) for entry in found]

    def connect(self, address: str, port: int, patience: float) -> socket.socket:
        """A connection to an address, made within ``patience`` seconds."""
        connected = socket.create_connection((address, port), timeout=min(patience, self.left))
        with self._lock:
            # By a descriptor of its own: TLS takes the socket's.
            self._sockets.append(connected.dup())
        return connected

    def _cut(self) -> None:
        with self._lock:
            for spare in self._sockets:
                with suppress(OSError):
                    spare.shutdown(socket.SHUT_RDWR)
