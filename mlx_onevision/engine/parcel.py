"""What rank 0 sends to other ranks, as bytes: the length of the JSON, the JSON, and the arrays as
they are. Not pickled: whoever reaches the port of a rank could run any program by that.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.media.anyres import Packing, VideoPacking
from mlx_onevision.prompt.processor import Inputs, Medium

PACKINGS = {"Packing": Packing, "VideoPacking": VideoPacking}
HEAD = 8  # bytes that hold the length of the JSON


def pack(value: Any) -> bytes:
    """The bytes of plain values, arrays and :class:`Inputs`, in lists.

    Raises:
        TypeError: for any other object.
    """
    arrays: list[bytes] = []
    size = 0

    def plain(value: Any) -> Any:
        nonlocal size
        if isinstance(value, np.ndarray):
            array = cast(NDArray[Any], value)
            data = array.tobytes()
            arrays.append(data)
            size += len(data)
            return {"array": [array.dtype.str, array.shape, size - len(data)]}
        if isinstance(value, Inputs):
            return {"inputs": [value.input_ids, value.media]}
        if isinstance(value, Medium):
            packing = None
            if value.packing is not None:
                packing = [type(value.packing).__name__, asdict(value.packing)]
            shown = [value.kind, value.tiles, value.size, packing, value.tokens]
            config = value.config
            pixels = [config.size, config.image_mean, config.image_std, config.rescale_factor]
            return {"medium": [*shown, pixels, value.key]}
        raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks")

    text = json.dumps(value, default=plain).encode()
    return b"".join([len(text).to_bytes(HEAD, "little"), text, *arrays])


def unpack(data: memoryview) -> Any:
    """What :func:`pack` was given, its arrays without a copy; tuples come back as lists."""
    start = HEAD + int.from_bytes(data[:HEAD], "little")

    def made(value: dict[str, Any]) -> Any:
        if "array" in value:
            dtype, shape, at = value["array"]
            return np.frombuffer(data, dtype, math.prod(shape), start + at).reshape(shape)
        if "inputs" in value:
            ids, media = value["inputs"]
            return Inputs(ids, tuple(media), "")
        if "medium" in value:
            kind, tiles, size, packing, tokens, (edge, mean, std, factor), key = value["medium"]
            return SentMedium(
                kind,
                tiles,
                size,
                None if packing is None else PACKINGS[packing[0]](**_tuples(packing[1])),
                tokens,
                ImageConfig(edge, tuple(mean), tuple(std), factor),
                sent_key=key,
            )
        return value

    return json.loads(bytes(data[HEAD:start]), object_hook=made)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the fields of a packing are tuples."""
    return {
        key: tuple(cast(list[Any], value)) if isinstance(value, list) else value
        for key, value in values.items()
    }


@dataclass(frozen=True, eq=False)
class SentMedium(Medium):
    """One whose key rank 0 has computed."""

    sent_key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.sent_key)
