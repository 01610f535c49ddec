"""From a folder to a model: every layout, quantised or not, its weights mapped and not yet read.

Names, shapes and dtypes are checked from the files' headers, against the model that config.json
describes, before MLX opens a file. MLX arrays belong to the thread that makes them: call this on
the thread that will run the model.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_onevision.config import DTYPES, OneVisionConfig
from mlx_onevision.defaults import GenerationDefaults
from mlx_onevision.errors import CheckpointError, ModelNotFoundError, RequestError
from mlx_onevision.folder import read_json
from mlx_onevision.header import short
from mlx_onevision.model import OneVision
from mlx_onevision.quantization import ModuleQuantization
from mlx_onevision.weights import Tensor, canonical_name, read_weights, same_bytes

# safetensors' words for the types that weights may have, and MLX's.
FLOATS: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
PACKED = {mx.uint32: "U32", mx.uint8: "U8"}

PATCHES = "vision_tower.embeddings.patch_embedding.weight"
EMBEDDING = "language_model.embed_tokens"
HEAD = "lm_head"
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder. ``config`` says of ``tie_word_embeddings`` what the weights turned out to
    be.
    """

    model: OneVision
    config: OneVisionConfig
    generation_defaults: GenerationDefaults
    path: Path


def load_checkpoint(folder: Path, dtype: str | None = None) -> Checkpoint:
    """The model of a folder in any of the published layouts.

    dtype : "float16", "bfloat16" or "float32" casts every weight that is not packed; None keeps the
        checkpoint's. One that mixes them is cast to what config.json names, or else to the type
        that most of its bytes have, so that one type runs through the network.

    Raises:
        ModelNotFoundError: if there is no such folder.
        CheckpointError: if something in it is missing, damaged or not supported.
        RequestError: for a dtype of another name.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; supported are {', '.join(DTYPES)}")
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder")
    values = read_config(folder)
    config = OneVisionConfig.from_dict(values)
    defaults = GenerationDefaults.from_dict(read_json(folder / "generation_config.json"), values)
    tensors = read_weights(folder)
    config = dataclasses.replace(
        config, tie_word_embeddings=_settle_head(tensors, config.tie_word_embeddings)
    )
    model = OneVision(config)
    _quantize(model, config, tensors)
    _check(model, tensors)
    cast = dtype or _one_dtype(tensors.values(), config.dtype)
    model.load_weights(_arrays(tensors, cast))
    _unpack_positions(model)
    model.eval()
    return Checkpoint(model, config, defaults, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, as it stands.

    Raises:
        CheckpointError: if there is none.
    """
    values = read_json(folder / "config.json")
    if values is None:
        raise CheckpointError(f"{folder} has no config.json, so it is not a model's folder")
    return values


def _settle_head(tensors: dict[str, Tensor], tied: bool) -> bool:
    """Whether the embedding is the head too. A head of its own in the files counts even where the
    configuration ties; a copy of the embedding does not, and is dropped.
    """
    if not tied:
        return False
    head = {part: tensors.get(f"{HEAD}.{part}") for part in PARTS}
    table = {part: tensors.get(f"{EMBEDDING}.{part}") for part in PARTS}
    if not any(head.values()):
        return True
    for part in PARTS:
        one, other = head[part], table[part]
        if one is not other and not (one and other and same_bytes(one, other)):
            return False
    for part in PARTS:
        tensors.pop(f"{HEAD}.{part}", None)
    return True


def _quantize(model: OneVision, config: OneVisionConfig, tensors: Mapping[str, Tensor]) -> None:
    """Turns the modules whose weights are packed in the files into MLX's quantised ones."""
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    if not packed:
        return
    if config.quantization is None:
        raise CheckpointError(
            f"{short(min(packed))} is quantized, but config.json does not say how"
        )
    ways = {canonical_name(path): way for path, way in config.quantization.modules.items()}

    def parameters(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in packed:
            return False
        way = ways.get(path, config.quantization and config.quantization.default)
        if way is None:
            raise CheckpointError(f"config.json says that {path} is not quantized, but it is")
        _require_divisible(path, module, way)
        return dataclasses.asdict(way)

    try:
        nn.quantize(model, class_predicate=parameters)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"MLX cannot read this quantization: {error}") from None


