# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""The loss of a batch of rows and its gradients, in little memory.

Layers are computed again in the backward pass, so that only what enters each is held. Logits are
made at the positions that carry loss alone, and a chunk of them at a time. How much a step will
take is predicted before it is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx import utils
from mlx.nn import utils as nn_utils
from numpy.typing import NDArray

from mlx_onevision.media.anyres import VideoPacking
from mlx_onevision.network.attention import Mask, RotaryEmbedding
from mlx_onevision.network.language import Attention, DecoderLayer
from mlx_onevision.network.layers import arrays_of
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.packing import normalize, pool_frames
from mlx_onevision.prompt.processor import Medium
from mlx_onevision.train.data import Example, MediumShape

CHUNK = 512  # positions whose logits are held at once
QUERIES = 1024  # positions whose attention scores are

# What the network needs of a medium: the tower's features (tiles, patches, width), or its pixels
# where the tower is trained, too.
Source = mx.array | Medium


@dataclass(frozen=True)
class Batch:
    """Rows that are computed at once, padded on their right: no row sees padding, which comes after
    it. ``sources`` : of each row's media, in order. ``seed`` : of what dropout leaves out.
    """

    rows: Sequence[Example]
    sources: Sequence[Sequence[Source]]
    seed: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(row.tokens for row in self.rows)


def loss_and_gradients(model: OneVision, batches: Sequence[Batch]) -> tuple[float, dict[str, Any]]:
    """The mean loss of the tokens of all batches, in nats, and its gradients as a tree like that of
    the trained parameters; one batch is held at a time.
    """
    total = sum(batch.tokens for batch in batches)
    parameters = cast(dict[str, Any], model.trainable_parameters())

    def mean_loss(batch: Batch) -> mx.array:
        return loss_sum(model, batch) / total

    compute = cast(Callable[[Batch], Any], nn.value_and_grad(model, mean_loss))
    loss = 0.0
    gradients: Any = None
    for batch in batches:
        value, found = compute(batch)
        gradients = found if gradients is None else utils.tree_map(mx.add, gradients, found)
        # Their values are the same, but they hold the graph of what was computed.
        model.update(parameters)
        mx.eval(value, gradients)
        loss += number(value)
    return loss, gradients


def number(value: mx.array) -> float:
    """The value of an array that holds one."""
    return float(np.array(value, np.float32))


def loss_sum(model: OneVision, batch: Batch) -> mx.array:
    """The sum of the negative log-likelihoods of the tokens that carry loss."""
    positions, targets = _targets(batch)
    draw = Random(batch.seed)  # noqa: S311 - for dropout
    mx.random.seed(draw.getrandbits(63))
    hidden = _hidden(model, _embeddings(model, batch, draw), draw)
    h = hidden.reshape(-1, hidden.shape[-1])[positions]
    h = model.language_model.norm(h)
    head: Any = model.language_model.embed_tokens
    logits: Callable[[mx.array], mx.array] = head.as_linear
    if not model.config.tie_word_embeddings:
        head = logits = model.lm_head
    parameters = head.trainable_parameters()

    @mx.checkpoint
    def chunk_loss(given: Any, h: mx.array, targets: mx.array) -> mx.array:
        head.update(given)
        scores = logits(h).astype(mx.float32)
        fixed = mx.stop_gradient(targets)
        return nn.losses.cross_entropy(scores, fixed, reduction="sum")

    total = mx.array(0.0)
    for first in range(0, len(targets), CHUNK):
        part = slice(first, first + CHUNK)
        total = total + chunk_loss(parameters, h[part], targets[part])
    head.update(parameters)
    return total


def _targets(batch: Batch) -> tuple[mx.array, mx.array]:
    """Where in the batch, flattened, the hidden states are from which tokens with loss are
    predicted, and these tokens.
    """
    length = max(len(row.ids) for row in batch.rows)
    positions: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    for number, row in enumerate(batch.rows):
        (places,) = np.nonzero(row.learned)
        positions.append(number * length + places - 1)
        targets.append(row.ids[places])
    return mx.array(np.concatenate(positions)), mx.array(np.concatenate(targets))


