"""How many requests for the model there are at once. The one after the last is refused as soon as
it has been read, and before anything is made of it: in a crowd, looking into what is refused anyway
would hold up everybody.
"""

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_onevision.plugins.contract.errors import PluginError

_KEY = "mlx_onevision.place"


class Places:
    """Around the application.

    most : None for as many as the backend takes.
    """

    def __init__(self, app: ASGIApp, most: int | None) -> None:
        self._app, self._most = app, most
        self._taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = scope[_KEY] = _Place(self)

        async def watched(message: Message) -> None:
            # Before the client hears of the end: it may ask again at once.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                place.leave()
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            place.leave()

    def take(self) -> None:
        if self._most is not None and self._taken >= self._most:
            raise PluginError(
                "busy", f"{self._taken} requests are under way or wait", "try again in a moment"
            )
        self._taken += 1

    def leave(self) -> None:
        self._taken -= 1


class _Place:
    """One request's, until its answer has been sent or nobody waits for it."""

    def __init__(self, places: Places) -> None:
        self._places, self._taken = places, False

    def take(self) -> None:
        self._places.take()
        self._taken = True

    def leave(self) -> None:
        if self._taken:
            self._taken = False
            self._places.leave()


def take(request: Request) -> None:
    """A place for a request. Raises PluginError ``busy`` when there is none."""
    place: _Place = request.scope[_KEY]
    place.take()
