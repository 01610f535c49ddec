"""A request's JSON, read within bounds."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from mlx_onevision.plugins.hosts.http.faults import HTTPFault, without_places
from mlx_onevision.plugins.hosts.http.guards import too_much
from mlx_onevision.plugins.hosts.http.settings import ServerSettings

Wanted = TypeVar("Wanted", bound=BaseModel)


class Reader:
    """Reads the bodies of a server's requests, and knows how much of them it holds together."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings, self._held = settings, 0

    async def read(self, request: Request, kind: type[Wanted]) -> Wanted:
        """The body, as ``kind``.

        Raises:
            HTTPFault: 413, 408, 429, and 400 with the field's name.
            ClientDisconnect: when nobody is there any more.
        """
        data = bytearray()
        try:
            await self._fill(data, request)
            # Megabytes of base64 take a while; others are answered meanwhile.
            return await asyncio.to_thread(_parsed, data, kind, self._settings)
        finally:
            self._held -= len(data)

    async def _fill(self, data: bytearray, request: Request) -> None:
        more = True
        while more:
            try:
                message = await asyncio.wait_for(request.receive(), self._settings.patience)
            except TimeoutError:
                raise HTTPFault(408, "the body did not come; send it again") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            data += piece
            self._held += len(piece)
            if len(data) > self._settings.body:
                raise too_much(self._settings)
            if self._held > self._settings.bodies:
                raise HTTPFault(
                    429,
                    "too much is being sent by all clients together; try again in a moment",
                    "rate_limit_exceeded",
                )
            more = message.get("more_body", False)


def _parsed(data: bytearray, kind: type[Wanted], settings: ServerSettings) -> Wanted:
    values = parse(data, settings)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = _field([part for part in first["loc"] if part not in ("text", "image_url")])
        said = first["msg"].removeprefix("Value error, ").removesuffix(".")
        said = said[:1].lower() + said[1:]
        message = without_places(f"{where}: {said}" if where else said)
        raise HTTPFault(400, message, param=where or None) from None


def parse(data: bytearray, settings: ServerSettings) -> dict[str, Any]:
    """A JSON object. NaN, deep nesting and very many values are refused.

    Raises:
        HTTPFault: 400.
    """
    # Before it is parsed: every value costs far more memory than its characters.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > settings.values:
        raise HTTPFault(400, "the JSON holds too many values; send fewer in one request")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep(settings) from None
    except ValueError:
        raise HTTPFault(400, "the body is not valid JSON") from None
    _check_depth(values, settings)
    if not isinstance(values, dict):
        raise HTTPFault(400, "the body has to be a JSON object")
    return values


def _check_depth(values: Any, settings: ServerSettings) -> None:
    level = [values]
    for _ in range(settings.depth):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise _too_deep(settings)


def _too_deep(settings: ServerSettings) -> HTTPFault:
    return HTTPFault(400, f"the JSON is nested more than {settings.depth} deep")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _field(parts: list[int | str]) -> str:
    """``messages[0].content``."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part[:60]
    return text[:120]
