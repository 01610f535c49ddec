"""The calibrated methods, and what each of them can pack."""

from typing import Literal

from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import RequestError

Method = Literal["awq", "gptq", "dwq"]
METHODS = ("awq", "gptq", "dwq")
BITS = {"awq": (2, 3, 4, 5, 6, 8), "gptq": (2, 4, 8), "dwq": (2, 3, 4, 5, 6)}


def require_packing(method: str, way: ModuleQuantization, of_table: bool = False) -> None:
    """Refuses a packing that a method does not have.

    of_table : the embedding's, or the head's, which may have any bits.

    Raises:
        RequestError: saying what it has.
    """
    if way.mode != "affine":
        raise RequestError(f"{method} packs affinely; drop the other mode, or the method")
    if not of_table and way.bits not in BITS[method]:
        raise RequestError(
            f"{method} has no {way.bits} bits; it has {', '.join(map(str, BITS[method]))}"
        )
