# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""From a folder to a model: every layout, quantized or not, its weights mapped and not yet read.

Names, shapes and dtypes are checked from the files' headers, against the model that config.json
describes, before MLX opens a file. MLX arrays belong to the thread that makes them: call this on
the thread that will run the model.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_onevision.checkpoint import adapters, manifest
from mlx_onevision.checkpoint.apply_adapter import apply_adapter, check_fit
from mlx_onevision.checkpoint.hub import check_files, not_a_model
from mlx_onevision.checkpoint.plan import (
    FLOATS,
    PARTS,
    PATCHES,
    ConversionPlan,
    LazyTensorFiles,
    make_plan,
)
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.checkpoint.sharing import (
    adapter_of_stage,
    check_ranks,
    make_stage,
    plan_of_stage,
    share,
    share_adapter,
)
from mlx_onevision.checkpoint.tensors import (
    EMBEDDING,
    HEAD,
    POST_LAYERNORM,
    Tensor,
    canonical_name,
    read_weights,
    same_bytes,
)
from mlx_onevision.config import original_layout
from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.config.model import DTYPES, OneVisionConfig
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import CheckpointError, ModelNotFoundError, RequestError, short
from mlx_onevision.files import read_json
from mlx_onevision.network.layers import arrays_of, device_kind, fuse
from mlx_onevision.network.memory_budget import MemoryModel
from mlx_onevision.network.memory_sizes import DENSE_ROWS
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.stages import Split, Stage

QUANTIZED_DTYPES = {mx.uint32: ("U32",), mx.uint8: ("U8",)}

