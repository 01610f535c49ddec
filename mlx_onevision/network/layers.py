# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Building blocks of the tower and the language model: activation functions, evaluation points
within a step, matrices of the same input joined to one, quantized matrices that are dequantized for
long steps, and low-rank adapters.
"""

import time
from collections.abc import Callable, Mapping
from copy import copy
from functools import cache, partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx import utils

from mlx_onevision.distributed import all_sum

Activation = Callable[[mx.array], mx.array]


@partial(mx.compile, shapeless=True)
def quick_gelu(x: mx.array) -> mx.array:
    """GELU approximated by a sigmoid: the reference's ``QuickGELUActivation``."""
    return x * mx.sigmoid(1.702 * x)


@partial(mx.compile, shapeless=True)
def relu_squared(x: mx.array) -> mx.array:
    """The reference's ``ReLUSquaredActivation``."""
    return mx.square(mx.maximum(x, 0))


def identity(x: mx.array) -> mx.array:
    """No activation: the reference's ``LinearActivation``."""
    return x


# By the names of transformers' ACT2FN (activations.py), and with its formulas. Each is one kernel.
ACTIVATIONS: Mapping[str, Activation] = {  # pyright: ignore[reportUnknownVariableType]
    "gelu": nn.gelu,
    "gelu_python": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_python_tanh": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "gelu_accurate": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "quick_gelu": quick_gelu,
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "relu2": relu_squared,
    "relu6": nn.relu6,
    "mish": nn.mish,
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
    "linear": identity,
}


@cache
def gated(activation: Activation) -> Callable[[mx.array, mx.array], mx.array]:
    """``activation(gate) * up`` as one kernel."""
    return mx.compile(lambda gate, up: activation(gate) * up, shapeless=True)


def device_kind() -> str:
    """The device that computes, by its name in :data:`memory_sizes.BACKENDS`."""
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@cache
def on_cuda() -> bool:
    """Whether an NVIDIA GPU computes."""
    return device_kind() == "cuda"


