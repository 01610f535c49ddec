"""Connections: what is written goes out at once, and those on which nothing comes are closed."""

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_onevision.plugins.hosts.http.errors import HTTPFault

CLOSING = {"Connection": "close"}


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

        def send_400_response(self, msg: str) -> None:
            """In the form that every refusal has, where there is still a place for an answer."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                answer = HTTPFault(400, "this is not HTTP as it has to be").response(CLOSING)
                head = h11.Response(
                    status_code=400, headers=answer.raw_headers, reason=b"Bad Request"
                )
                for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            if self._asked():  # whoever waits for the rest of the body need not
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

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
