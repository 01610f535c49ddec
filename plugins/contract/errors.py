"""Why a request was not served, as one exception with a code; standard library only."""

import errno
import logging
from typing import Any, Literal, get_args

from mlx_onevision.errors import OneVisionError, place_of

Code = Literal[
    "model_not_found",
    "unsupported_media",
    "too_large",
    "context_overflow",
    "cancelled",
    "out_of_memory",
    "busy",
    "bad_request",
    "internal",
]
"""``cancelled`` is also for a request that ran out of its time, ``internal`` for a fault of the
backend's own: nothing that the host could have asked in another way."""

CODES: tuple[Code, ...] = get_args(Code)

MAX_MESSAGE_CHARACTERS = 300  # characters of a message or a hint; more would be somebody's data

# The engine's codes that are not the contract's own.
_CODES = {"bad_model": "model_not_found"}

_HINTS: dict[Code, str] = {
    "model_not_found": "check the model's name, or choose another",
    "unsupported_media": "send an image or a video in a usual format",
    "too_large": "send something smaller",
    "context_overflow": "use fewer or smaller media or a shorter text",
    "out_of_memory": "use a smaller or quantized model, or close other programs",
    "busy": "try again in a moment",
    "internal": "the log of the backend says more",
}

logger = logging.getLogger("mlx_onevision")


class PluginError(Exception):
    """A request that was not served.

    code : for programs; one of ``CODES``.
    message : for people; one sentence without a full stop, that names the thing.
    hint : the way out, where there is one. retry_after : of a backend that is busy, seconds after
        which there is likely to be room; stays in this process.
    """

    def __init__(
        self, code: Code, message: str, hint: str = "", retry_after: int | None = None
    ) -> None:
        if code not in CODES:
            raise ValueError(f"{code!r} is not a code of this contract")
        super().__init__(code, message, hint)
        self.code: Code = code
        self.message = clipped(message)
        self.hint = clipped(hint)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def of(self, name: str) -> "PluginError":
        """The same, about one thing among several."""
        return PluginError(self.code, f"{name}: {self.message}", self.hint)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: code, message and hint."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


def bad_request(message: str, hint: str = "") -> PluginError:
    """The error of a request that cannot be served as it stands."""
    return PluginError("bad_request", message, hint)


def cancelled(message: str = "the request was cancelled") -> PluginError:
    """The error of a request that was not waited for."""
    return PluginError("cancelled", message)


def clipped(text: str) -> str:
    """``text`` on one line, its middle left out where it is long."""
    text = " ".join(text.split())
    if len(text) <= MAX_MESSAGE_CHARACTERS:
        return text
    return f"{text[: MAX_MESSAGE_CHARACTERS - 100]} … {text[-97:]}"


def to_plugin_error(error: BaseException) -> PluginError:
    """Whatever went wrong, as the one exception that a host sees.

    An error that this package does not raise itself is logged by its kind and place, and passed on
    without its text: that may hold paths, addresses, or somebody's data. The log has it, and the
    whole traceback, from the level DEBUG on.
    """
    if isinstance(error, PluginError):
        return error
    if isinstance(error, OneVisionError):
        named = _CODES.get(error.code, error.code)
        code: Code = named if named in CODES else "bad_request"
        message, _, hint = str(error).partition("; ")
        return PluginError(code, message, hint or _HINTS.get(code, ""))
    if isinstance(error, MemoryError):
        return PluginError("out_of_memory", "there is too little memory", _HINTS["out_of_memory"])
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "the disk, or the folder for temporary files, is full"
        return PluginError("out_of_memory", message, "make room, or set TMPDIR to another folder")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return PluginError("busy", "too many files are open", _HINTS["busy"])
    shown = error if logger.isEnabledFor(logging.DEBUG) else None
    logger.error(
        "a request failed: %s at %s", type(error).__name__, place_of(error), exc_info=shown
    )
    message = f"the request failed inside the backend ({type(error).__name__})"
    return PluginError("internal", message, _HINTS["internal"])
