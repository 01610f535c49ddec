"""What the reference made of the pictures, recorded by reference/record_pixels.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = Path(__file__).parent / "reference" / "pixels.npz"


@cache
def recorded() -> dict[str, NDArray[Any]]:
    """Every array of the record by its name."""
    with np.load(RECORD) as arrays:
        return {name: arrays[name] for name in arrays.files}


def names(kind: str) -> list[str]:
    """The names of all arrays ``kind/…``, without the kind."""
    return [name.partition("/")[2] for name in recorded() if name.startswith(kind + "/")]
