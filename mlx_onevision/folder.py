"""The JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from mlx_onevision.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises:
        CheckpointError: naming the file, when it is not UTF-8 or does not hold a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error}).") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} does not hold a JSON object.")
    return value
