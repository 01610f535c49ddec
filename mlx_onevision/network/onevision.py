# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""LLaVA-OneVision (arXiv 2408.03326): tower, projector and language model, and what becomes of ids
and media between them.

Follows transformers' ``LlavaOnevisionForConditionalGeneration`` (modeling_llava_onevision.py). The
module tree has the names of the checkpoints' tensors. To mlx-lm this is a language model like any
other, ids in and logits out, except that ids at or above ``vocab_size`` stand for embeddings in the
feature bank.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
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
from mlx_onevision.network.packing import (
    normalize,
    pack_image,
    pack_tile,
    pack_video,
    pool_frames,
)
from mlx_onevision.network.stages import Stage
from mlx_onevision.network.vision import VisionTower


class MultiModalProjector(nn.Module):
    """Two linear layers from the tower's width to the language model's:
    ``LlavaOnevisionMultiModalProjector`` of the reference.
    """

    def __init__(self, config: OneVisionConfig) -> None:
        super().__init__()
        width = config.vision_config.hidden_size * len(config.feature_layers)
        dims, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.activation = ACTIVATIONS[config.projector_hidden_act]
        self.linear_1 = nn.Linear(width, dims, bias=bias)
        self.linear_2 = nn.Linear(dims, dims, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(..., tower width * feature layers) to (..., hidden_size)."""
        return self.linear_2(self.activation(self.linear_1(x)))


class EncodableMedium(Protocol):
    """An image or a video.

    tiles : uint8 (tiles, S, S, 3); a video's are its frames.
    normalization : float32 (256, 3), the pixel value of each level in each channel.
    packing : of a tiled image or a video; None for an image of one tile.
    tokens : how many embeddings it becomes.
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
    """The network. ``bank`` holds the embeddings of encoded media; ``budget`` limits the memory of
    each step.

    group : ranks that compute together: each has a share of every layer of the language model,
        which ``config`` describes, and encodes a share of the tiles of media.
    stage : ranks that divide the layers instead: ``config`` describes this rank's. The rank where
        the model begins has tower and projector, the one where it ends has the head.
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

    # The interface of mlx-lm's models.

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

        inputs : int (B, L), token ids; those at or above vocab_size are virtual ids of the feature
            bank.
        cache : as for :class:`~mlx_onevision.network.language.Qwen2`.
        input_embeddings : (B, L, hidden_size), instead of looking ``inputs`` up.
        last : only for so many of the last positions.

        Where ranks divide the layers, rank 0 has the logits, and the others' are all 0.

        They are float32 because mlx-lm subtracts a logsumexp before it picks a token: rounding that
        to half precision could make neighbours equal and change the greedy choice.
        """
        h = self.embed(inputs) if input_embeddings is None else input_embeddings
        h = self.hidden_states(h, cache, last)
        if self.stage is not None and not self.stage.ends:
            return mx.zeros((*h.shape[:2], self.config.text_config.vocab_size))
        if self.config.tie_word_embeddings:
            return self.language_model.embed_tokens.as_linear(h).astype(mx.float32)
        return self.lm_head(h).astype(mx.float32)

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

        launched : called after each group of tiles is sent to the device, before the previous group
            is waited for; what it raises ends the encoding.

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
                yield [self._zeros(media[n].tokens) for n in ended]
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
                # Pooled at once, so that only a quarter of a video's features is ever held.
                if isinstance(medium.packing, VideoPacking):
                    tiles = pool_frames(tiles, medium.packing)
                features.append(tiles)
                if part.stop == len(medium.tiles):
                    packed.append(self.pack(medium.packing, mx.concatenate(features)))
                    features = []
                first = last
            mx.async_eval(packed, features)
            launched()
            mx.eval(computing)  # the previous group, while the device has this one to compute
            computing = [*packed, *features]
            yield packed
        mx.eval(computing)

    def _zeros(self, *shape: int) -> mx.array:
        """Zeros (*shape, hidden_size) in place of embeddings that another rank has."""
        return mx.broadcast_to(
            mx.zeros((), self.dtype), (*shape, self.config.text_config.hidden_size)
        )

    def _encode_tiles(self, pixels: mx.array) -> mx.array:
        """The projected features (tiles, patches, hidden_size) of pixel values (tiles, S, S, 3).
        Each rank of a group encodes as many tiles; where they do not divide, the last one again.
        """
        tiles, own = len(pixels), pixels
        if self.group is not None and self.stage is None:
            share = -(-tiles // self.group.size())
            first = self.group.rank() * share
            own = pixels[mx.minimum(mx.arange(first, first + share), tiles - 1)]
        encoded = self.multi_modal_projector(self.vision_features(own))
        return encoded if own is pixels else all_gather(encoded, self.group)[:tiles]

    def vision_features(self, pixels: mx.array) -> mx.array:
        """The tower's selected hidden states (tiles, patches, tower width * feature layers) of
        pixel values, float32 (tiles, S, S, 3).
        """
        layers, interval = self.config.feature_layers, self.budget.tower_interval
        return self.vision_tower(pixels, layers, interval, self._check)

    def pack(self, packing: Packing | VideoPacking | None, features: mx.array) -> mx.array:
        """The embeddings (tokens, hidden_size) of a medium.

        packing : as in :class:`EncodableMedium`.
        features : of its tiles, (tiles, patches, hidden_size); a video's are pooled.
        """
        newline = self.image_newline if self.config.has_newline else None
        if isinstance(packing, VideoPacking):
            packed = pack_video(features, packing.newline, newline)
        elif packing is not None:
            packed = pack_image(features, packing, newline)
        else:
            packed = pack_tile(features, newline)
        return packed.astype(self.dtype)

    # From ids to embeddings.

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the language model computes in."""
        return self.language_model.norm.weight.dtype

    def hidden_states(
        self, h: mx.array, cache: Sequence[Any] | None = None, last: int | None = None
    ) -> mx.array:
        """The final hidden states (B, L, hidden_size) of embeddings ``h`` (B, L, hidden_size).

        cache, last : as for :class:`~mlx_onevision.network.language.Qwen2`.
        """
        tokens = h.shape[0] * h.shape[1]
        interval = 0 if h.shape[1] == 1 else self.budget.interval_for(tokens)
        return self.language_model(h, cache, interval, self._check, last)

    def embed(self, ids: mx.array) -> mx.array:
        """The embeddings (B, L, hidden_size) of ids (B, L): the table's for text, the bank's for
        media. Zeros on ranks where the model does not begin.

        Raises:
            ValueError: for an id that is neither in the vocabulary nor in the bank.
        """
        if self.stage is not None and not self.stage.begins:
            return self._zeros(*ids.shape)
        look_up = self.language_model.look_up
        if self._decoding and ids.shape[1] == 1:
            return look_up(ids)
        host = np.array(ids, np.int64)
        is_text = host < self.config.text_config.vocab_size
        if is_text.all():
            return look_up(ids)
        text = mx.zeros((0, 1))
        if is_text.any():  # of the whole batch at once, so that ranks gather once
            text = look_up(mx.array(host[is_text]))
        starts = [0, *np.cumsum(is_text.sum(axis=1)).tolist()]
        return mx.stack(
            [
                self._embed_sequence(row, text[first:])
                for row, first in zip(host, starts, strict=False)
            ]
        )

    def _embed_sequence(self, ids: NDArray[np.int64], text: mx.array) -> mx.array:
        """The embeddings (L, hidden_size) of ids (L,), of which ``text`` begins with those of the
        vocabulary.
        """
        vocab_size = self.config.text_config.vocab_size
        parts: list[mx.array] = []
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
    def decoding(self) -> Generator[None]:
        """A context without prefills: single ids are sampled ones, so text, and are looked up in
        the table. Without this, every step would wait for its ids to look for virtual ones.
        """
        self._decoding = True
        try:
            yield
        finally:
            self._decoding = False

    @contextmanager
    def interruptible(self, check: Callable[[], None]) -> Generator[None]:
        """A context in which ``check`` is called within long steps; what it raises ends them, and
        leaves the KV caches of some layers ahead of the others'.
        """
        self._check = check
        try:
            yield
        finally:
            self._check = lambda: None


def _tile_groups(counts: Sequence[int], size: int) -> Iterator[list[tuple[int, slice]]]:
    """The tiles of media, ``counts`` of each, in groups of ``size``: each group is a list of
    (number of the medium, slice of its tiles).
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
