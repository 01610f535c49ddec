"""One deadline for a whole download. A socket's timeout begins anew with every byte, so that a host
that sends a byte now and then could hold its client for ever: at the deadline, its connections are
shut down.
"""

import queue
import socket
import threading
from contextlib import suppress
from time import monotonic
from typing import Any, Self


class Deadline:
    """A context; the connections that are made in it are shut down when its seconds are over."""

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
        """Seconds that are left. Raises TimeoutError where there are none."""
        self.check()
        return max(self._until - monotonic(), 0.001)

    @property
    def expired(self) -> bool:
        """Whether the time is up."""
        return monotonic() >= self._until

    def check(self) -> None:
        """Raises TimeoutError once the time is up; to be called at the end, too, since a connection
        that was shut down looks like one that has ended.
        """
        if self.expired:
            raise TimeoutError

    def addresses(self, host: str, port: int, patience: float) -> list[str]:
        """The addresses of a host. Raises what looking them up raises, and TimeoutError after
        ``patience`` seconds.
        """
        answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:
                answers.put(error)

        # On a thread of its own, because nothing can interrupt a lookup.
        threading.Thread(target=look_up, name="mlx-onevision-lookup", daemon=True).start()
        try:
            found = answers.get(timeout=min(patience, self.left))
        except queue.Empty:
            raise TimeoutError("timed out") from None
        if isinstance(found, Exception):
            raise found
        return [str(entry[4][0]) for entry in found]

    def connect(self, address: str, port: int, patience: float) -> socket.socket:
        """A connection to an address, made within ``patience`` seconds. Raises OSError."""
        connected = socket.create_connection((address, port), timeout=min(patience, self.left))
        with self._lock:
            # A duplicate, because TLS takes the socket's own descriptor.
            self._sockets.append(connected.dup())
            late = self.expired
        if late:  # the others have been shut down, and this one would be left out
            connected.close()
            raise TimeoutError("timed out")
        return connected

    def _cut(self) -> None:
        with self._lock:
            for spare in self._sockets:
                with suppress(OSError):
                    spare.shutdown(socket.SHUT_RDWR)
