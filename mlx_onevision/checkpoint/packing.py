"""From the tensors of a checkpoint to those of the model that is wanted, one module at a time.

The loader that quantises and the converter take the same steps, so what they make is the same bit
for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_onevision.checkpoint.header import BITS as BITS_OF
from mlx_onevision.checkpoint.tensors import Tensor
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import CheckpointError

# safetensors' words for the types that weights may have, and MLX's.
FLOATS: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
CODES = {name: code for code, name in FLOATS.items()}

PATCHES = "vision_tower.embeddings.patch_embedding.weight"
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Piece:
    """One tensor that a step makes; ``dtype`` is safetensors' word for its type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS_OF[self.dtype] // 8


@dataclass(frozen=True)
class Step:
    """One tensor, or the two or three of a packed module, from the files to the model.

    sources : the tensors on disk; for a packed module its weight, scales and biases.
    unpack, pack : how the module is packed on disk and should be; None: not.
    dtype : MLX's name for the type of what is not packed.
    pad : rows and columns of zeros to add.
    values : how many numbers the weights stand for.
    """

    sources: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]
    dtype: str
    values: int
    unpack: ModuleQuantization | None = None
    pack: ModuleQuantization | None = None
    pad: tuple[int, int] = (0, 0)

    def run(self, take: Callable[[Tensor], mx.array]) -> list[tuple[str, mx.array]]:
        """The pieces' arrays by their canonical names, not evaluated yet."""
        arrays = [take(tensor) for tensor in self.sources]
        if self.unpack is not None:
            weight, scales, *biases = arrays
            way = self.unpack
            whole = mx.dequantize(
                weight, scales, *biases, group_size=way.group_size, bits=way.bits, mode=way.mode
            )
            arrays = [whole]
        arrays = [self._plain(array) for array in arrays]
        if any(self.pad):
            (array,) = arrays
            widths = [(0, more) for more in self.pad[: array.ndim]]
            arrays = [mx.pad(array, widths)]
        if self.pack is not None:
            arrays = list(mx.quantize(arrays[0], **dataclasses.asdict(self.pack)))
        for piece, array in zip(self.pieces, arrays, strict=True):
            if array.shape != piece.shape:
                raise CheckpointError(
                    f"MLX made {piece.name} of the shape {list(array.shape)}; "
                    f"planned was {list(piece.shape)}"
                )
        return [(piece.name, array) for piece, array in zip(self.pieces, arrays, strict=True)]

    def _plain(self, array: mx.array) -> mx.array:
        if self.pieces[0].name == PATCHES and array.shape != self.pieces[0].shape:
            array = array.transpose(0, 2, 3, 1)  # PyTorch's order to MLX's, channels last
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(getattr(mx, self.dtype))
        return array


class Files:
    """Lazy arrays of weight files. Each can be taken once, so that nothing else keeps it alive."""

    def __init__(self) -> None:
        self._open: dict[Path, dict[str, mx.array]] = {}

    def take(self, tensor: Tensor) -> mx.array:
        """A tensor's array; its file is opened now and read when the array is evaluated.

        Raises:
            CheckpointError: if the file is no longer what its header said.
        """
        if tensor.file not in self._open:
            loaded: Any = mx.load(str(tensor.file))
            self._open[tensor.file] = loaded
        array = self._open[tensor.file].pop(tensor.source)
        if array.shape != tensor.shape:
            raise CheckpointError(f"{tensor.file.name} changed while it was being opened")
        return array
