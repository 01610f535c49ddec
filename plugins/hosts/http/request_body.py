"""A request's JSON, read within bounds and checked against the fields that its route takes."""

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from mlx_onevision.plugins.contract.streams import EventStream
from mlx_onevision.plugins.contract.wire import Json, is_list, is_object
from mlx_onevision.plugins.hosts.http.connections import GONE_KEY
from mlx_onevision.plugins.hosts.http.errors import HTTPError, redact_paths
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.base import StreamingBackend

Wanted = TypeVar("Wanted", bound=BaseModel)
Converted = TypeVar("Converted")

# Where pydantic's message has Python's words.
_OBJECT_TYPES = ("dict_type", "model_type", "model_attributes_type")
_TYPE_WORDS = {**dict.fromkeys(_OBJECT_TYPES, "an object"), "list_type": "a list"}

HELD_BYTES_KEY = "mlx_onevision.held"  # in a request's scope: bytes of it that count
# Bytes of a body that have to come in each span of ``header_timeout``.
MIN_BYTES_PER_TIMEOUT = 64 << 10
SMALL_BODY_BYTES, SMALL_BODY_VALUES = (
    64 << 10,
    256,
)  # bytes and JSON values that take no longer than a change of threads
ADMISSION_INTERVAL_SECONDS = 0.05  # between two requests that are let in once there is room
MAX_EXACT_INTEGER = 2**53  # up to here a float holds every whole number
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyBudget:
    """The bytes of all requests that are read or answered. Used from the event loop alone.

    What has come counts, not what was announced: a client that sends nothing keeps no room from
    others. So more may have been let in than there is room for, and what comes beyond is refused.

    total : of these bytes. extra : that may be held besides, of requests that were let in before.
    max_waiting : requests that wait to be let in, first come first served.
    """

    def __init__(self, total: int, extra: int, max_waiting: int) -> None:
        self._free, self._extra, self._max_waiting = total, extra, max_waiting
        self._waiting: dict[asyncio.Future[None], int] = {}  # sizes, in the order of coming
        self._next: asyncio.TimerHandle | None = None  # lets in the next one

    async def enter(self, size: int, gone: asyncio.Future[None] | None = None) -> None:
        """Waits until there is room for so much. Raises HTTPError: 429, where too many do;
        ClientDisconnect: once ``gone`` is done.
        """
        if not self._waiting and size <= self._free:
            return
        if len(self._waiting) >= self._max_waiting:
            raise _too_much_at_once()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[future] = size
        try:
            either = (future,) if gone is None else (future, gone)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._waiting.pop(future, None) is not None:
                self._let_in()  # the next one may be smaller
        if not future.done():
            raise ClientDisconnect

    def take(self, size: int) -> None:
        """Counts bytes that have come. Raises HTTPError: 429, where there is no room."""
        if size > self._free + self._extra:
            raise _too_much_at_once()
        self._free -= size

    def give_back(self, size: int) -> None:
        self._free += size
        self._let_in()

    def _let_in(self) -> None:
        """Admits one request per ``ADMISSION_INTERVAL_SECONDS``, so that the bytes of the last one
        are counted before the next is admitted.
        """
        first = next(iter(self._waiting), None)
        if self._next is None and first is not None and self._waiting[first] <= self._free:
            del self._waiting[first]
            first.set_result(None)
            self._next = asyncio.get_running_loop().call_later(
                ADMISSION_INTERVAL_SECONDS, self._go_on
            )

    def _go_on(self) -> None:
        self._next = None
        self._let_in()


def _too_much_at_once() -> HTTPError:
    why = "too much is being sent by all clients together; try again in a moment"
    return HTTPError(429, why, "rate_limit_exceeded")


