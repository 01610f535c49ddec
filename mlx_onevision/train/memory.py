"""How much memory a training step will take, before it is taken."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_onevision.engine.memory import working_set
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.train.data import Example
from mlx_onevision.train.loop import Settings
from mlx_onevision.train.step import CHUNK, QUERIES


def predicted_bytes(model: OneVision, settings: Settings, examples: Sequence[Example]) -> int:
    """The peak of a step of the longest rows: weights, gradients and AdamW's two averages of what
    is trained, what enters each layer, one layer's own values, its attention and a chunk of logits.
    """
    text = model.config.text_config
    size = model.dtype.size
    held = _bytes(model.parameters()) + 3 * _bytes(model.trainable_parameters())
    lengths = sorted((len(example.ids) for example in examples), reverse=True)
    rows, length = min(settings.batch, len(lengths)), lengths[0]
    positions = rows * length
    entered = (text.num_hidden_layers + 2) * positions * text.hidden_size * size
    # Forward values and their gradients; in float32 where low-rank terms are added.
    layer = positions * (6 * text.hidden_size + 6 * text.intermediate_size) * 4
    # Of one group of queries, with their gradients, in float32 where they are soft-maxed.
    scores = 4 * rows * text.num_attention_heads * min(QUERIES, length) * length * 4
    counted = max(example.tokens for example in examples) * rows
    logits = 3 * min(CHUNK, counted) * text.vocab_size * 4
    tiles = rows * max(sum(medium.tiles for medium in example.media) for example in examples)
    # What the projector makes of the tiles, before they are packed, and its gradients.
    tower = 3 * tiles * model.config.tokens_per_tile * text.hidden_size * size
    if tree_flatten(model.vision_tower.trainable_parameters()):
        tower += _tower_bytes(model, tiles)
    return held + entered + tower + max(layer + scores, logits)


def _tower_bytes(model: OneVision, tiles: int) -> int:
    """The same of the tower's layers, where it is trained."""
    vision, size = model.config.vision_config, model.vision_tower.dtype.size
    patches = vision.patches_per_side**2
    entered = (vision.num_hidden_layers + 2) * tiles * patches * vision.hidden_size * size
    layer = tiles * patches * 6 * (vision.hidden_size + vision.intermediate_size) * 4
    scores = 2 * tiles * vision.num_attention_heads * patches**2 * size
    return entered + layer + scores


def _bytes(parameters: Any) -> int:
    leaves: dict[str, mx.array] = dict(tree_flatten(parameters))
    return sum(leaf.nbytes for leaf in leaves.values())


def admit(needed: int, limit: float | None) -> None:
    """OutOfMemoryError where a step will not fit. ``limit`` : GB, instead of the device's."""
    usable = working_set() if limit is None else int(limit * 1e9)
    if needed > usable:
        raise OutOfMemoryError(
            f"a step takes about {needed / 1e9:.1f} GB, and there are {usable / 1e9:.1f} GB; train "
            "with a smaller --batch, --rank or --visual-tokens, or a quantized model"
        )
