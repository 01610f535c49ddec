"""Connections: what is written goes out at once, and those on which nothing comes are closed."""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol


def patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, that waits so long for a request's head, on a new connection and on one
    that is used again. Without it, whoever opens connections and says nothing keeps them.
    """

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            # asyncio does so only where the listening socket was made with the protocol's number. A
            # token would otherwise wait for the client's word that it has the one before: 40 ms.
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._timer = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            if self._timer is None and not self._asked():
                self._timer = self.loop.call_later(seconds, self._give_up)
            super().data_received(data)
            if self._asked():
                self._stop()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _asked(self) -> bool:
            """Whether a request is here, whose body and answer have their own limits."""
            return self.cycle is not None and not self.cycle.response_complete

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            self._timer = None
            if not self._asked():
                self.transport.close()

    return Patient
