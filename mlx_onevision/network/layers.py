"""What the tower and the language model share: activation functions, evaluation points, matrices
that read the same input joined to one, and quantized matrices dequantized for long steps.
"""

import time
from collections.abc import Callable, Mapping
from copy import copy
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_onevision.distributed import all_sum

Activation = Callable[[mx.array], mx.array]


@partial(mx.compile, shapeless=True)
def quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


@partial(mx.compile, shapeless=True)
def relu_squared(x: mx.array) -> mx.array:
    return mx.square(mx.maximum(x, 0))


def identity(x: mx.array) -> mx.array:
    return x


# The names that a configuration may have, as the reference computes them. Each is one kernel.
ACTIVATIONS: Mapping[str, Activation] = {
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
    """A name of :data:`~mlx_onevision.network.memory_sizes.BACKENDS`."""
    if mx.default_device().type == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@cache
def on_cuda() -> bool:
    return device_kind() == "cuda"


class Pace:
    """Evaluates a step of many layers while it is being built, so that the values of no more than
    ``interval`` layers are held at once (0: leave it all to the caller).

    From an interval of 2 on it has two halves: the device computes one while the next is built, so
    that it need not wait for the host between them.

    halves : an interval of 1 has halves, too: there is an evaluation within each layer.
    """

    def __init__(self, interval: int, halves: bool = False) -> None:
        self._every = max(1, interval // 2) if interval else 0
        self._overlaps = interval > 1 or halves
        self._computing: Any = []

    def is_due(self, number: int) -> bool:
        """Whether the values of layer ``number``, counted from 1, are to be evaluated."""
        return self._every > 0 and number % self._every == 0

    def evaluate(self, *values: Any) -> None:
        mx.async_eval(*values)
        mx.eval(self._computing if self._overlaps else values)
        self._computing = values


# Matrices that read the same input, and the name of the one that they are joined to.
JOINED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
ARRAYS = ("weight", "scales", "biases", "bias")


def fuse(model: nn.Module) -> None:
    """Joins the matrices of :data:`JOINED` along their outputs, and has quantized ones dequantized
    for long steps. The modules compute the same in either form.

    Nothing is read: a joined matrix is made when it is first used, and its parts are freed then, so
    no more than one matrix is ever held twice. Parts that differ in their quantization, or that
    are no plain linear layers, stay apart: adapters are to be added, and layers split over devices,
    before.
    """
    for _, module in model.named_modules():
        for name, parts in JOINED.items():
            if all(part in module for part in parts) and _alike([module[part] for part in parts]):
                module[name] = _joined([module.pop(part) for part in parts])
    for _, module in model.named_modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = LongStepLinear


def _alike(layers: list[Any]) -> bool:
    def form(layer: Any) -> tuple[Any, ...]:
        quantization = [getattr(layer, name, None) for name in ("group_size", "bits", "mode")]
        arrays = [(name, layer[name].dtype) for name in ARRAYS if name in layer]
        return type(layer), quantization, arrays

    plain = type(layers[0]) in (nn.Linear, nn.QuantizedLinear)
    return plain and all(form(layer) == form(layers[0]) for layer in layers)


def _joined(layers: list[Any]) -> Any:
    first = layers[0]
    for name in ARRAYS:
        if name in first:
            first[name] = mx.concatenate([layer[name] for layer in layers])
    return first


class LongStepLinear(nn.QuantizedLinear):
    """A quantized layer that, for many rows, is dequantized and multiplied as a dense one, where
    this is faster. Its dense matrix is freed as soon as it has been multiplied.
    """

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if rows < STEPS[0] or rows < fewest_dense_rows(self, x.dtype):
            return super().__call__(x)
        return _dense(self, x)


def halves_of(layer: Any, x: mx.array) -> list[mx.array]:
    """The two halves of a layer's outputs. For many rows each is computed by itself: what reads
    them then reads contiguous arrays, which is twice as fast.
    """
    if x.size // x.shape[-1] < STEPS[0] or type(layer) not in (nn.Linear, LongStepLinear):
        return list(mx.split(layer(x), 2, axis=-1))
    outputs, products = layer.weight.shape[0] // 2, list[mx.array]()
    for part in (slice(outputs), slice(outputs, None)):
        half: Any = copy(layer)
        dict.update(half, {name: layer[name][part] for name in ARRAYS if name in layer})
        products.append(half(x))
    return products


# Rows for which the dense way is tried. Decode steps, of a row a request, have fewer.
STEPS = (64, 128, 256, 512, 1024, 2048)
# What is timed takes this long at least, in seconds, or is a whole matrix.
SHORTEST_TIMING = 1e-3
# By quantization and type; measured once a process.
_fewest: dict[tuple[Any, ...], float] = {}


def fewest_dense_rows(layer: nn.QuantizedLinear, dtype: mx.Dtype) -> float:
    """From how many rows on dequantizing is faster on this device, infinity if never: measured
    with this layer when the first one of its kind is used, which takes a few milliseconds.
    """
    kind = (layer.bits, layer.group_size, layer.mode, dtype, mx.default_device().type)
    if kind not in _fewest:
        _fewest[kind] = _measured(layer, dtype)
    return _fewest[kind]


def _measured(layer: nn.QuantizedLinear, dtype: mx.Dtype) -> float:
    part: Any = copy(layer)  # of the outputs: as many as are needed to time them
    part.pop("bias", None)
    width = layer.weight.shape[1] * 32 // layer.bits
    outputs, total = 64, layer.weight.shape[0]
    for rows in STEPS:
        x = mx.ones((rows, width), dtype)
        while True:
            dict.update(part, {n: layer[n][:outputs] for n in ARRAYS[:3] if n in layer})
            slow = _seconds(nn.QuantizedLinear.__call__, part, x)
            if slow >= SHORTEST_TIMING or outputs >= total:
                break
            outputs *= 4
        if _seconds(_dense, part, x) < 0.9 * slow:
            return rows
    return float("inf")


def _dense(layer: nn.QuantizedLinear, x: mx.array) -> mx.array:
    weight = mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=x.dtype,
    ).T
    return mx.addmm(layer.bias, x, weight) if "bias" in layer else x @ weight


def _seconds(multiply: Callable[..., mx.array], *given: Any) -> float:
    mx.eval(multiply(*given))
    times = []
    for _ in range(2):
        started = time.perf_counter()
        mx.eval(multiply(*given))
        times.append(time.perf_counter() - started)
    return min(times)


class AdaptedLinear(nn.Module):
    """A linear layer with a low-rank term added to its matrix, which stays as it is; its products
    with many rows are no slower than the layer's own by more than the term's.

    a, b : float32 (inputs, rank) and (rank, outputs), the term's scale within ``b``.
    lengths : with DoRA, those of the rows of the changed matrix, (outputs,).
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
        """The matrix that computes the same, (outputs, inputs), in float32."""
        weight = dense_weight(self.linear).astype(mx.float32) + (self.lora_a @ self.lora_b).T
        return weight * self.ratio[:, None] if "ratio" in self else weight


class AdaptedEmbedding(nn.Module):
    """An embedding with a low-rank term: ``a`` (rows, rank), ``b`` (rank, width)."""

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
        """The table that looks up the same, (rows, width), in float32."""
        return dense_weight(self.embedding).astype(mx.float32) + self.lora_a @ self.lora_b


def dense_weight(layer: Any) -> mx.array:
    """The matrix of a linear layer or an embedding, quantized or not."""
    if "scales" not in layer:
        return layer.weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def modules_of(model: nn.Module) -> dict[str, Any]:
    """The modules of a network by their paths, of any class: MLX does not declare them."""
    return dict(model.named_modules())


def arrays_of(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree, such as a module's parameters, by their paths with dots."""
    return dict(tree_flatten(tree))
