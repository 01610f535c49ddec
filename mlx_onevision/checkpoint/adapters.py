"""Adapters: what fine-tuning has changed of a model, as mlx-lm and PEFT write it.

An adapter is a folder with ``adapter_config.json`` and one weight file: low-rank terms (LoRA, DoRA)
that are added to matrices, and whole tensors that take the place of the model's. Names follow any
layout that checkpoints have. They are checked against the model from the file's header, before
anything is read.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_onevision.checkpoint.hub import check_files
from mlx_onevision.checkpoint.plan import FLOATS, LazyTensorFiles
from mlx_onevision.checkpoint.tensors import ADAPTERS, Tensor, canonical_name, read_header
from mlx_onevision.errors import CheckpointError, RequestError, short
from mlx_onevision.files import read_json
from mlx_onevision.network.layers import AdaptedEmbedding, AdaptedLinear
from mlx_onevision.network.onevision import OneVision

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = ADAPTERS
PEFT_PREFIX = "base_model.model."
HEAD, TABLE = "lm_head", "language_model.embed_tokens"

# The parts of a low-rank term by how the names of PEFT's and mlx-lm's tensors end. PEFT stores the
# transposes of mlx-lm's matrices.
PEFT_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
MLX_PARTS = {"lora_a": "a", "lora_b": "b", "m": "m"}
FINE_TUNE_TYPES = ("lora", "dora", "full")

# Settings of PEFT that change what is computed in ways that are not supported.
REFUSED = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
)
# Initial values that PEFT takes out of the base model, whose weights are then others.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class LowRank:
    """The low-rank term of a module, ``scale * a @ b``: ``a`` (inputs, rank), ``b`` (rank,
    outputs), in the file with their axes as they are or ``transposed``.

    m : DoRA's lengths of the rows of the changed matrix, (outputs,).
    summed : ``a`` is for a part of the inputs, and other ranks have the others.
    """

    a: Tensor
    b: Tensor
    m: Tensor | None
    scale: float
    transposed: bool
    summed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        first = 1 if self.transposed else 0
        return self.a.shape[first], self.b.shape[1 - first]

    @property
    def rank(self) -> int:
        return self.a.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, not yet read, by canonical names of modules and tensors.

    ties : where the embedding is the head too, what changes it changes both, as in mlx-lm; in PEFT
        it changes one of them.
    """

    folder: Path
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, Tensor]
    ties: bool

    @property
    def nbytes(self) -> int:
        """Of what is added to a model's weights; low-rank terms are computed in float32."""
        added = [t for term in self.low_rank.values() for t in (term.a, term.b, term.m) if t]
        return sum(4 * math.prod(tensor.shape) for tensor in added)


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter's files, be it beside those of a model."""
    return any((folder / name).is_file() for name in (CONFIG, *ADAPTERS))


def describe(folder: Path) -> str:
    """ " of " and the model that an adapter names as its base, or nothing."""
    try:
        values = read_json(folder / CONFIG) or {}
    except CheckpointError:
        return ""
    base = values.get("base_model_name_or_path") or values.get("model")
    return f" of {short(base)}" if isinstance(base, str) and base else ""