logger = logging.getLogger("mlx_onevision")


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
    """A folder whose files have been checked against its configuration, and not yet read.

    values : config.json as it stands.
    tensors : by canonical name. ``unused`` are those of :data:`POST_LAYERNORM` that the folder has.
    quantized : how each quantized module is quantized, by canonical name.
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
    check_files(folder)
    manifest.check(folder)
    values = read_config(folder)
    config = OneVisionConfig.from_dict(original_layout.with_placeholders(values, folder))
    defaults = GenerationDefaults.from_dict(read_json(folder / "generation_config.json"), values)
    tensors = read_weights(folder, also=POST_LAYERNORM)
    unused = {name: tensors.pop(name) for name in POST_LAYERNORM if name in tensors}
    if not config.has_newline:
        tensors.pop("image_newline", None)  # left over from the checkpoint that was fine-tuned
    tied = _settle_head(tensors, config.tie_word_embeddings)
    text = replace(config.text_config, tie_word_embeddings=tied)
    config = replace(config, tie_word_embeddings=tied, text_config=text)
    quantized = _quantized_modules(config, tensors)
    network = _network(config, quantized)
    tensors = _checked(network, tensors)
    return OpenedCheckpoint(folder, values, config, defaults, tensors, unused, quantized, network)


def load_checkpoint(
    folder: Path,
    dtype: str | None = None,
    recipe: Recipe | None = None,
    fused: bool = True,
    limit: int | None = None,
    group: mx.distributed.Group | None = None,
    split: Split | None = None,
    adapter: Path | None = None,
    admit: Callable[[MemoryModel], None] = lambda _: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Checkpoint:
    """The model of a folder in any of the published layouts.

    dtype : "float16", "bfloat16" or "float32" casts every weight that is not quantized; None keeps
        the checkpoint's. One that mixes them is cast to what config.json names, or else to the type
        that most of its bytes have, so that one type runs through the network.
    recipe : quantizes the weights, tensor by tensor: the whole of them is never in memory. The same
        model, bit for bit, as the converter writes.
    fused : joins matrices for speed; without, the model's parameters have the checkpoints' names.
    limit : bytes that each rank may use, for a split by these.
    group : ranks that share the language model. Each reads its share alone, at once: see
        :mod:`sharing`.
    split : divides the layers among them instead of each layer: see :func:`stages.counts`. "auto"
        goes by their limits.
    adapter : the folder of an adapter to apply; of a group, each rank reads its part.
    admit : called with the sizes of what will be loaded before any weight is read; refuses it by
        raising.
    progress : called with the bytes that have been quantized, and all that will be.

    Raises:
        ModelNotFoundError: if there is no such folder.
        CheckpointError: if something in it is missing, damaged or not supported, and for an adapter
            that does not fit.
        RequestError: for a dtype of another name, and for quantizing a model that is quantized.
        RequestError: for a number of ranks by which the model cannot be divided.
    """
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; supported are {', '.join(DTYPES)}")
    given = None if adapter is None else adapters.read_adapter(adapter)
    if adapters.is_adapter(folder) and folder != adapter:
        logger.warning("An adapter lies in %s and is not used; --adapter %s does", folder, folder)
    opened = open_checkpoint(folder)
    plan = make_plan(opened.config, opened.tensors, opened.quantized, recipe=recipe, dtype=dtype)
    described, tied = plan.config, plan.config.tie_word_embeddings
    stage = None
    if given is not None and group is not None:
        check_fit(given, opened.network)
    if group is not None and split is not None:
        stage = make_stage(plan, group, split, limit or sys.maxsize)
        plan = plan_of_stage(plan, stage)
        given = given and adapter_of_stage(given, tied, stage)
    elif group is not None:
        check_ranks(plan, group.size())
        config, tensors = share(opened.config, opened.tensors, group.rank(), group.size())
        plan = make_plan(config, tensors, opened.quantized, recipe=recipe, dtype=dtype)
        given = given and share_adapter(given, tied, group.rank(), group.size())
    nbytes = plan.nbytes + (0 if given is None else given.nbytes)
    itemsize = 4 if plan.dtype == "float32" else 2
    sizes = MemoryModel(plan.config, nbytes, itemsize, backend=device_kind())
    # From how many rows on matrices are dequantized is measured once they are there.
    dense = replace(sizes, dense_rows=DENSE_ROWS) if plan.specs else sizes
    admit(min(sizes, dense, key=lambda one: one.shortest.total))
    whole = recipe is None and group is None
    model = opened.network if whole else _network(plan.config, plan.specs, group, stage)
    if given is not None:
        check_fit(given, model)
    model.load_weights(_weights(plan, progress))
    _unpack_positions(model)
    if given is not None:
        apply_adapter(model, given)
        described = replace(described, tie_word_embeddings=model.config.tie_word_embeddings)
    if fused:
        fuse(model)
    model.eval()
    return Checkpoint(model, described, opened.generation_defaults, folder)


def _weights(
    plan: ConversionPlan, progress: Callable[[int, int], object]
) -> list[tuple[str, mx.array]]:
    """The planned weights; those that the plan quantizes are read now, the others when used."""
    files = LazyTensorFiles()
    weights: list[tuple[str, mx.array]] = []
    quantized = [one for one in plan.transforms if one.spec is not None]
    total = sum(tensor.stop - tensor.start for one in quantized for tensor in one.sources)
    done = 0
    for transform in plan.transforms:
        arrays = transform.run(files.take)
        if transform.spec is not None:
            mx.eval([array for _, array in arrays])
            mx.clear_cache()
            done += sum(tensor.stop - tensor.start for tensor in transform.sources)
            progress(done, total)
        weights += arrays
    return weights


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, as it stands.

    Raises:
        CheckpointError: if there is none.
    """
    values = read_json(folder / "config.json")
    if values is None and adapters.is_adapter(folder):
        config = None
        with suppress(CheckpointError):
            config = read_json(folder / adapters.CONFIG)
        raise CheckpointError(not_a_model(folder, config or {}))
    if values is None:
        raise CheckpointError(f"{folder} has no config.json, so it is not a model's folder")
    return values


