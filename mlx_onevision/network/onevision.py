"""LLaVA-OneVision: the tower, the projector, and how tile features become embeddings of a prompt.

Follows transformers' ``LlavaOnevisionForConditionalGeneration``. The module tree has the names of
the checkpoints' tensors. To mlx-lm this is a language model like any other: ids in, logits out,
only that ids at or above ``vocab_size`` stand for embeddings in the feature bank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.media.anyres import Packing, video_side
from mlx_onevision.network.feature_bank import FeatureBank
from mlx_onevision.network.language import Qwen2
from mlx_onevision.network.layers import ACTIVATIONS
from mlx_onevision.network.memory_budget import Budget
from mlx_onevision.network.vision import VisionTower


class MultiModalProjector(nn.Module):
    """Two linear layers from the tower's width to the language model's."""

    def __init__(self, config: OneVisionConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size * len(config.feature_layers)
        dims, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        self.linear_1 = nn.Linear(width, dims, bias=bias)
        self.linear_2 = nn.Linear(dims, dims, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(self.activation(self.linear_1(x)))


class OneVision(nn.Module):
    """The network. ``bank`` holds the embeddings of encoded media; ``budget`` bounds each step's
    memory.
    """

    def __init__(self, config: OneVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.image_newline = mx.zeros((config.text_config.hidden_size,))
        self.language_model = Qwen2(config.text_config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(
                config.text_config.hidden_size, config.text_config.vocab_size, bias=False
            )
        self.bank = FeatureBank(config.text_config.vocab_size, capacity=1 << 30)
        self.budget = Budget(tile_group=5, tower_interval=1, chunk=2048, interval=1)
        self._decoding = False
        self._check: Callable[[], None] = lambda: None

    # What mlx-lm asks of a model.

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers

    def __call__(
        self,
        inputs: mx.array,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
        last: int | None = None,
    ) -> mx.array:
        """Logits, float32 (B, L, vocab_size).

        inputs : mx.array, shape = (B, L)
            Token ids; those at or above vocab_size are virtual ids of the feature bank.
        input_embeddings : mx.array, shape = (B, L, hidden_size), instead of looking ``inputs`` up.
        last : so many of the last positions alone.

        float32 because mlx-lm subtracts a logsumexp before it picks a token: in half precision that
        would round neighbours together and change the greedy choice.
        """
        h = self.embed(inputs) if input_embeddings is None else input_embeddings
        h = self.language_model(h, cache, self.budget.interval, self._check)
        h = h if last is None else h[:, -last:]
        head = (
            self.language_model.embed_tokens.as_linear
            if self.config.tie_word_embeddings
            else self.lm_head
        )
        return head(h).astype(mx.float32)

    # From pixels to embeddings.

    def encode_tiles(
        self,
        tiles: np.ndarray,
        normalization: np.ndarray,
        launched: Callable[[], None] = lambda: None,
        finish: Callable[[mx.array], mx.array] = lambda group: group,
    ) -> mx.array:
        """Projected features of tiles, shape = (tiles, patches, hidden_size).

        tiles : uint8, shape = (tiles, S, S, 3).
        normalization : float32 (256, 3), the pixel value of each code in each channel.
        launched : called whenever a group of tiles has been sent to the device and before it is
            waited for; what it raises ends the encoding.
        finish : what becomes of each group at once; :func:`pool_frames` keeps a quarter of it.
        """
        groups = []
        for start in range(0, len(tiles), self.budget.tile_group):
            pixels = normalize(tiles[start : start + self.budget.tile_group], normalization)
            group = finish(self.multi_modal_projector(self.vision_features(pixels)))
            mx.async_eval(group)
            launched()
            mx.eval(group)
            groups.append(group)
        return mx.concatenate(groups)

    def vision_features(self, pixels: mx.array) -> mx.array:
        """The tower's selected hidden states, shape = (tiles, patches, tower width * layers)."""
        return self.vision_tower(pixels, self.config.feature_layers, self.budget.tower_interval)

    def pack_image(self, features: mx.array, packing: Packing) -> mx.array:
        """One tiled image's embeddings: the base tile's, then the grid's with a newline a row.

        features : mx.array, shape = (1 + tiles, patches, D), the base tile first.

        Returns an mx.array, shape = (packing.tokens, D).
        """
        (grid_rows, grid_cols), n = packing.grid, packing.patches
        D = features.shape[-1]
        top, bottom, left, right = packing.box
        grid = features[1:].reshape(grid_rows, grid_cols, n, n, D)
        grid = grid.transpose(0, 2, 1, 3, 4).reshape(grid_rows * n, grid_cols * n, D)
        grid = grid[top:bottom, left:right]  # what the padding added is cut off again
        if packing.interpolated:
            grid = interpolate(grid, *packing.shape)
        rows, cols = packing.shape
        newlines = mx.broadcast_to(self.image_newline.astype(grid.dtype), (rows, 1, D))
        grid = mx.concatenate([grid, newlines], axis=1).reshape(rows * (cols + 1), D)
        return mx.concatenate([features[0], grid])

    def pack_tile(self, features: mx.array) -> mx.array:
        """An untiled image's embeddings: its one tile's and a newline, shape = (patches + 1, D)."""
        return self._with_newline(features[0])

    def pack_video(self, frames: mx.array) -> mx.array:
        """A video's embeddings: its pooled frames' and a newline, shape = (frames * side² + 1, D).

        frames : mx.array, shape = (frames, side², D), as :func:`pool_frames` makes them.
        """
        return self._with_newline(frames.reshape(-1, frames.shape[-1]))

    def _with_newline(self, features: mx.array) -> mx.array:
        return mx.concatenate([features, self.image_newline.astype(features.dtype)[None]])

    # From ids to embeddings.

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the language model computes in."""
        return self.language_model.norm.weight.dtype

    def embed(self, ids: mx.array) -> mx.array:
        """Embeddings, shape = (B, L, hidden_size): the table's for text, the bank's for media.

        Raises:
            ValueError: for an id that is neither in the vocabulary nor in the bank.
        """
        if self._decoding and ids.shape[1] == 1:
            return self._text(ids)
        host = np.array(ids)
        if (host < self.config.text_config.vocab_size).all():
            return self._text(ids)
        return mx.stack([self._embed_sequence(sequence) for sequence in host])

    def _text(self, ids: mx.array) -> mx.array:
        return self.language_model.embed_tokens(ids).astype(self.dtype)

    def _embed_sequence(self, ids: np.ndarray) -> mx.array:
        vocab_size = self.config.text_config.vocab_size
        parts = []
        while len(ids):
            first = int(ids[0])
            if first < vocab_size:
                same = ids < vocab_size
            else:  # the next ids of the same medium
                same = (ids == first + np.arange(len(ids))) & (ids < self.bank.last_of(first))
            length = len(ids) if same.all() else int(np.argmin(same))
            if first < vocab_size:
                parts.append(self._text(mx.array(ids[:length])))
            else:
                parts.append(self.bank.look_up(first, first + length).astype(self.dtype))
            ids = ids[length:]
        return mx.concatenate(parts)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While no prompt is in prefill: single ids are sampled ones, so text, and go straight to
        the table. Without this, every step waits for its ids in order to look for virtual ones.
        """
        self._decoding = True
        try:
            yield
        finally:
            self._decoding = False

    @contextmanager
    def interruptible(self, check: Callable[[], None]) -> Iterator[None]:
        """Calls ``check`` in the midst of long steps; what it raises ends them, and leaves the
        KV caches of some layers ahead of the others'.
        """
        self._check = check
        try:
            yield
        finally:
            self._check = lambda: None


