"""Errors as OpenAI's clients read them: one sentence, without paths and data."""

import re
from collections.abc import Mapping

from pydantic import ConfigDict, with_config
from starlette.exceptions import HTTPException
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

RETRY_AFTER_SECONDS = 1

# Matches quoted text (as Python's repr writes it), and paths, addresses and data URIs that are not
# quoted. They are redacted: a client must not learn names of files on the server.
_SECRET = re.compile(
    r"""(?<!\w) (?P<quote>['"]) (?P<quoted> (?:\\. | (?!(?P=quote))[^\\])* ) (?P=quote)
    | \b(?:[a-z][a-z0-9+.-]*://|data:)[^\s;]+
    | (?<![\w/.])/[\w.~-][^\s'",;:]*
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_PATH = re.compile(r"[/\\]|^(data|file):", re.IGNORECASE)


class ErrorFields(TypedDict):
    """A refusal's sentence, and what programs make of it."""

    message: str
    type: str
    param: str | None
    code: str


@with_config(ConfigDict(extra="allow"))  # /health has more keys
class ErrorBody(TypedDict):
    """What every refusal looks like; ``code`` is for programs, ``param`` names the field."""

    error: ErrorFields


class HTTPError(Exception):
    """A refused request. message : one sentence without a full stop. param : the field at fault."""

    def __init__(
        self, status: int, message: str, code: str = "bad_request", param: str | None = None
    ) -> None:
        super().__init__(status, message, code, param)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = RETRY_AFTER_SECONDS  # of a 429

    @property
    def body(self) -> ErrorBody:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": clipped(self.message),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        again = {"Retry-After": str(self.retry_after)} if self.status == 429 else {}
        return JSONResponse(self.body, self.status, {**again, **(headers or {})})


def to_http_error(error: PluginError) -> HTTPError:
    """The answer that a refusal of the contract is: its status, without paths."""
    code = _CODES.get(error.code, error.code)
    found = HTTPError(_STATUS[error.code], redact_paths(str(error)), code)
    found.retry_after = error.retry_after or RETRY_AFTER_SECONDS
    return found


def redact_error(error: PluginError) -> PluginError:
    """The same error without paths, addresses and data, for where the contract's own is sent."""
    return PluginError(error.code, redact_paths(error.message), redact_paths(error.hint))


def redact_paths(text: str) -> str:
    """``text`` without paths, addresses and data, and never long."""
    return clipped(_SECRET.sub(_redacted, text))


def _redacted(found: re.Match[str]) -> str:
    harmless = found["quote"] and _PATH.search(found["quoted"]) is None
    return found[0] if harmless else "…"


# What clients ask for where their address is not the one that they need, or the server another.
_HINTS = (
    (re.compile("/v1/v1/"), "the base URL ends with /v1 already; give it once"),
    (re.compile("/v1/completions$"), "this model holds conversations; ask /v1/chat/completions"),
    (
        re.compile(
            "/v1/(images|audio|files|batches|uploads|moderations|fine_tuning|assistants|threads)"
            "(/|$)"
        ),
        "this server has chat, responses, embeddings, video and files; see /openapi.json",
    ),
    (
        re.compile("/api/(chat|generate|tags|show|version)$"),
        "start serve with --ollama for it",
    ),
    (
        re.compile("/(chat/completions|completions|responses|embeddings|models)(/|$)"),
        "the address lacks /v1; the base URL is {base}v1",
    ),
)


async def not_routed(request: Request, error: Exception) -> Response:
    """Answers where no route does, with what the client may have meant."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        taken = (error.headers or {}).get("Allow", "")
        hint = f"; it takes {taken}" if taken else ""
        found = HTTPError(405, f"this address does not take {request.method[:10]}{hint}")
    else:
        path = request.url.path
        hints = (hint for pattern, hint in _HINTS if pattern.match(path))
        hint = next(hints, "").format(base=request.base_url)
        message = "there is nothing at this address" + (f"; {hint}" if hint else "")
        found = HTTPError(error.status_code, message, "not_found")
    return found.response(error.headers)