def _settle_head(tensors: dict[str, Tensor], tied: bool) -> bool:
    """Whether the embedding is the head too. A head of its own in the files counts even where the
    configuration ties; a copy of the embedding does not, and is dropped.
    """
    if not tied:
        return False
    pairs = [(tensors.get(f"{HEAD}.{p}"), tensors.get(f"{EMBEDDING}.{p}")) for p in PARTS]
    if not any(head for head, _ in pairs):
        return True
    for head, table in pairs:
        if head is not table and not (head and table and same_bytes(head, table)):
            return False
    for part in PARTS:
        tensors.pop(f"{HEAD}.{part}", None)
    return True


def _quantized_modules(
    config: OneVisionConfig, tensors: Mapping[str, Tensor]
) -> dict[str, ModuleQuantization]:
    """How the modules are quantized that are so in the files, as config.json says."""
    paths = sorted(name.removesuffix(".scales") for name in tensors if name.endswith(".scales"))
    if config.quantization is None:
        if paths:
            raise CheckpointError(
                f"{short(paths[0])} is quantized, but config.json does not say how"
            )
        return {}
    specs = dict.fromkeys(paths, config.quantization.default)
    for path, spec in config.quantization.modules.items():
        name = canonical_name(path)
        if name not in specs:
            continue
        if spec is None:
            raise CheckpointError(f"config.json says that {name} is not quantized, but it is")
        specs[name] = spec
    return specs


def _network(
    config: OneVisionConfig,
    specs: Mapping[str, ModuleQuantization],
    group: mx.distributed.Group | None = None,
    stage: Stage | None = None,
) -> OneVision:
    """A model whose modules of ``specs`` are MLX's quantized ones."""
    model = OneVision(config, group, stage)

    def parameters(path: str, module: Any) -> bool | dict[str, Any]:
        if path not in specs:
            return False
        width, group_size = module["weight"].shape[-1], specs[path].group_size
        if width % group_size:
            raise CheckpointError(
                f"{path} is {width} wide, which does not divide into groups of {group_size}"
            )
        return dataclasses.asdict(specs[path])

    if specs:
        try:
            nn.quantize(model, class_predicate=parameters)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"MLX cannot read this quantization: {error}") from None
    return model


def _checked(model: OneVision, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model, their names, shapes and dtypes held against it. Others are left
    out, as in the reference, but for those of its modules: they would change what these compute.
    """
    wanted = arrays_of(model.parameters())
    lacking = [name for name in wanted if name not in tensors]
    extra = [tensor for name, tensor in tensors.items() if name not in wanted]
    modules = {name.rpartition(".")[0] for name in wanted} - {""}
    second = [t.source for t in extra if any(part in modules for part in _above(t.name))]
    if lacking or second:
        parts: list[str] = []
        if lacking:
            parts.append(f"lack {_count(lacking)}")
        if second or extra:
            sources = second or [tensor.source for tensor in extra]
            parts.append(f"have {_count(sources)} that the model of config.json has no place for")
        raise CheckpointError(f"The weights {', and '.join(parts)}")
    if extra:
        names = _count([tensor.source for tensor in extra])
        logger.warning("the weights have %s that the model does not use", names)
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
        allowed = QUANTIZED_DTYPES.get(parameter.dtype, tuple(FLOATS))
        if tensor.dtype not in allowed:
            raise CheckpointError(
                f"{short(tensor.source)} in {tensor.file.name} is {tensor.dtype}; "
                f"it must be {' or '.join(allowed)}"
            )
    return {name: tensors[name] for name in tensors if name in wanted}


def _above(name: str) -> Iterator[str]:
    """The modules that a tensor of this name would be in."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))


def _patch_shape(tensor: Tensor, parameter: mx.array) -> tuple[int, ...]:
    """The patch convolution is (out, in, height, width) in files of PyTorch and channels last in
    MLX's; what its shape says decides.
    """
    out, height, width, channels = parameter.shape
    if height == channels:
        raise CheckpointError(
            f"{tensor.source}: at a patch size of {height} the order of its axes is ambiguous"
        )
    last = (out, height, width, channels)
    return last if tensor.shape == last else (out, channels, height, width)


def _unpack_positions(model: OneVision) -> None:
    """The tower adds its position table whole, so keeping it quantized would gain nothing."""
    if "vision_tower" not in model:
        return
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