def normalize(tiles: np.ndarray, normalization: np.ndarray) -> mx.array:
    """Pixel values, float32 (tiles, S, S, 3), of uint8 tiles: a look-up, so the same on any
    device.
    """
    codes = mx.array(tiles).astype(mx.int32) * 3 + mx.arange(3)
    return mx.array(normalization.reshape(-1))[codes]


def interpolate(grid: mx.array, rows: int, cols: int) -> mx.array:
    """Bilinear, as torch's ``interpolate(align_corners=False, antialias=False)``.

    grid : mx.array, shape = (..., H, W, D). Computed in float32, whatever its type.

    Returns an mx.array, shape = (..., rows, cols, D), of the type of ``grid``.
    """
    dtype = grid.dtype
    left, right, x = _neighbours(grid.shape[-2], cols)
    x = x[:, None]
    first, second = mx.take(grid, left, axis=-2), mx.take(grid, right, axis=-2)
    grid = (1 - x) * first.astype(mx.float32) + x * second.astype(mx.float32)
    upper, lower, y = _neighbours(grid.shape[-3], rows)
    y = y[:, None, None]
    first, second = mx.take(grid, upper, axis=-3), mx.take(grid, lower, axis=-3)
    return ((1 - y) * first + y * second).astype(dtype)


def pool_frames(features: mx.array) -> mx.array:
    """Frames (n, patches, D) pooled to half their side: (n, side * side, D)."""
    frames, patches, D = features.shape
    n = round(patches**0.5)
    side = video_side(n)
    return interpolate(features.reshape(frames, n, n, D), side, side).reshape(frames, -1, D)


def _neighbours(length: int, wanted: int) -> tuple[mx.array, mx.array, mx.array]:
    """The two source indices of each target index, and the weight of the second."""
    scale = np.float32(length) / np.float32(wanted)
    position = scale * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    first = position.astype(np.int32)
    second = np.minimum(first + 1, length - 1)
    return mx.array(first), mx.array(second), mx.array(position - first.astype(np.float32))