class Pace:
    """Evaluates a step of many layers while its graph is built, so that the values of no more than
    ``interval`` layers are held at once (0: without limit, and evaluated by the caller).

    An interval of 2 or more is evaluated in two halves: the device computes one while the host
    builds the next, and need not wait for it.

    halves : whether an interval of 1 has halves, too, because there is an evaluation within each
        layer.
    """

    def __init__(self, interval: int, halves: bool = False) -> None:
        self._every = max(1, interval // 2) if interval else 0
        self._overlaps = interval > 1 or halves
        self._computing: Any = []

    def is_due(self, number: int) -> bool:
        """Whether the values of layer ``number``, counted from 1, are to be evaluated."""
        return self._every > 0 and number % self._every == 0

    def evaluate(self, *values: Any) -> None:
        """Starts computing ``values``, and waits for those of the last call, or for these where
        there are no halves.
        """
        mx.async_eval(*values)
        mx.eval(self._computing if self._overlaps else values)
        self._computing = values


# Matrices of the same input, by the name of the one that they are joined to.
JOINED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ARRAYS = ("weight", "scales", "biases", "bias")


def fuse(model: nn.Module) -> None:
    """Joins the matrices of :data:`JOINED` along their outputs, and makes quantized layers
    :class:`LongStepLinear`. The modules compute the same in either form.

    No weight is read yet: a joined matrix is made at its first use, and its parts are freed then,
    so that no more than one matrix is ever held twice. Parts that differ in their quantization, or
    are not plain linear layers, stay apart; so adapters are to be added before this, and layers
    split over devices.
    """
    for module in modules_of(model).values():
        for name, parts in JOINED.items():
            if all(part in module for part in parts) and _alike([module[part] for part in parts]):
                module[name] = _joined([module.pop(part) for part in parts])
    for module in modules_of(model).values():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = LongStepLinear


def _alike(layers: list[Any]) -> bool:
    """Whether layers are plain linear ones with arrays of the same types and quantization."""

    def form(layer: Any) -> list[Any]:
        quantization = [getattr(layer, name, None) for name in ("group_size", "bits", "mode")]
        return quantization + [(name, layer[name].dtype) for name in ARRAYS if name in layer]

    kind = layers[0].__class__
    return kind in (nn.Linear, nn.QuantizedLinear) and all(
        layer.__class__ is kind and form(layer) == form(layers[0]) for layer in layers
    )


def _joined(layers: list[Any]) -> Any:
    """The first of the layers, with the outputs of all."""
    first = layers[0]
    for name in ARRAYS:
        if name in first:
            first[name] = mx.concatenate([layer[name] for layer in layers])
    return first


class LongStepLinear(nn.QuantizedLinear):
    """A quantized layer that is dequantized for inputs of many rows, where a dense product is
    faster. The dense matrix is freed after the product.
    """

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if rows < STEPS[0] or rows < fewest_dense_rows(self, x.dtype):
            return _quantized_product(self, x)
        return _dense_product(self, x)


def halves_of(layer: Any, x: mx.array) -> list[mx.array]:
    """The two halves of a layer's outputs (..., outputs / 2). For many rows each is computed by
    itself, so that both are contiguous: elementwise operations on them are then twice as fast.
    """
    if x.size // x.shape[-1] < STEPS[0] or type(layer) not in (nn.Linear, LongStepLinear):
        return list(mx.split(layer(x), 2, axis=-1))
    outputs, products = layer.weight.shape[0] // 2, list[mx.array]()
    for part in (slice(outputs), slice(outputs, None)):
        half: Any = copy(layer)
        dict.update(half, {name: layer[name][part] for name in ARRAYS if name in layer})
        products.append(half(x))
    return products


# Rows for which dequantizing is tried. Decode steps, of one row a request, have fewer.
STEPS = (64, 128, 256, 512, 1024, 2048)
# A timed product takes this many seconds at least, or is that of a whole matrix.
SHORTEST_TIMING = 1e-3
# By quantization, type and device; measured once a process.
_fewest: dict[tuple[Any, ...], float] = {}


def fewest_dense_rows(layer: nn.QuantizedLinear, dtype: mx.Dtype) -> float:
    """The number of rows from which on dequantizing is faster on this device, infinity if never:
    measured with the first layer of its kind that is used, which takes a few milliseconds.
    """
    kind = (layer.bits, layer.group_size, layer.mode, dtype, mx.default_device().type)
    if kind not in _fewest:
        _fewest[kind] = _measured(layer, dtype)
    return _fewest[kind]


def _measured(layer: nn.QuantizedLinear, dtype: mx.Dtype) -> float:
    part: Any = copy(layer)  # a layer of only as many outputs as are needed to time it
    part.pop("bias", None)
    width = layer.weight.shape[1] * 32 // layer.bits
    outputs, total = 64, layer.weight.shape[0]
    for rows in STEPS:
        x = mx.ones((rows, width), dtype)
        while True:
            dict.update(part, {n: layer[n][:outputs] for n in ARRAYS[:3] if n in layer})
            slow = _seconds(_quantized_product, part, x)
            if slow >= SHORTEST_TIMING or outputs >= total:
                break
            outputs *= 4
        if _seconds(_dense_product, part, x) < 0.9 * slow:
            return rows
    return float("inf")


def _quantized_product(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    multiply = cast("Callable[[Any, mx.array], mx.array]", nn.QuantizedLinear.__call__)
    return multiply(layer, x)


def _dense_product(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    weight = dense_weight(layer, x.dtype).T
    return mx.addmm(layer.bias, x, weight) if "bias" in layer else x @ weight


def _seconds(multiply: Callable[..., mx.array], *given: Any) -> float:
    mx.eval(multiply(*given))
    times: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        mx.eval(multiply(*given))
        times.append(time.perf_counter() - started)
    return min(times)


class AdaptedLinear(nn.Module):
    """A linear layer with a low-rank term (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353) beside
    its matrix, which stays as it is.

    a, b : float32 (inputs, rank) and (rank, outputs); ``b`` includes the term's scale.
    lengths : of DoRA, the norms of the rows of the changed matrix, (outputs,).
    group : ranks that have the columns of the matrix, where this one has a part of them.
    """

    def __init__(
        self,
        linear: Any,
        a: mx.array,
        b: mx.array,
        lengths: mx.array | None = None,
        group: mx.distributed.Group | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.lora_a, self.lora_b = linear, a, b
        if lengths is not None:
            now = mx.linalg.norm(dense_weight(linear).astype(mx.float32) + (a @ b).T, axis=1)
            if group is not None:
                now = mx.sqrt(all_sum(mx.square(now), group))
            # Rows of zeros are padding, and stay zeros.
            self.ratio = mx.where(now == 0, 1.0, lengths / now)
            mx.eval(self.ratio)  # or the dense matrix would be held until the first use
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x) + (x @ self.lora_a) @ self.lora_b
        if "ratio" in self:
            y = y * self.ratio
            if "bias" in self.linear:
                y = y + (1 - self.ratio) * self.linear.bias
        return y.astype(x.dtype)

    def merged(self) -> mx.array:
        """The matrix that computes the same, float32 (outputs, inputs)."""
        weight = dense_weight(self.linear).astype(mx.float32) + (self.lora_a @ self.lora_b).T
        return weight * self.ratio[:, None] if "ratio" in self else weight


class AdaptedEmbedding(nn.Module):
    """An embedding with a low-rank term: ``a`` (rows, rank) and ``b`` (rank, width), which includes
    the term's scale.
    """

    def __init__(self, embedding: Any, a: mx.array, b: mx.array) -> None:
        super().__init__()
        self.embedding, self.lora_a, self.lora_b = embedding, a, b
        self.freeze()

    def __call__(self, ids: mx.array) -> mx.array:
        y = self.embedding(ids)
        return (y + self.lora_a[ids] @ self.lora_b).astype(y.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x) + (x @ self.lora_b.T) @ self.lora_a.T
        return y.astype(x.dtype)

    def merged(self) -> mx.array:
        """The table that looks up the same, float32 (rows, width)."""
        return dense_weight(self.embedding).astype(mx.float32) + self.lora_a @ self.lora_b


def dense_weight(layer: Any, dtype: mx.Dtype | None = None) -> mx.array:
    """The matrix (outputs, inputs) of a linear layer, or the table of an embedding; a quantized one
    dequantized, to ``dtype`` or to the type of its scales.
    """
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=dtype,
    )


def modules_of(model: nn.Module) -> dict[str, Any]:
    """The modules of a network by their paths, of any class: MLX does not declare them."""
    return dict(cast("list[tuple[str, Any]]", model.named_modules()))


def arrays_of(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree, such as a module's parameters, by their paths with dots."""
    return dict(utils.tree_flatten(tree))
