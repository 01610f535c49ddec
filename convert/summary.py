"""The result of a conversion in numbers, and sizes as a person reads them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_onevision.config.quantization import ModuleQuantization


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion makes, or would make.

    source : the Hub's id or the folder's name; ``revision`` the Hub's commit.
    nbytes : of the weights. ``values`` is how many numbers they stand for, padding left out.
    quantized : how many matrices there are of each quantization, in words.
    specs : the quantization of each quantized module, by the name that is written.
    skipped : modules that the recipe would have quantized, whose width does not divide into groups.
    padded : the width that the tower's MLPs were padded to; None if they were not.
    files : the sizes of all files that are written; of a plan, of the weights alone.
    download : bytes that are not on this machine yet; ``seconds`` : of writing and checking.
    """

    source: str
    revision: str | None
    target: Path
    recipe: str
    dtype: str
    nbytes: int
    values: int
    bits_per_weight: float
    shards: int
    quantized: dict[str, int]
    specs: dict[str, ModuleQuantization]
    skipped: tuple[str, ...]
    padded: int | None
    files: dict[str, int]
    version: str
    download: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, under the names that ``convert --json`` has."""
        values = dataclasses.asdict(self)
        for name, key in (("quantized", "packed"), ("specs", "ways"), ("skipped", "left")):
            values[key] = values.pop(name)
        return values | {"target": str(self.target), "left": list(self.skipped)}


def size(nbytes: float) -> str:
    """Bytes as a person reads them: decimal, as file browsers on a Mac count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.{1 if factor < 1e9 else 2}f} {unit}"
    return f"{nbytes:,.0f} bytes"
