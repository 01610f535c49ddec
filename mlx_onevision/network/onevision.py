"""LLaVA-OneVision: the tower, the projector, and how tile features become embeddings of a prompt.

Follows transformers' ``LlavaOnevisionForConditionalGeneration``, and the original code where a
checkpoint has settings that transformers does not know. The module tree has the names of the
checkpoints' tensors. To mlx-lm this is a language model like any other: ids in, logits out, only
that ids at or above ``vocab_size`` stand for embeddings in the feature bank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.distributed import all_gather
from mlx_onevision.media.anyres import Packing, VideoPacking
from mlx_onevision.network.feature_bank import FeatureBank
from mlx_onevision.network.language import Qwen2
from mlx_onevision.network.layers import ACTIVATIONS
from mlx_onevision.network.memory_sizes import Budget
from mlx_onevision.network.stages import Stage
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


class EncodableMedium(Protocol):
    """An image or a video.

    tiles : uint8, shape = (tiles, S, S, 3); a video's are its frames.
    normalization : float32 (256, 3), the pixel value of each code in each channel.
    packing : of a tiled image or a video; None for an image of one tile.
    tokens : embeddings that it becomes.
    """

    @property
    def kind(self) -> Literal["image", "video"]: ...

    @property
    def tiles(self) -> NDArray[np.uint8]: ...

    @property
    def normalization(self) -> NDArray[np.float32]: ...

    @property
    def packing(self) -> Packing | VideoPacking | None: ...

    @property
    def tokens(self) -> int: ...


class OneVision(nn.Module):
    """The network. ``bank`` holds the embeddings of encoded media; ``budget`` bounds each step's
    memory.

    group : ranks that compute together. They share each of the language model's layers, whose
        configuration is then that of a rank's share, and encode the tiles of media between them.
    stage : or they divide the layers, and ``config`` has this rank's. Only where the model begins
        are tower and projector, and only where it ends is the head.
    """

    def __init__(
        self,
        config: OneVisionConfig,
        group: mx.distributed.Group | None = None,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self.stage = stage
        shared = group if stage is None else None
        if stage is None or stage.begins:
            self.vision_tower = VisionTower(config.vision_config)
            self.multi_modal_projector = MultiModalProjector(config)
            if config.has_newline:
                self.image_newline = mx.zeros((config.text_config.hidden_size,))
        tied = config.tie_word_embeddings
        self.language_model = Qwen2(config.text_config, shared, tied, stage)
        if not tied and (stage is None or stage.ends):
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

        Where ranks divide the layers, rank 0 has the logits, and the others' are all 0.

        float32 because mlx-lm subtracts a logsumexp before it picks a token: in half precision that
        would round neighbours together and change the greedy choice.
        """
        h = self.embed(inputs) if input_embeddings is None else input_embeddings
        h = self.hidden_states(h, cache, last)
        if self.stage is not None and not self.stage.ends:
            return mx.zeros((*h.shape[:2], self.config.text_config.vocab_size))
        head = (
            self.language_model.embed_tokens.as_linear
            if self.config.tie_word_embeddings
            else self.lm_head
        )
        return head(h).astype(mx.float32)

    # From pixels to embeddings.

    def encode_media(
        self, media: Sequence[EncodableMedium], launched: Callable[[], None] = lambda: None
    ) -> Iterator[mx.array]:
        """The embeddings (tokens, hidden_size) of each medium, in order, each as soon as its last
        tile has been sent to the device; see :meth:`encode_groups`.
        """
        for packed in self.encode_groups(media, launched):
            yield from packed

    def encode_groups(
        self, media: Sequence[EncodableMedium], launched: Callable[[], None] = lambda: None
    ) -> Iterator[list[mx.array]]:
        """Encodes a group of tiles at a time, filled from one medium after another: the embeddings
        of those media whose last tile was in the group.

        launched : called whenever a group of tiles has been sent to the device and before the one
            before it is waited for; what it raises ends the encoding.

        Where ranks divide the layers, one of them encodes, and the others get arrays of the same
        sizes, which hold nothing.
        """
        features: list[mx.array] = []  # of the first medium that has not been yielded
        computing: list[mx.array] = []
        begins = self.stage is None or self.stage.begins
        for group in _tile_groups([len(medium.tiles) for medium in media], self.budget.tile_group):
            if not begins:
                launched()
                ended = [n for n, part in group if part.stop == len(media[n].tiles)]
                yield [self._nothing(media[n].tokens) for n in ended]
                continue
            pixels = [
                normalize(media[number].tiles[part], media[number].normalization)
                for number, part in group
            ]
            encoded = self._encode_tiles(mx.concatenate(pixels))
            packed: list[mx.array] = []
            first = 0
            for (number, part), count in zip(group, map(len, pixels), strict=True):
                medium, last = media[number], first + count
                tiles = encoded[first:last]
                # Pooled at once: a quarter of a video's features is all that is kept of them.
                if isinstance(medium.packing, VideoPacking):
                    tiles = pool_frames(tiles, medium.packing)
                features.append(tiles)
                if part.stop == len(medium.tiles):
                    packed.append(self.pack(medium.packing, mx.concatenate(features)))
                    features = []
                first = last
            mx.async_eval(packed, features)
            launched()
            mx.eval(computing)  # the group before, so that the device has another to go on with
            computing = [*packed, *features]
            yield packed
        mx.eval(computing)

    def _nothing(self, *shape: int) -> mx.array:
        """What stands for embeddings that another rank has."""
        return mx.broadcast_to(
            mx.zeros((), self.dtype), (*shape, self.config.text_config.hidden_size)
        )

    def _encode_tiles(self, pixels: mx.array) -> mx.array:
        """The tiles' embeddings, shape = (tiles, patches, hidden_size). Each of the ranks of a
        group encodes as many, the last tile again where there are too few.
        """
        tiles, own = len(pixels), pixels
        if self.group is not None and self.stage is None:
            share = -(-tiles // self.group.size())
            first = self.group.rank() * share
            own = pixels[mx.minimum(mx.arange(first, first + share), tiles - 1)]
        encoded = self.multi_modal_projector(self.vision_features(own))
        return encoded if own is pixels else all_gather(encoded, self.group)[:tiles]

    def vision_features(self, pixels: mx.array) -> mx.array:
        """The tower's selected hidden states, shape = (tiles, patches, tower width * layers)."""
        layers, interval = self.config.feature_layers, self.budget.tower_interval
        return self.vision_tower(pixels, layers, interval, self._check)

    def pack(self, packing: Packing | VideoPacking | None, features: mx.array) -> mx.array:
        """The embeddings (tokens, hidden_size) of a medium from its tiles', a video's pooled."""
        if isinstance(packing, VideoPacking):
            packed = self.pack_video(features, packing.newline)
        elif packing is not None:
            packed = self.pack_image(features, packing)
        else:
            packed = self.pack_tile(features)
        return packed.astype(self.dtype)

    def pack_image(self, features: mx.array, packing: Packing) -> mx.array:
        """One tiled image's embeddings: the base tile's, then the grid's, as ``packing`` has them.

        features : mx.array, shape = (1 + tiles, patches, D), the base tile first.

        Returns an mx.array, shape = (packing.tokens, D).
        """
        (grid_rows, grid_cols), n = packing.grid, packing.patches
        D = features.shape[-1]
        top, bottom, left, right = packing.box
        if packing.merge == "flat":
            tiles = features[1:]
            if packing.interpolated:
                side = packing.shape[0] // grid_rows
                tiles = interpolate(tiles.reshape(-1, n, n, D), side, side)
            return mx.concatenate([features[0], tiles.reshape(-1, D)])
        grid = features[1:].reshape(grid_rows, grid_cols, n, n, D)
        grid = grid.transpose(0, 2, 1, 3, 4).reshape(grid_rows * n, grid_cols * n, D)
        grid = grid[top:bottom, left:right]  # what the padding added is cut off again
        if packing.interpolated:
            grid = interpolate(grid, *packing.shape)
        if packing.merge == "spatial_unpad":
            grid = self._with_newlines(grid)
        return mx.concatenate([features[0], grid.reshape(-1, D)])

    def pack_tile(self, features: mx.array) -> mx.array:
        """An untiled image's embeddings: its one tile's, and a newline where the model has one,
        shape = (patches + 1, D).
        """
        return self._with_newlines(features[:1]) if self.config.has_newline else features[0]

    def pack_video(self, frames: mx.array, newline: str = "one_token") -> mx.array:
        """A video's embeddings: its pooled frames' and newlines, shape = (tokens, D).

        frames : mx.array, shape = (frames, side², D), as :func:`pool_frames` makes them.
        newline : as :class:`~mlx_onevision.media.anyres.VideoPacking` has it.
        """
        patches, D = frames.shape[1:]
        if newline == "no_token":
            return frames.reshape(-1, D)
        row = {"grid": isqrt(patches), "frame": patches}.get(newline, len(frames) * patches)
        return self._with_newlines(frames.reshape(-1, row, D))

    def _with_newlines(self, rows: mx.array) -> mx.array:
        """Rows (n, length, D), one after another, with a newline after each."""
        n, length, D = rows.shape
        newlines = mx.broadcast_to(self.image_newline.astype(rows.dtype), (n, 1, D))
        return mx.concatenate([rows, newlines], axis=1).reshape(n * (length + 1), D)

    # From ids to embeddings.

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the language model computes in."""
        return self.language_model.norm.weight.dtype

    def hidden_states(
        self, h: mx.array, cache: Sequence[Any] | None = None, last: int | None = None
    ) -> mx.array:
        """The final hidden states, (B, L, hidden_size), of embeddings; see :class:`language.Qwen2`
        for the rest.
        """
        tokens = h.shape[0] * h.shape[1]
        interval = 0 if h.shape[1] == 1 else self.budget.interval_for(tokens)
        return self.language_model(h, cache, interval, self._check, last)

    def embed(self, ids: mx.array) -> mx.array:
        """Embeddings, shape = (B, L, hidden_size): the table's for text, the bank's for media.
        Of no meaning on ranks where the model does not begin.

        Raises:
            ValueError: for an id that is neither in the vocabulary nor in the bank.
        """
        if self.stage is not None and not self.stage.begins:
            return self._nothing(*ids.shape)
        look_up = self.language_model.look_up
        if self._decoding and ids.shape[1] == 1:
            return look_up(ids)
        host = np.array(ids)
        is_text = host < self.config.text_config.vocab_size
        if is_text.all():
            return look_up(ids)
        text = mx.zeros((0, 1))
        if is_text.any():  # all at once, so that ranks gather once
            text = look_up(mx.array(host[is_text]))
        starts = np.cumsum([0, *is_text.sum(axis=1)])
        return mx.stack(
            [
                self._embed_sequence(row, text[first:])
                for row, first in zip(host, starts.tolist(), strict=False)
            ]
        )

    def _embed_sequence(self, ids: np.ndarray, text: mx.array) -> mx.array:
        """``text`` : the embeddings of those ids that are text, and more behind them."""
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
                parts.append(text[:length])
                text = text[length:]
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


def _tile_groups(counts: Sequence[int], size: int) -> Iterator[list[tuple[int, slice]]]:
    """The tiles of media, so many each, in groups of ``size``: of each group the numbers of its
    media and which of their tiles.
    """
    group: list[tuple[int, slice]] = []
    room = size
    for number, count in enumerate(counts):
        first = 0
        while first < count:
            last = min(first + room, count)
            group.append((number, slice(first, last)))
            room -= last - first
            first = last
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group


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


def pool_frames(features: mx.array, packing: VideoPacking) -> mx.array:
    """Frames (n, patches, D) pooled as ``packing`` says: (n, side * side, D)."""
    frames, _, D = features.shape
    n, side = packing.patches, packing.side
    grid = features.reshape(frames, n, n, D)
    if packing.pooling != "bilinear":
        half = n // 2
        cells = grid[:, : 2 * half, : 2 * half].reshape(frames, half, 2, half, 2, D)
        if packing.pooling == "max":
            grid = cells.max(axis=(2, 4))
        else:
            grid = cells.astype(mx.float32).mean(axis=(2, 4)).astype(features.dtype)
    if grid.shape[1] != side:
        grid = interpolate(grid, side, side)
    return grid.reshape(frames, -1, D)


def _neighbours(length: int, wanted: int) -> tuple[mx.array, mx.array, mx.array]:
    """The two source indices of each target index, and the weight of the second."""
    scale = np.float32(length) / np.float32(wanted)
    position = scale * (np.arange(wanted, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    first = position.astype(np.int32)
    second = np.minimum(first + 1, length - 1)
    return mx.array(first), mx.array(second), mx.array(position - first.astype(np.float32))