def about(folder: Path) -> dict[str, Any]:
    """An adapter's name and those of its settings that are numbers or words."""
    values = read_json(folder / CONFIG) or {}
    given = {**values, **(values.get("lora_parameters") or {})}
    plain = {key: v for key, v in given.items() if isinstance(v, str | int | float)}
    return {"adapter": folder.resolve().name, **plain}


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        CheckpointError: if something in it is missing, damaged or not supported.
    """
    check_files(folder)
    values = read_json(folder / CONFIG)
    if values is None:
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is not an adapter's folder")
    peft = "peft_type" in values
    file = folder / (PEFT_WEIGHTS if peft else MLX_WEIGHTS)
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {file.name}; download it again, or save the adapter as safetensors"
        )
    if (folder / "non_lora_trainables.bin").is_file():
        raise CheckpointError(
            f"{folder} keeps a part of what was trained in non_lora_trainables.bin, a pickle, "
            "which is never opened; save those tensors into the safetensors file with PEFT's "
            "modules_to_save"
        )
    (_check_peft if peft else _check_mlx)(values)
    header = read_header(file)
    parts = PEFT_PARTS if peft else MLX_PARTS
    terms: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for source, tensor in header.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{short(source)} in {file.name} is {tensor.dtype}")
        plain = source.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        ending = next((end for end in parts if plain.endswith(f".{end}")), None)
        if ending is None:
            name = canonical_name(plain)
            if name is not None:
                whole[name] = tensor
        else:
            terms.setdefault(plain.removesuffix(f".{ending}"), {})[parts[ending]] = tensor
    low_rank: dict[str, LowRank] = {}
    dora = bool(values.get("use_dora")) or values.get("fine_tune_type") == "dora"
    for path, found in terms.items():
        _check_term(path, found, dora, file)
        name = canonical_name(path)
        if name is None or canonical_name(f"{path}.weight") is None:
            continue  # of what is never computed, such as SigLIP's pooling head
        scale = _peft_scale(path, values) if peft else _number(values["lora_parameters"], "scale")
        low_rank[name] = LowRank(found["a"], found["b"], found.get("m"), scale, peft)
    if not low_rank and not whole:
        raise CheckpointError(f"{file} holds nothing that the model computes with")
    return Adapter(folder, low_rank, whole, ties=not peft)


def _check_peft(values: Mapping[str, Any]) -> None:
    if values["peft_type"] != "LORA":
        raise CheckpointError(
            f"{CONFIG}: peft_type is {values['peft_type']!r}; supported is 'LORA', with DoRA"
        )
    for key in REFUSED:
        if values.get(key):
            raise CheckpointError(f"{CONFIG}: {key} is not supported; train the adapter without it")
    initial = values.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{CONFIG}: init_lora_weights {initial!r} changes the base model; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )


def _check_mlx(values: Mapping[str, Any]) -> None:
    kind = values.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise CheckpointError(
            f"{CONFIG}: fine_tune_type is {kind!r}; supported are {', '.join(FINE_TUNE_TYPES)}"
        )
    if kind != "full" and not isinstance(values.get("lora_parameters"), Mapping):
        raise CheckpointError(
            f"{CONFIG} has neither lora_parameters, as mlx-lm's adapters, nor a peft_type; "
            "it is of another program"
        )


def _check_term(path: str, found: Mapping[str, Tensor], dora: bool, file: Path) -> None:
    """A matrix has both its factors, and with DoRA its lengths."""
    lacking = [part for part in ("a", "b", *("m" if dora else "")) if part not in found]
    if lacking:
        some = next(iter(found.values()))
        raise CheckpointError(
            f"{file.name} has {short(some.source)}, and of {short(path)} no "
            f"{'magnitude' if lacking == ['m'] else f'lora_{lacking[0].upper()}'}"
        )
    if any(len(found[part].shape) != 2 for part in "ab"):
        raise CheckpointError(
            f"{short(found['a'].source)} is no matrix; only linear layers and the embedding take "
            "adapters"
        )


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{CONFIG}: {key} must be a number, not {value!r}")
    return float(value)


def _peft_scale(path: str, values: Mapping[str, Any]) -> float:
    """alpha / rank, or with rsLoRA its square root, of a module by PEFT's name for it."""

    def pattern(patterns: Any, default: str) -> float:
        for key in patterns or {}:
            try:
                if re.match(rf"(.*\.)?({key})$", path):
                    return _number(patterns, key)
            except re.error:
                raise CheckpointError(f"{CONFIG}: {key!r} is no regular expression") from None
        return _number(values, default)

    rank = pattern(values.get("rank_pattern"), "r")
    alpha = pattern(values.get("alpha_pattern"), "lora_alpha")
    if rank < 1:
        raise CheckpointError(f"{CONFIG}: the rank of {short(path)} is {rank:g}")
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def check_fit(adapter: Adapter, model: OneVision) -> None:
    """CheckpointError, with the first tensor for which the model has no place, or of another shape.

    model : whose matrices are not joined.
    """
    modules = dict(model.named_modules())
    parameters = dict(tree_flatten(model.parameters()))
    tied = model.config.tie_word_embeddings and not adapter.ties
    table = model.language_model.get("embed_tokens") if tied else None
    for name, term in adapter.low_rank.items():
        module = modules.get(name, table if name == HEAD else None)
        if not isinstance(module, (*LINEAR, *EMBEDDING)):
            raise _misfit(adapter, term.a, "the model has no such layer")
        shape = _dims(name, module)
        if _padded(name, term.shape, shape) is None:
            raise _misfit(
                adapter, term.a, f"it is for a layer of {_sizes(term.shape)}, not {_sizes(shape)}"
            )
        if term.rank != term.b.shape[1 if term.transposed else 0]:
            raise _misfit(adapter, term.b, f"its rank is not that of {short(term.a.source)}")
        if term.m is not None and isinstance(module, EMBEDDING):
            raise _misfit(adapter, term.m, "DoRA of an embedding is not supported")
        if term.m is not None and term.m.shape != (term.shape[1],):
            raise _misfit(adapter, term.m, f"its shape is {list(term.m.shape)}")
    for name, tensor in adapter.whole.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if path == HEAD and module is None:
            module = table
        if isinstance(module, (*LINEAR, *EMBEDDING)) and leaf == "weight":
            inputs, outputs = _dims(path, module)
            wanted = (inputs, outputs) if isinstance(module, EMBEDDING) else (outputs, inputs)
            if path == HEAD:
                wanted = tuple(sorted(wanted, reverse=True))
        elif name in parameters:
            wanted = parameters[name].shape
        else:
            raise _misfit(adapter, tensor, "the model has no such tensor")
        if tensor.shape not in (wanted, _torch_order(wanted)):
            raise _misfit(
                adapter, tensor, f"its shape is {list(tensor.shape)}, the model's {list(wanted)}"
            )


