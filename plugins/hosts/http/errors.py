"""Errors as OpenAI's clients read them: one sentence, and nothing of anybody's in it."""

import re

from pydantic import ConfigDict, with_config
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from mlx_onevision.plugins.contract.errors import Code, PluginError, clipped

_STATUS: dict[Code, int] = {
    "bad_request": 400,
    "unsupported_media": 400,
    "context_overflow": 400,
    "too_large": 413,
    "busy": 429,
    "internal": 500,
    "model_not_found": 503,
    "out_of_memory": 503,
    "cancelled": 503,
}

# The codes that clients know by OpenAI's names.
_CODES = {"context_overflow": "context_length_exceeded", "busy": "rate_limit_exceeded"}

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

RETRY_AFTER = 1  # seconds

# What stands in quotes, as Python writes it; paths, addresses and data without any. Names of the
# server's own files are nobody's business, and what a client sent it knows.
_PLACES = re.compile(
    r"""(?<!\w) (?P<quote>['"]) (?P<quoted> (?:\\. | (?!(?P=quote))[^\\])* ) (?P=quote)
    | \b(?:[a-z][a-z0-9+.-]*://|data:)[^\s;]+
    | (?<![\w/.])/[\w.~-][^\s'",;:]*
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_A_PLACE = re.compile(r"[/\\]|^(data|file):", re.IGNORECASE)


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


@with_config(ConfigDict(extra="allow"))  # /health says more
class ErrorBody(TypedDict):
    """What every refusal looks like; ``code`` is for programs, ``param`` names the field."""

    error: ErrorFields


class HTTPError(Exception):
    """A request that is refused for what only HTTP knows of.

    status : of the answer. message : one sentence without a full stop. code : for programs.
    param : the field that is at fault, where it is one.
    """

    def __init__(
        self, status: int, message: str, code: str = "bad_request", param: str | None = None
    ) -> None:
        super().__init__(status, message, code, param)
        self.status, self.message, self.code, self.param = status, message, code, param

    def response(self, headers: dict[str, str] | None = None) -> Response:
        body = _body(self.status, self.message, self.code, self.param)
        again = {"Retry-After": str(RETRY_AFTER)} if self.status == 429 else {}
        return JSONResponse(body, self.status, {**again, **(headers or {})})


def as_fault(error: PluginError) -> HTTPError:
    """A backend's refusal, as HTTP says it."""
    return HTTPError(_STATUS[error.code], redact_paths(str(error)), code_of(error))


def refusal(error: PluginError) -> Response:
    """The whole answer to a request that the backend refused."""
    return as_fault(error).response()


def error_body(error: PluginError) -> ErrorBody:
    """The same inside a stream that has begun."""
    fault = as_fault(error)
    return _body(fault.status, fault.message, fault.code, None)


def code_of(error: PluginError) -> str:
    """The error's code, by the name that OpenAI's clients know."""
    return _CODES.get(error.code, error.code)


def redact_paths(text: str) -> str:
    """``text`` without paths, addresses and data, and never long."""
    return clipped(_PLACES.sub(_left, text))


def _left(found: re.Match[str]) -> str:
    harmless = found["quote"] and _A_PLACE.search(found["quoted"]) is None
    return found[0] if harmless else "…"


async def not_routed(request: Request, error: Exception) -> Response:
    """For what no route takes: a path that is none, a method that it does not have."""
    status = getattr(error, "status_code", 404)
    if status == 405:
        message = f"this address does not take {request.method[:10]}"
    else:
        message = "there is nothing at this address"
    headers = getattr(error, "headers", None)
    return HTTPError(status, message, "not_found" if status == 404 else "bad_request").response(
        dict(headers) if headers else None
    )


def _body(status: int, message: str, code: str, param: str | None) -> ErrorBody:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": clipped(message), "type": kind, "param": param, "code": code}}
