"""The engine's errors in the contract's words."""

import logging
from typing import TypeGuard

from mlx_onevision.errors import OneVisionError
from mlx_onevision.plugins.contract.errors import CODES, Code, PluginError

logger = logging.getLogger("mlx_onevision")

# The engine's codes that are not the contract's own.
_CODES = {"bad_model": "model_not_found"}

_HINTS: dict[Code, str] = {
    "model_not_found": "check the model's name, or choose another",
    "unsupported_media": "send a picture or a video in a usual format",
    "too_large": "send something smaller",
    "context_overflow": "use fewer or smaller media or a shorter text",
    "out_of_memory": "use a smaller or quantized model, or close other programs",
    "busy": "try again in a moment",
    "internal": "the log of the backend says more",
}


def worded(error: BaseException) -> PluginError:
    """Whatever went wrong, as the one exception that a host sees.

    What this package did not mean to raise is written to the log, and told without its text: that
    may hold paths, addresses, or somebody's data.
    """
    if isinstance(error, PluginError):
        return error
    if isinstance(error, OneVisionError):
        named = _CODES.get(error.code, error.code)
        code: Code = named if _is_code(named) else "bad_request"
        message, _, hint = str(error).partition("; ")
        return PluginError(code, message, hint or _HINTS.get(code, ""))
    if isinstance(error, MemoryError):
        return PluginError("out_of_memory", "there is too little memory", _HINTS["out_of_memory"])
    logger.error("a request failed", exc_info=error)
    return PluginError(
        "internal",
        f"the request failed inside the backend ({type(error).__name__})",
        _HINTS["internal"],
    )


def _is_code(text: str) -> TypeGuard[Code]:
    return text in CODES
