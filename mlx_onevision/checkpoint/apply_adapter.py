# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""An adapter on a model: whether it fits, the model with its terms beside its matrices, and the
weights with its terms merged into them.

mlx.nn declares no types of a network's modules, so they are Any here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_onevision.checkpoint.adapters import Adapter, LowRank
from mlx_onevision.checkpoint.plan import LazyTensorFiles
from mlx_onevision.checkpoint.tensors import EMBEDDING, HEAD, Tensor
from mlx_onevision.errors import CheckpointError, RequestError, short
from mlx_onevision.network.layers import AdaptedEmbedding, AdaptedLinear, arrays_of, modules_of
from mlx_onevision.network.onevision import OneVision

LINEARS = (nn.Linear, nn.QuantizedLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
MOST_PADDING = 128  # the widest group of values that is quantized together


def check_fit(adapter: Adapter, model: OneVision) -> None:
    """Checks that a model whose matrices are not joined has a place for every tensor.

    Raises:
        CheckpointError: naming the first tensor for which it has none, or one of another shape.
    """
    modules = modules_of(model)
    parameters = arrays_of(model.parameters())
    untied_here = model.config.tie_word_embeddings and not adapter.ties
    table = modules.get(EMBEDDING) if untied_here else None  # which is the head, too
    for name, term in adapter.low_rank.items():
        module = modules.get(name, table if name == HEAD else None)
        if not isinstance(module, (*LINEARS, *EMBEDDINGS)):
            raise _misfit(adapter, term.a, "the model has no such layer")
        shape = _dims(name, module)
        if _padded(name, term.shape, shape) is None:
            raise _misfit(
                adapter, term.a, f"it is for a layer of {_sizes(term.shape)}, not {_sizes(shape)}"
            )
        if term.rank != term.b.shape[1 if term.transposed else 0]:
            raise _misfit(adapter, term.b, f"its rank is not that of {short(term.a.source)}")
        if term.m is not None and isinstance(module, EMBEDDINGS):
            raise _misfit(adapter, term.m, "DoRA of an embedding is not supported")
        if term.m is not None and term.m.shape != (term.shape[1],):
            raise _misfit(adapter, term.m, f"its shape is {list(term.m.shape)}")
    for name, tensor in adapter.whole.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if path == HEAD and module is None:
            module = table
        if isinstance(module, (*LINEARS, *EMBEDDINGS)) and leaf == "weight":
            inputs, outputs = _dims(path, module)
            wanted = (inputs, outputs) if isinstance(module, EMBEDDINGS) else (outputs, inputs)
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
    return (rows, columns) if isinstance(module, EMBEDDINGS) and name != HEAD else (columns, rows)


def _padded(name: str, shape: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int] | None:
    """How many zeros to add to the inputs and outputs of a term; None where it does not fit. The
    tower's MLPs are wider than in the checkpoint where that lets them be quantized.
    """
    more = (wanted[0] - shape[0], wanted[1] - shape[1])
    grows = (name.endswith(".mlp.fc2"), name.endswith(".mlp.fc1"))
    in_tower = name.startswith("vision_tower.")
    fits = all(
        n == 0 or (in_tower and can and 0 < n < MOST_PADDING)
        for n, can in zip(more, grows, strict=True)
    )
    return more if fits else None


def apply_adapter(model: OneVision, adapter: Adapter) -> None:
    """Changes a model that the adapter fits, before its matrices are joined; nothing is read yet.
    A head that is the embedding becomes one of its own where only one of them is changed.
    """
    files = LazyTensorFiles()
    if _unties(adapter, model):
        _untie(model)
    for name, tensor in adapter.whole.items():
        _replace(model, name, files.take(tensor))
    modules = modules_of(model)
    changed: list[tuple[str, nn.Module]] = []
    for name, term in adapter.low_rank.items():
        module = modules[name]
        a, b, m = _factors(files, name, term, _dims(name, module))
        if isinstance(module, EMBEDDINGS):
            changed.append((name, AdaptedEmbedding(module, a, b)))
        else:
            group = model.group if term.summed else None
            changed.append((name, AdaptedLinear(module, a, b, m, group)))
    model.update_modules(tree_unflatten(changed))


def _factors(
    files: LazyTensorFiles, name: str, term: LowRank, dims: tuple[int, int]
) -> tuple[mx.array, mx.array, mx.array | None]:
    """``a`` (inputs, rank), ``b`` (rank, outputs) with the scale in it, and DoRA's magnitudes
    (outputs,), float32, for a module of so many inputs and outputs (``dims``), padded as it is.
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
    """Functions that make of each weight that the adapter changes the one with the adapter merged
    into it, in float32: by the name of a module for its matrix, and of any other tensor.

    Raises:
        RequestError: where the embedding is the head and only one of them is changed.
    """
    if _unties(adapter, model):
        raise RequestError(
            f"the adapter {adapter.folder} changes only one of the embedding and the head, which "
            "are one matrix in this model; use it unfused, with --adapter"
        )
    modules = modules_of(model)
    made: dict[str, Callable[[mx.array], mx.array]] = {}
    for name, tensor in adapter.whole.items():
        path, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and isinstance(modules.get(path), (*LINEARS, *EMBEDDINGS))
        made[name] = partial(_instead, tensor)
        if is_matrix:  # which a plan has under either name
            made[path] = made[name]
    for name, term in adapter.low_rank.items():
        is_embedding = isinstance(modules[name], EMBEDDINGS)
        made[name] = partial(_merged, name, term, is_embedding, made.get(name))
    return made


def _unties(adapter: Adapter, model: OneVision) -> bool:
    """Whether the embedding is the head, and the adapter changes one of them alone."""
    changed = {name.removesuffix(".weight") for name in (*adapter.low_rank, *adapter.whole)}
    tied = model.config.tie_word_embeddings and not adapter.ties
    return tied and not changed.isdisjoint((HEAD, EMBEDDING))


def _instead(tensor: Tensor, _: mx.array) -> mx.array:
    return LazyTensorFiles().take(tensor).astype(mx.float32)


def _merged(
    name: str,
    term: LowRank,
    is_embedding: bool,
    first: Callable[[mx.array], mx.array] | None,
    weight: mx.array,
) -> mx.array:
    """A weight, which ``first`` replaces where the adapter has a whole one, with a term added."""
    weight = weight if first is None else first(weight)
    rows, columns = weight.shape
    dims = (rows, columns) if is_embedding else (columns, rows)
    a, b, m = _factors(LazyTensorFiles(), name, term, dims)
    layer: Any = nn.Embedding(1, 1) if is_embedding else nn.Linear(1, 1, bias=False)
    layer.weight = weight
    adapted = AdaptedEmbedding(layer, a, b) if is_embedding else AdaptedLinear(layer, a, b, m)
    return adapted.merged()


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
    module = modules_of(model)[path]
    if array.ndim == 4 and array.shape != module[leaf].shape:
        array = array.transpose(0, 2, 3, 1)
    array = array.astype(model.dtype)
    if leaf == "weight" and "scales" in module:
        is_embedding = isinstance(module, EMBEDDINGS)
        plain: Any = nn.Embedding(1, 1) if is_embedding else nn.Linear(1, 1, bias=False)
        if "bias" in module:
            plain.bias = module.bias
        model.update_modules(tree_unflatten([(path, plain)]))
        module = plain
    module[leaf] = array
