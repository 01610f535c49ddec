# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""KV caches of mlx-lm: room in them, and their first positions.

A cache is a list with an object for each layer, whose keys and values are (rows, heads, positions,
head_dim); quantized ones are three such arrays. mlx-lm declares no types of them, so they are Any.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx import utils

from mlx_onevision.network.layers import on_cuda
from mlx_onevision.network.memory_sizes import CACHE_STEP
from mlx_onevision.network.onevision import OneVision

# On CUDA, MLX attends to a cache of a whole number of steps through cuDNN, whose launch takes
# longer than that of its own kernel: it pays where a layer holds more than this.
LONG_LAYER_BYTES = 1 << 23


def first_positions(cache: Sequence[Any], count: int) -> list[Any]:
    """A KV cache of the first positions only; they are copied once one of both is written to."""
    return [_first_of_layer(layer, count) for layer in cache]


def _first_of_layer(layer: Any, count: int) -> Any:
    keys, values, _, *settings = layer.state

    def first(held: mx.array) -> mx.array:
        return held[..., :count, :]

    copy = type(layer)()
    copy.state = (*utils.tree_map(first, (keys, values)), count, *settings)
    return copy


def reserve(model: OneVision, cache: Sequence[Any], positions: int, spare: int = 0) -> None:
    """Makes room for so many positions now, one layer after another: grown within a step, the keys
    and values of all layers would be copied at once.

    spare : so many positions more, where the cache has to grow.
    """
    text = model.config.text_config
    keys = cache[0].keys
    if keys is not None and (keys[0] if hasattr(cache[0], "bits") else keys).shape[2] >= positions:
        return
    rows = cache[0].offset.size if isinstance(cache[0].offset, mx.array) else 1
    room = -(-(positions + spare) // CACHE_STEP) * CACHE_STEP
    position_bytes = 2 * rows * text.num_key_value_heads * text.head_dim * model.dtype.size
    if on_cuda() and room * position_bytes < LONG_LAYER_BYTES:
        room += 16  # no whole number of steps
    for layer in cache:
        held = layer.size() if isinstance(layer.offset, mx.array) else layer.offset

        def enlarged(values: mx.array, held: int = held) -> mx.array:
            more = mx.zeros((*values.shape[:2], room - held, values.shape[3]), values.dtype)
            return mx.concatenate([values[..., :held, :], more], axis=2)

        new: Any
        if layer.keys is None:
            shape = (rows, text.num_key_value_heads, room, text.head_dim)
            new = [mx.zeros(shape, model.dtype) for _ in range(2)]
            if hasattr(layer, "bits"):
                new = [mx.quantize(x, group_size=layer.group_size, bits=layer.bits) for x in new]
        else:
            new = utils.tree_map(enlarged, (layer.keys, layer.values))
        fresh, (layer.keys, layer.values) = layer.keys is None, new
        # A new layer copies nothing, so start it asynchronously; a grown layer is a copy, so wait
        # before copying the next.
        (mx.async_eval if fresh else mx.eval)(layer.keys, layer.values)


def trim_to_shortest_layer(cache: Sequence[Any]) -> None:
    """Takes back the positions that only some layers have computed."""
    shortest = min(layer.offset for layer in cache)
    for layer in cache:
        layer.trim(layer.offset - shortest)