class BodyReader:
    """Reads the bodies of a server's requests. Their bytes count until :meth:`release`; those for
    which there is no room stay with their clients. Small ones do not count: who sends no more than
    that never waits for others.

    backend : has to have room for a request before its body is parsed, where it can say so: parsing
        what is refused anyway would hold up everybody.
    """

    def __init__(self, settings: ServerSettings, backend: Backend) -> None:
        self._settings = settings
        total = max(settings.max_held_bytes, settings.max_body_bytes)
        self._budget = BodyBudget(total, settings.max_body_bytes, settings.max_waiting_bodies)
        self._room = backend.reserved if isinstance(backend, StreamingBackend) else nullcontext
        # Megabytes of base64 take a while. Several threads would not parse them any faster.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlx-onevision-bodies")

    async def read(
        self, request: Request, kind: type[Wanted], convert: Callable[[Wanted], Converted]
    ) -> Converted:
        """The body as ``kind``, and that as what ``convert`` makes of it; both on another thread
        where they may take long. Raises HTTPError: 415, 413, 408, 429, and 400 with the field's
        name; PluginError: ``busy``, when the backend has no room for the request; ClientDisconnect:
        when nobody is there any more; what ``convert`` raises.
        """
        size = _check_head(request, self._settings)
        with self._room():  # what is refused need not wait
            pass
        if size > SMALL_BODY_BYTES:
            # The client is not asked for more meanwhile, so ``receive`` would not tell.
            await self._budget.enter(size - SMALL_BODY_BYTES, request.scope.get(GONE_KEY))
        data = await self._bytes(request, size)

        def make() -> Converted:
            return convert(_parsed(data, kind, self._settings))

        with self._room():
            if len(data) <= SMALL_BODY_BYTES and count_values(data) <= SMALL_BODY_VALUES:
                return make()
            return await asyncio.get_running_loop().run_in_executor(self._thread, make)

    def release(self, scope: Scope) -> None:
        """Once nothing of a request is held any more; nothing if that was reported before."""
        self._budget.give_back(scope.pop(HELD_BYTES_KEY, 0))

    def release_after(self, scope: Scope, streams: Sequence[EventStream[Any]]) -> None:
        """As :meth:`release`, once all of these have ended, whether the client reads on or not."""
        loop = asyncio.get_running_loop()
        left = len(streams)

        def ended() -> None:
            nonlocal left
            left -= 1
            if not left:
                self.release(scope)

        def on_end() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended)

        for stream in streams:
            stream.at_end(on_end)

    async def _bytes(self, request: Request, max_bytes: int) -> bytearray:
        data, scope = bytearray(), request.scope
        async for piece in self.pieces(request):
            data += piece
            if len(data) > max_bytes:
                raise _body_too_large(self._settings)
            held = scope.get(HELD_BYTES_KEY, 0)
            if (new := len(data) - SMALL_BODY_BYTES - held) > 0:
                self._budget.take(new)
                scope[HELD_BYTES_KEY] = held + new
        return data

    async def pieces(self, request: Request) -> AsyncGenerator[bytes]:
        """The body as it comes. Raises HTTPError: 408, where too little does; ClientDisconnect:
        when nobody is there any more.
        """
        timeout = self._settings.header_timeout
        size = window = 0  # bytes; those when the time began to run
        until = time.monotonic() + timeout
        more = True
        while more:
            try:
                left = max(0.0, until - time.monotonic())
                message = await asyncio.wait_for(request.receive(), left)
            except TimeoutError:
                raise HTTPError(408, "the body did not come; send it again") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            size += len(piece)
            if size >= window + MIN_BYTES_PER_TIMEOUT:
                window, until = size, time.monotonic() + timeout
            more = message.get("more_body", False)
            yield piece


def _check_head(request: Request, settings: ServerSettings) -> int:
    """The most bytes that the body may have. Before anything of it is read. A page of another site
    cannot send this type unasked.
    """
    if content_type(request) != "application/json":
        raise HTTPError(415, "the body has to be sent as application/json")
    check_encoding(request)
    length = announced_length(request)
    if length is not None and length > settings.max_body_bytes:
        raise _body_too_large(settings)
    return settings.max_body_bytes if length is None else length


def content_type(request: Request) -> str:
    """The media type of the body, without parameters; empty where there is none, or several."""
    kinds = request.headers.getlist("content-type")
    return kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""