def _require_divisible(path: str, module: nn.Module, way: ModuleQuantization) -> None:
    width = module["weight"].shape[-1]
    if width % way.group_size:
        raise CheckpointError(
            f"{path} is {width} wide, which does not divide into groups of {way.group_size}"
        )


def _check(model: OneVision, tensors: Mapping[str, Tensor]) -> None:
    """Holds the files' names, shapes and dtypes against the model's."""
    wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    lacking = [name for name in wanted if name not in tensors]
    extra = [tensor.source for name, tensor in tensors.items() if name not in wanted]
    if lacking or extra:
        parts = []
        if lacking:
            parts.append(f"lack {_count(lacking)}")
        if extra:
            parts.append(f"have {_count(extra)} that the model of config.json has no place for")
        raise CheckpointError(f"The weights {', and '.join(parts)}")
    for name, parameter in wanted.items():
        tensor = tensors[name]
        shape = parameter.shape
        if name == PATCHES:
            shape = _patch_shape(tensor, parameter)
        if tensor.shape != tuple(shape):
            raise CheckpointError(
                f"{short(tensor.source)} in {tensor.file.name} has the shape {list(tensor.shape)}; "
                f"config.json asks for {list(shape)}"
            )
        allowed = [PACKED[parameter.dtype]] if parameter.dtype in PACKED else list(FLOATS)
        if tensor.dtype not in allowed:
            raise CheckpointError(
                f"{short(tensor.source)} in {tensor.file.name} is {tensor.dtype}; "
                f"it must be {' or '.join(allowed)}"
            )


def _patch_shape(tensor: Tensor, parameter: mx.array) -> tuple[int, ...]:
    """The patch convolution is (out, in, height, width) in files of PyTorch and channels last in
    MLX's; what its shape says decides.
    """
    out, height, width, channels = parameter.shape
    if height == channels:
        raise CheckpointError(
            f"{tensor.source}: at a patch size of {height} its axes cannot be told apart"
        )
    last = (out, height, width, channels)
    return last if tensor.shape == last else (out, channels, height, width)


def _one_dtype(tensors: Iterable[Tensor], named: str | None) -> str | None:
    """None where the floating-point weights already share a type."""
    count = dict.fromkeys(FLOATS, 0)
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            count[tensor.dtype] += tensor.stop - tensor.start
    if sum(map(bool, count.values())) < 2:
        return None
    return named or FLOATS[max(count, key=lambda dtype: count[dtype])]


def _arrays(tensors: Mapping[str, Tensor], cast: str | None) -> list[tuple[str, mx.array]]:
    """The tensors as lazy arrays: a file is opened here and read when a weight is first used."""
    files = {tensor.file for tensor in tensors.values()}
    loaded: dict[Path, Any] = {file: mx.load(str(file)) for file in files}
    arrays = []
    for name, tensor in tensors.items():
        array: mx.array = loaded[tensor.file][tensor.source]
        if array.shape != tensor.shape:
            raise CheckpointError(f"{tensor.file.name} changed while it was being opened")
        if name == PATCHES and tensor.shape[1] != tensor.shape[2]:
            array = array.transpose(0, 2, 3, 1)
        if cast is not None and tensor.dtype in FLOATS:
            array = array.astype(getattr(mx, cast))
        arrays.append((name, array))
    return arrays


def _unpack_positions(model: OneVision) -> None:
    """The tower adds its position table whole, so keeping that packed would gain nothing."""
    tower = model.vision_tower
    positions = tower.embeddings.position_embedding
    if isinstance(positions, nn.QuantizedEmbedding):
        plain = nn.Embedding(1, 1)
        plain.weight = positions(mx.arange(positions.num_embeddings)).astype(tower.dtype)
        tower.embeddings.position_embedding = plain


def _count(names: list[str], most: int = 3) -> str:
    """'2 tensors (a, b)', with the first few names only."""
    shown = ", ".join(short(name) for name in names[:most])
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {noun} ({shown}{', …' if len(names) > most else ''})"
