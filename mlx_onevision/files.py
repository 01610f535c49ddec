"""The JSON files of a checkpoint folder."""

import json
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
