"""From a folder to a model: every layout, quantised or not, its weights mapped and not yet read.

Names, shapes and dtypes are checked from the files' headers, against the model that config.json
describes, before MLX opens a file. MLX arrays belong to the thread that makes them: call this on
the thread that will run the model.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint import manifest
from mlx_onevision.checkpoint.plan import FLOATS, PARTS, PATCHES, LazyTensorFiles, make_plan
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.checkpoint.tensors import NORM, Tensor, canonical_name, read_weights, same_bytes
from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.config.model import DTYPES, OneVisionConfig
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import CheckpointError, ModelNotFoundError, RequestError, short
from mlx_onevision.files import read_json
from mlx_onevision.network.onevision import OneVision

QUANTIZED_DTYPES = {mx.uint32: "U32", mx.uint8: "U8"}

EMBEDDING = "language_model.embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded folder. ``config`` says of ``tie_word_embeddings`` what the weights turned out to
    be.
    """

    model: OneVision
    config: OneVisionConfig
    generation_defaults: GenerationDefaults
    path: Path


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A folder whose files have been held against its configuration, and not yet read.

    tensors : by canonical name. ``unused`` are those of :data:`NORM` that the folder has.
    packed : how each packed module is packed, by canonical name.
    network : the model that they fit, with weights of no meaning.
    """

    folder: Path
    values: Mapping[str, Any]
    config: OneVisionConfig
    generation_defaults: GenerationDefaults
    tensors: Mapping[str, Tensor]
    unused: Mapping[str, Tensor]
    quantized: Mapping[str, ModuleQuantization]
    network: OneVision


def open_checkpoint(folder: Path) -> OpenedCheckpoint:
    """What is in a folder of any of the published layouts.

    Raises:
        ModelNotFoundError: if there is no such folder.
        CheckpointError: if something in it is missing, damaged or not supported.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder")
    manifest.check(folder)
    values = read_config(folder)
    config = OneVisionConfig.from_dict(values)
    defaults = GenerationDefaults.from_dict(read_json(folder / "generation_config.json"), values)
    tensors = read_weights(folder, also=NORM)
    unused = {name: tensors.pop(name) for name in NORM if name in tensors}
    config = dataclasses.replace(
        config, tie_word_embeddings=_settle_head(tensors, config.tie_word_embeddings)
    )
    quantized = _quantized_modules(config, tensors)
    network = _network(config, quantized)
    _check(network, tensors)
    return OpenedCheckpoint(folder, values, config, defaults, tensors, unused, quantized, network)


def load_checkpoint(
    folder: Path, dtype: str | None = None, recipe: Recipe | None = None
) -> Checkpoint:
    """The model of a folder in any of the published layouts.

    dtype : "float16", "bfloat16" or "float32" casts every weight that is not packed; None keeps the
        checkpoint's. One that mixes them is cast to what config.json names, or else to the type
        that most of its bytes have, so that one type runs through the network.
    recipe : packs the weights, tensor by tensor: the whole of them is never in memory. The same
        model, bit for bit, as the converter writes.

    Raises:
        ModelNotFoundError: if there is no such folder.
        CheckpointError: if something in it is missing, damaged or not supported.
        RequestError: for a dtype of another name, and for packing a model that is packed.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; supported are {', '.join(DTYPES)}")
    opened = open_checkpoint(folder)
    plan = make_plan(opened.config, opened.tensors, opened.quantized, recipe=recipe, dtype=dtype)
    model = opened.network if recipe is None else _network(plan.config, plan.specs)
    files, weights = LazyTensorFiles(), []
    for transform in plan.transforms:
        arrays = transform.run(files.take)
        if transform.spec is not None:
            mx.eval([array for _, array in arrays])
            mx.clear_cache()
        weights += arrays
    model.load_weights(weights)
    _unpack_positions(model)
    model.eval()
    return Checkpoint(model, plan.config, opened.generation_defaults, folder)


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


def _quantized_modules(
    config: OneVisionConfig, tensors: Mapping[str, Tensor]
) -> dict[str, ModuleQuantization]:
    """How the modules are packed that are so in the files, as config.json says."""
    quantized = sorted(name.removesuffix(".scales") for name in tensors if name.endswith(".scales"))
    if quantized and config.quantization is None:
        raise CheckpointError(
            f"{short(quantized[0])} is quantized, but config.json does not say how"
        )
    found = {}
    for path in quantized:
        assert config.quantization is not None
        found[path] = config.quantization.default
    if config.quantization is not None:
        for path, spec in config.quantization.modules.items():
            name = canonical_name(path)
            if name not in found:
                continue
            if spec is None:
                raise CheckpointError(f"config.json says that {name} is not quantized, but it is")
            found[name] = spec
    return found


def _network(config: OneVisionConfig, quantized: Mapping[str, ModuleQuantization]) -> OneVision:
    """A model whose modules of ``quantized`` are MLX's quantised ones."""
    model = OneVision(config)

    def parameters(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in quantized:
            return False
        _require_divisible(path, module, quantized[path])
        return dataclasses.asdict(quantized[path])

    if quantized:
        try:
            nn.quantize(model, class_predicate=parameters)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"MLX cannot read this quantization: {error}") from None
    return model


def _require_divisible(path: str, module: nn.Module, spec: ModuleQuantization) -> None:
    width = module["weight"].shape[-1]
    if width % spec.group_size:
        raise CheckpointError(
            f"{path} is {width} wide, which does not divide into groups of {spec.group_size}"
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
        allowed = (
            [QUANTIZED_DTYPES[parameter.dtype]]
            if parameter.dtype in QUANTIZED_DTYPES
            else list(FLOATS)
        )
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
