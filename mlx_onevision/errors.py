"""The package's errors, one class for each way out.

Every message is a single sentence that names the thing and, after a semicolon, what to do about it.
It has no full stop, so that an entry point (the command, a server), which prints the message and
nothing else, can go on after it.
"""

import traceback

LOGGED_FRAMES = 8  # of a traceback, the innermost


class OneVisionError(Exception):
    """Anything this package refuses to do. ``code`` is stable, for programs; the message is for
    people.
    """

    code = "bad_request"


class RequestError(OneVisionError):
    """A request that cannot be served as it stands (an empty prompt, a number out of range)."""


class ModelNotFoundError(OneVisionError):
    """No such model: not a folder, not on the Hub, or no network to look it up."""

    code = "model_not_found"


class CheckpointError(OneVisionError):
    """The model's folder is there but cannot be used (a missing shard, a wrong shape)."""

    code = "bad_model"


class ConfigError(CheckpointError):
    """A configuration file names something this package does not do."""


class StorageError(OneVisionError):
    """A file or a folder that cannot be written."""

    code = "storage"


class MediaError(OneVisionError):
    """An image or a video that cannot be read."""

    code = "unsupported_media"


class TooLargeError(MediaError):
    """An image or a video beyond the size limits."""

    code = "too_large"


class ContextOverflowError(OneVisionError):
    """The prompt does not fit into the model's context."""

    code = "context_overflow"


class CancelledError(OneVisionError):
    """The work was cancelled before it had a result."""

    code = "cancelled"


class DiedError(OneVisionError):
    """What runs the model has died, and with it every request; the model has to be loaded again."""

    code = "internal"


class OutOfMemoryError(OneVisionError):
    """The device has too little memory left for the request."""

    code = "out_of_memory"


class MemoryLimitError(OutOfMemoryError):
    """The request can never be answered within the memory limit, however often it is made."""

    code = "too_large"


def sentence(error: Exception) -> str:
    """What to tell a person about ``error``."""
    if isinstance(error, OneVisionError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; a smaller image, fewer --max-tokens or a smaller model needs less"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    detail = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"a defect ({detail}); please report it with what the same command prints with --debug"


def place_of(error: BaseException) -> str:
    """Where ``error`` was raised: modules and lines, outermost first.

    For logs: an error's own text may hold a prompt, a path or an address.
    """
    frames = [
        f"{frame.f_globals.get('__name__', '?')}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return " > ".join(frames[-LOGGED_FRAMES:]) or "no known place"


def short(name: str, most: int = 100) -> str:
    """A name that is safe to print: it comes from the file, which may be hostile."""
    text = name if len(name) <= most else f"{name[:most]}…"
    return text if text.isprintable() else repr(text)[1:-1]