def _torch_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of a convolution, whose channels are last in MLX."""
    return (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape


def _misfit(adapter: Adapter, tensor: Tensor, why: str) -> CheckpointError:
    return CheckpointError(
        f"The adapter {adapter.folder} does not fit the model: {short(tensor.source)}: {why}; "
        "give the model that it was trained on"
    )


def _sizes(shape: tuple[int, int]) -> str:
    return f"{shape[0]} inputs and {shape[1]} outputs"


def _dims(name: str, module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; of an embedding, its rows and their width. The head
    has a linear layer's even where it is the embedding.
    """
    rows, columns = module.weight.shape
    if "scales" in module:
        columns = columns * 32 // module.bits
    return (rows, columns) if isinstance(module, EMBEDDING) and name != HEAD else (columns, rows)


def _padded(name: str, shape: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int] | None:
    """The zeros to add to the inputs and outputs of a term; None where it does not fit. The tower's
    MLPs are padded where that lets them be quantized.
    """
    more = (wanted[0] - shape[0], wanted[1] - shape[1])
    grows = (name.endswith(".mlp.fc2"), name.endswith(".mlp.fc1"))
    in_tower = name.startswith("vision_tower.")
    fits = all(
        n == 0 or (in_tower and can and 0 < n < 128) for n, can in zip(more, grows, strict=True)
    )
    return more if fits else None


def apply_adapter(model: OneVision, adapter: Adapter) -> None:
    """Changes a model that the adapter fits, before its matrices are joined; nothing is read yet.
    A head that is the embedding becomes one of its own where only one of them is changed.
    """
    files = LazyTensorFiles()
    changed_names = {name.removesuffix(".weight") for name in (*adapter.low_rank, *adapter.whole)}
    if model.config.tie_word_embeddings and not adapter.ties and changed_names & {HEAD, TABLE}:
        _untie(model)
    for name, tensor in adapter.whole.items():
        _replace(model, name, files.take(tensor))
    modules = dict(model.named_modules())
    changed: list[tuple[str, nn.Module]] = []
    for name, term in adapter.low_rank.items():
        module: Any = modules[name]
        a, b, m = _factors(files, name, term, _dims(name, module))
        if isinstance(module, EMBEDDING):
            changed.append((name, AdaptedEmbedding(module, a, b)))
        else:
            group = model.group if term.summed else None
            changed.append((name, AdaptedLinear(module, a, b, m, group)))
    model.update_modules(tree_unflatten(changed))


