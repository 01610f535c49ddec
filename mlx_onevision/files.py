"""The JSON files of a checkpoint folder."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from mlx_onevision.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises:
        CheckpointError: naming the file, when it is too large, is not JSON in UTF-8 (NaN and
            Infinity are not JSON), or does not hold an object.
    """

    def constant(name: str) -> NoReturn:
        raise ValueError(name)

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path.name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object")
    return value


def save(path: Path, text: str) -> None:
    """Writes a text file, or leaves the one that was there as it is.

    Raises:
        OSError: where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
