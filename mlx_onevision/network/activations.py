"""The activation functions that a configuration may name, as the reference computes them."""

from collections.abc import Callable, Mapping

import mlx.core as mx
import mlx.nn as nn

Activation = Callable[[mx.array], mx.array]


def quick_gelu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(1.702 * x)


def relu_squared(x: mx.array) -> mx.array:
    return mx.square(mx.maximum(x, 0))


def identity(x: mx.array) -> mx.array:
    return x


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