def _factors(
    files: LazyTensorFiles, name: str, term: LowRank, dims: tuple[int, int]
) -> tuple[mx.array, mx.array, mx.array | None]:
    """``a``, ``b`` with the scale, and DoRA's lengths, for a module of so many inputs and outputs,
    padded as it is.
    """
    a, b = (files.take(tensor).astype(mx.float32) for tensor in (term.a, term.b))
    if term.transposed:
        a, b = a.T, b.T
    more = _padded(name, term.shape, dims)
    assert more is not None  # the adapter fits
    a = mx.pad(a, [(0, more[0]), (0, 0)])
    b = mx.pad(b * term.scale, [(0, 0), (0, more[1])])
    if term.m is None:
        return a, b, None
    return a, b, mx.pad(files.take(term.m).astype(mx.float32), [(0, more[1])])


def changes(adapter: Adapter, model: OneVision) -> dict[str, Callable[[mx.array], mx.array]]:
    """What makes each weight of a model that the adapter fits the one that computes the same as
    both, in float32: by the name of a module for its matrix, and of any other tensor.

    Raises RequestError where the embedding is the head and only one of them is changed.
    """
    touched = {name.removesuffix(".weight") for name in (*adapter.low_rank, *adapter.whole)}
    if model.config.tie_word_embeddings and not adapter.ties and touched & {HEAD, TABLE}:
        raise RequestError(
            f"the adapter {adapter.folder} changes only one of the embedding and the head, which "
            "are one matrix in this model; use it unfused, with --adapter"
        )
    modules = dict(model.named_modules())
    made: dict[str, Callable[[mx.array], mx.array]] = {}
    for name, tensor in adapter.whole.items():
        path, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and isinstance(modules.get(path), (*LINEAR, *EMBEDDING))
        made[name] = partial(_instead, tensor)
        if is_matrix:  # which a plan has under either name
            made[path] = made[name]
    for name, term in adapter.low_rank.items():
        table = isinstance(modules[name], EMBEDDING)
        made[name] = partial(_merged, name, term, table, made.get(name))
    return made


def _instead(tensor: Tensor, _: mx.array) -> mx.array:
    return LazyTensorFiles().take(tensor).astype(mx.float32)


def _merged(
    name: str,
    term: LowRank,
    table: bool,
    first: Callable[[mx.array], mx.array] | None,
    weight: mx.array,
) -> mx.array:
    weight = weight if first is None else first(weight)
    rows, columns = weight.shape
    dims = (rows, columns) if table else (columns, rows)
    a, b, m = _factors(LazyTensorFiles(), name, term, dims)
    layer: Any = nn.Embedding(1, 1) if table else nn.Linear(1, 1, bias=False)
    layer.weight = weight
    return (AdaptedEmbedding(layer, a, b) if table else AdaptedLinear(layer, a, b, m)).merged()


def _untie(model: OneVision) -> None:
    """Gives a model whose embedding is its head a head of its own, with the same arrays."""
    table: Any = model.language_model.embed_tokens
    head: Any
    if isinstance(table, nn.QuantizedEmbedding):
        head = nn.QuantizedLinear(64, 1, bias=False, bits=table.bits, mode=table.mode)
        head.group_size = table.group_size
    else:
        head = nn.Linear(1, 1, bias=False)
    head.update(table.parameters())
    model.lm_head = head
    model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


def _replace(model: OneVision, name: str, array: mx.array) -> None:
    """Puts a tensor in a parameter's place. A quantized module becomes one that is not."""
    path, _, leaf = name.rpartition(".")
    module: Any = dict(model.named_modules())[path]
    if array.ndim == 4 and array.shape != module[leaf].shape:
        array = array.transpose(0, 2, 3, 1)
    array = array.astype(model.dtype)
    if leaf == "weight" and "scales" in module:
        plain: Any = nn.Embedding(1, 1) if isinstance(module, EMBEDDING) else nn.Linear(1, 1, False)
        if "bias" in module:
            plain.bias = module.bias
        model.update_modules(tree_unflatten([(path, plain)]))
        module = plain
    module[leaf] = array