def check_encoding(request: Request) -> None:
    """Raises HTTPError: 415, for a body that is compressed."""
    if request.headers.getlist("content-encoding") not in ([], ["identity"]):
        raise HTTPError(415, "the body must not be compressed")


def announced_length(request: Request) -> int | None:
    """The Content-Length of the body; None where there is none."""
    length = request.headers.get("content-length", "")
    return int(length[:16]) if length.isdecimal() else None


def _body_too_large(settings: ServerSettings) -> HTTPError:
    most = settings.max_body_bytes / 2**20
    return HTTPError(413, f"the request has more than {most:,.1f} MB; send less", "too_large")


def _parsed(data: bytearray, kind: type[Wanted], settings: ServerSettings) -> Wanted:
    values = parse(data, settings)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field, sentence = _field(first, values), _sentence(first)
        message = redact_paths(f"{field}: {sentence}" if field else sentence)
        raise HTTPError(400, message, param=field or None) from None


def parse(data: bytearray, settings: ServerSettings) -> Json:
    """A JSON object. Raises HTTPError: 400, also for NaN, deep nesting, very many values and lone
    surrogates.
    """
    # Before it is parsed: every value costs far more memory than its characters.
    if count_values(data) > settings.max_json_values:
        raise HTTPError(400, "the JSON holds too many values; send fewer in one request")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_no_constant, parse_float=_number)
        if _SURROGATE.search(data):
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise _too_deep(settings) from None
    except UnicodeEncodeError:
        message = "the JSON holds half of a surrogate pair, which is no text; send it whole"
        raise HTTPError(400, message) from None
    except ValueError:
        raise HTTPError(400, "the body is not valid JSON") from None
    _check_depth(values, settings)
    if not is_object(values):
        raise HTTPError(400, "the body has to be a JSON object")
    return values


def count_values(data: bytes | bytearray) -> int:
    """Of JSON, from its punctuation; texts may make them seem more."""
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


def _check_depth(values: Any, settings: ServerSettings) -> None:
    level: list[Any] = [values]
    for _ in range(settings.max_json_depth):
        dicts = (value.values() for value in level if is_object(value))
        lists = (value for value in level if is_list(value))
        level = list(chain.from_iterable(chain(dicts, lists)))
        if not level:
            return
    raise _too_deep(settings)


def _too_deep(settings: ServerSettings) -> HTTPError:
    return HTTPError(400, f"the JSON is nested more than {settings.max_json_depth} deep")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _number(text: str) -> float:
    """1.0 is a whole number, as in JSON Schema; 1e999 is none."""
    value = float(text)
    if math.isinf(value):
        raise HTTPError(400, "the JSON holds a number that is too large")
    return int(value) if value.is_integer() and abs(value) <= MAX_EXACT_INTEGER else value


def _sentence(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        tag, known = repr(context["tag"])[:40], context["expected_tags"]
        return f"it is {tag}; there are {known}"
    if error["type"] == "union_tag_not_found":
        return "field required"
    if error["type"] in _TYPE_WORDS:
        return f"it has to be {_TYPE_WORDS[error['type']]}"
    sentence = error["msg"].removeprefix("Value error, ").removesuffix(".")
    return sentence[:1].lower() + sentence[1:]


def _field(error: ErrorDetails, values: Any) -> str:
    """Such as ``messages[0].content``, without pydantic's names of union members."""
    text, at = "", values
    for part in error["loc"]:
        if isinstance(part, int):
            if is_list(at) and part < len(at):
                text, at = f"{text}[{part}]", at[part]
        elif is_object(at) and part in at:
            text, at = _joined(text, part), at[part]
    if error["type"] == "missing":
        text = _joined(text, str(error["loc"][-1]))
    elif error["type"].startswith("union_tag_"):
        text = _joined(text, error.get("ctx", {})["discriminator"].strip("'"))
    return text[:120]


def _joined(text: str, name: str) -> str:
    return f"{text}.{name}" if text else name[:60]