def _embeddings(model: OneVision, batch: Batch, draw: Random) -> mx.array:
    length = max(len(row.ids) for row in batch.rows)
    rows: list[mx.array] = []
    for row, sources in zip(batch.rows, batch.sources, strict=True):
        parts: list[mx.array] = []
        place = 0
        placeholders = np.isin(
            row.ids, [model.config.image_token_index, model.config.video_token_index]
        )
        media = iter(zip(row.media, sources, strict=True))
        while place < len(row.ids):
            if placeholders[place]:
                shape, source = next(media)
                parts.append(_medium(model, shape, source, draw))
                place += shape.tokens
                continue
            rest = np.flatnonzero(placeholders[place:])
            stop = place + int(rest[0]) if len(rest) else len(row.ids)
            text = model.language_model.embed_tokens(mx.array(row.ids[place:stop]))
            parts.append(text.astype(model.dtype))
            place = stop
        rows.append(mx.pad(mx.concatenate(parts), [(0, length - len(row.ids)), (0, 0)]))
    return mx.stack(rows)


def _medium(model: OneVision, shape: MediumShape, source: Source, draw: Random) -> mx.array:
    features = source if isinstance(source, mx.array) else tower_features(model, source, draw)
    projected = model.multi_modal_projector(features)
    if isinstance(shape.packing, VideoPacking):
        projected = pool_frames(projected, shape.packing)
    return model.pack(shape.packing, projected)


def tower_features(model: OneVision, medium: Medium, draw: Random) -> mx.array:
    """The tower's features of a medium that is trained on, whose gradients are wanted."""
    tower, wanted = model.vision_tower, model.config.feature_layers
    pixels = normalize(medium.tiles, medium.normalization)
    x = tower.embeddings(pixels.astype(tower.dtype))
    states = {0: x}
    for number, layer in enumerate(tower.encoder.layers[: max(wanted)], start=1):
        x = _recomputed(layer, layer, draw)(x)
        states[number] = x
    return mx.concatenate([states[number] for number in wanted], axis=-1)


def _recomputed(
    layer: nn.Module, function: Callable[..., mx.array], draw: Random
) -> Callable[..., mx.array]:
    """A layer that is computed again in the backward pass, where dropout draws the same numbers."""
    seed = draw.getrandbits(63)

    def compute(*given: Any) -> mx.array:
        mx.random.seed(seed)
        return function(*given)

    return cast(Callable[..., mx.array], nn_utils.checkpoint(layer, compute))


def _hidden(model: OneVision, h: mx.array, draw: Random) -> mx.array:
    """What leaves the last layer, before the norm, (B, L, hidden_size)."""
    text = model.language_model
    for layer, window in zip(text.layers, text.windows, strict=True):
        compute = partial(_layer, layer, text.rotate, window)
        h = _recomputed(layer, compute, draw)(h)
    return h


def _layer(
    layer: DecoderLayer, rotate: RotaryEmbedding, window: int | None, h: mx.array
) -> mx.array:
    """A layer whose attention is computed for some queries at a time: the backward pass holds their
    scores alone, and not those of all queries with all keys.
    """
    queries, keys, values = layer.before_attention(h, rotate, 0)
    length = h.shape[1]
    parts: list[mx.array] = []
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        begin = 0 if window is None else max(0, first + 1 - window)
        mask: Mask = "causal"
        if window is not None and last > window:
            behind = mx.arange(first, last)[:, None] - mx.arange(begin, last)[None]
            mask = (behind >= 0) & (behind < window)
        attend = mx.checkpoint(partial(_attended, layer.self_attn, mask))
        seen = slice(begin, last)
        parts.append(attend(queries[:, :, first:last], keys[:, :, seen], values[:, :, seen]))
    return layer.after_attention(h, mx.concatenate(parts, axis=2))


def _attended(
    attention: Attention, mask: Mask, queries: mx.array, keys: mx.array, values: mx.array
) -> mx.array:
    return attention.attend(queries, keys, values, mask, None)


def predicted_bytes(model: OneVision, examples: Sequence[Example], batch: int) -> int:
    """The peak of memory of a step of the longest rows, in bytes: weights, gradients and AdamW's
    two averages of what is trained, what enters each layer, one layer's own values, its attention
    and a chunk of logits. ``batch`` : rows at once.
    """
    text = model.config.text_config
    size = model.dtype.size
    held = _bytes(model.parameters()) + 3 * _bytes(model.trainable_parameters())
    lengths = sorted((len(example.ids) for example in examples), reverse=True)
    rows, length = min(batch, len(lengths)), lengths[0]
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
    if arrays_of(model.vision_tower.trainable_parameters()):
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
    return sum(array.nbytes for array in arrays_of(parameters).values())
