# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Qwen2, the language model: a pre-norm decoder with grouped-query attention and rotary positions.

Follows transformers' ``Qwen2Model`` (modeling_qwen2.py). It takes embeddings, not ids: looking ids
up, for images and videos in the feature bank, is the caller's task. Caches are mlx-lm's, or objects
with their ``update_and_fetch``, ``make_mask``, ``offset`` and ``state``. Its matrices are the
checkpoints', or those that :func:`layers.fuse` joined them to.

Where a group of ranks shares the layers (tensor parallelism), the configuration is that of one
rank's share: of its heads and its part of the MLP's inner values. Each rank's products are then
parts of a sum. Where the head is a matrix of its own, each rank also has a part of each row of the
embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_onevision.config.networks import TextConfig
from mlx_onevision.distributed import all_sum, join
from mlx_onevision.media.parallel import no_check
from mlx_onevision.network.attention import Mask, RotaryEmbedding, attention, attention_mask
from mlx_onevision.network.layers import ACTIVATIONS, Pace, gated, halves_of, modules_of
from mlx_onevision.network.stages import Stage


class Attention(nn.Module):
    """Grouped-query attention: ``Qwen2Attention`` of the reference."""

    qkv_proj: nn.Linear  # once fused

    def __init__(self, config: TextConfig, group: mx.distributed.Group | None = None) -> None:
        super().__init__()
        self.group = group
        dims, head_dim = config.hidden_size, config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = head_dim**-0.5
        self.q_proj = nn.Linear(dims, self.num_heads * head_dim)
        self.k_proj = nn.Linear(dims, self.num_kv_heads * head_dim)
        self.v_proj = nn.Linear(dims, self.num_kv_heads * head_dim)
        self.o_proj = nn.Linear(self.num_heads * head_dim, dims, bias=False)

    def project(
        self, x: mx.array, rotate: RotaryEmbedding, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Rotated queries (B, heads, L, head_dim) and keys (B, kv_heads, L, head_dim), and values.

        x : (B, L, hidden_size), or (B, hidden_size) for one position of each row.
        offset : the first position, of all rows or of each (B,).
        """
        heads, rotated = self.num_heads, self.num_heads + self.num_kv_heads
        if "qkv_proj" in self:
            joined = self.qkv_proj(x)
        else:
            joined = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        if x.ndim == 2:
            joined = joined.reshape(len(x), rotated + self.num_kv_heads, 1, -1)
        else:
            joined = joined.reshape(*x.shape[:2], rotated + self.num_kv_heads, -1)
            joined = joined.transpose(0, 2, 1, 3)
        both = rotate(joined[:, :rotated], offset)
        return both[:, :heads], both[:, heads:], joined[:, rotated:]

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, cache: Any | None
    ) -> mx.array:
        """What each query reads of the cache and the new keys and values, (B, heads, L, head_dim).
        The cache gets the new ones.
        """
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return attention(queries, keys, values, self.scale, mask, cache)

    def combine(self, attended: mx.array) -> mx.array:
        """The output (B, L, hidden_size) for what :meth:`attend` returns."""
        B, _, L, _ = attended.shape
        return all_sum(self.o_proj(attended.transpose(0, 2, 1, 3).reshape(B, L, -1)), self.group)

    def combine_one(self, attended: mx.array) -> mx.array:
        """This rank's part of the output's sum, (B, hidden_size), for one position a row."""
        return self.o_proj(attended.reshape(len(attended), -1))


class MLP(nn.Module):
    """The gated feed-forward part of a layer: ``Qwen2MLP`` of the reference."""

    gate_up_proj: nn.Linear  # once fused

    def __init__(self, config: TextConfig, group: mx.distributed.Group | None = None) -> None:
        super().__init__()
        self.group = group
        self.gated = gated(ACTIVATIONS[config.hidden_act])
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return all_sum(self.part(x), self.group)

    def part(self, x: mx.array) -> mx.array:
        """This rank's part of the output's sum."""
        if "gate_up_proj" in self:
            gate, up = halves_of(self.gate_up_proj, x)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.gated(gate, up))


class DecoderLayer(nn.Module):
    """One layer of hidden states (B, L, hidden_size): ``Qwen2DecoderLayer`` of the reference."""

    def __init__(self, config: TextConfig, group: mx.distributed.Group | None = None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, group)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, group)

    def __call__(
        self, x: mx.array, rotate: RotaryEmbedding, mask: Mask, cache: Any | None
    ) -> mx.array:
        return self.feed_forward(self.attend(x, rotate, mask, cache))

    def attend(
        self, x: mx.array, rotate: RotaryEmbedding, mask: Mask, cache: Any | None
    ) -> mx.array:
        """The first half of a layer; :meth:`feed_forward` is the second."""
        # The offset is read before the cache is updated: a batch cache changes its own in place.
        projected = self.before_attention(x, rotate, 0 if cache is None else cache.offset)
        return self.add_attention(x, self.self_attn.attend(*projected, mask, cache))

    def of_last(
        self,
        x: mx.array,
        last: int,
        rotate: RotaryEmbedding,
        mask: Mask,
        cache: Any | None,
    ) -> mx.array:
        """The output (B, last, hidden_size) of the last positions alone; the cache gets the keys
        and values of all.
        """
        offset = 0 if cache is None else cache.offset
        queries, keys, values = self.before_attention(x, rotate, offset)
        mask = mask[..., -last:, :] if isinstance(mask, mx.array) else mask
        attended = self.self_attn.attend(queries[:, :, -last:], keys, values, mask, cache)
        return self.after_attention(x[:, -last:], attended)

    def before_attention(
        self, x: mx.array, rotate: RotaryEmbedding, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        return self.self_attn.project(self.input_layernorm(x), rotate, offset)

    def after_attention(self, x: mx.array, attended: mx.array) -> mx.array:
        return self.feed_forward(self.add_attention(x, attended))

    def add_attention(self, x: mx.array, attended: mx.array) -> mx.array:
        return x + self.self_attn.combine(attended)

    def feed_forward(self, x: mx.array) -> mx.array:
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The decoder.

    group : ranks that share each layer. tied : whether the embedding is the head, too.
    stage : this rank's part, where ranks divide the layers; ``config`` describes that part.

    rotate : rotates queries and keys. windows : of each layer, how many positions back a query
        sees, itself included; None for all.
    """

    def __init__(
        self,
        config: TextConfig,
        group: mx.distributed.Group | None = None,
        tied: bool = True,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self.stage = stage
        self._embedding_group = None if tied else group
        ranks = 1 if self._embedding_group is None else self._embedding_group.size()
        if stage is None or stage.begins or (tied and stage.ends):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size // ranks)
        self.layers = [DecoderLayer(config, group) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotate = RotaryEmbedding(config)
        self.windows = tuple(
            config.sliding_window if kind == "sliding_attention" else None
            for kind in config.layer_types
        )
        self._step: _DecodeStep | None = None
        # The last batch's padding, and whether a row has any: reading it waits for the device.
        self._padding: mx.array | None = None
        self._is_padded = False

    def look_up(self, ids: mx.array) -> mx.array:
        """The embeddings (..., hidden_size) of ids (...) of the vocabulary."""
        return join(self.embed_tokens(ids).astype(self.norm.weight.dtype), self._embedding_group)

    def __call__(
        self,
        h: mx.array,
        cache: Sequence[Any] | None = None,
        interval: int = 0,
        check: Callable[[], None] = no_check,
        last: int | None = None,
    ) -> mx.array:
        """Final hidden states, normalised, (B, L, hidden_size).

        h : (B, L, hidden_size), embeddings of the positions that follow those in the cache.
        cache : one KV cache a layer, or None for a sequence that stands alone.
        interval : the most layers whose intermediate values are held at once (0: all); see
            :class:`layers.Pace`.
        check : called at every evaluation point; where it raises, the caches of the layers that
            were not reached stay as they were. Ranks that divide the layers have no evaluation
            points in common: there it is called once, before the layers, when the input has come.
        last : only for so many of the last positions; the last layer then computes no others.
        """
        stage = self.stage
        if stage is not None:
            h = stage.enter(h)
            if h.shape[1] > 1 and not stage.begins:
                mx.eval(h)
                check()
            check = no_check
        caches: Sequence[Any | None] = cache if cache is not None else [None] * len(self.layers)
        masks = {
            window: self._mask(h, caches[self.windows.index(window)], window)
            for window in set(self.windows)
        }
        # A module that stands in a layer's place, to record it, is called as a whole.
        plain = all(type(layer) is DecoderLayer for layer in self.layers)
        ends = stage is None or stage.ends
        if h.shape[1] == 1 and cache is not None and plain:
            h = self._decode(h, cache, [masks[window] for window in self.windows])
            return h if stage is None else stage.leave(h)
        # A GPU computes the first layers of a step while the last are built. A CPU gains nothing.
        on_gpu = mx.default_device().type == mx.gpu
        if on_gpu:
            most = max(2, len(self.layers) // 2)
            interval = min(interval, most) if interval else most
        halves = interval == 1 and plain and on_gpu
        pace = Pace(interval, halves)
        for number, (layer, window, layer_cache) in enumerate(
            zip(self.layers, self.windows, caches, strict=True), start=1
        ):
            if last is not None and number == len(self.layers) and plain and ends:
                h = layer.of_last(h, last, self.rotate, masks[window], layer_cache)
            elif halves:
                h = layer.attend(h, self.rotate, masks[window], layer_cache)
                pace.evaluate(h, [] if layer_cache is None else layer_cache.state)
                h = layer.feed_forward(h)
            else:
                h = layer(h, self.rotate, masks[window], layer_cache)
            if pace.is_due(number):
                pace.evaluate(h, [] if layer_cache is None else layer_cache.state)
                check()
        if stage is not None and not ends:
            h = stage.leave(h)
            return h if last is None else h[:, -last:]
        return self.norm(h if last is None else h[:, -last:])

    def _mask(self, h: mx.array, cache: Any | None, window: int | None) -> Mask:
        """As :func:`attention_mask`, but none for a batch's decode step where no row is padded."""
        padding = getattr(cache, "left_padding", None)
        if h.shape[1] > 1 or window is not None or not isinstance(padding, mx.array):
            return attention_mask(h, cache, window)
        if padding is not self._padding:
            self._padding, self._is_padded = padding, bool(np.array(padding).any())
        return attention_mask(h, cache, window) if self._is_padded else None

    def _decode(self, h: mx.array, caches: Sequence[Any], masks: Sequence[Mask]) -> mx.array:
        """A step of one token a sequence, h (B, 1, hidden_size). Building its graph in Python and
        launching it would take longer than a fast device needs to run it. So everything between two
        attentions is compiled, and computed without the axis of positions, (B, hidden_size), which
        would be reshaped away and back around each product.
        """
        if self._step is None or not self._step.is_current(self):
            self._step = _DecodeStep(self)
        compiled = self._step.pieces
        x = attended = h.squeeze(1)  # the first piece does not use what is attended
        held, offset = None, mx.array(0)
        for layer, piece, cache, mask in zip(self.layers, compiled, caches, masks, strict=False):
            if isinstance(cache.offset, mx.array):  # of each row
                cache.offset = caches[0].offset if held is None else held
                held = offset = cache.offset
            elif cache.offset != held:
                held = cache.offset
                offset = mx.array(held)
            x, *projected = piece(x, attended, offset)
            queries, keys, values = projected
            attended = layer.self_attn.attend(queries, keys, values, mask, cache)
        return compiled[-1](x, attended, offset)[0][:, None]


class _DecodeStep:
    """The compiled pieces of a decode step: before, between and after the attentions of the layers.

    The weights are constants of them: passing them with every call would take as long as the rest
    of a step. So each is remembered with its place, to notice when one is replaced.
    """

    def __init__(self, model: Qwen2) -> None:
        # Without a reference to the model: a cycle would keep it until the next collection.
        self._layers, self._norm, self._rotate = list(model.layers), model.norm, model.rotate
        self._ends = model.stage is None or model.stage.ends
        self._parts: list[tuple[nn.Module, str, Any]] = []
        for top in (*self._layers, self._norm):
            mx.eval(top.parameters())  # a lazy one would be read and joined again in every step
            for module in modules_of(top).values():
                self._parts += [
                    (module, name, part)
                    for name, part in module.items()
                    if isinstance(part, mx.array | nn.Module)
                ]
        self.pieces = [self._piece(n) for n in range(len(self._layers) + 1)]

    def is_current(self, model: Qwen2) -> bool:
        """Whether the model still has the layers and weights that were compiled."""
        return (
            len(model.layers) == len(self._layers)
            and model.norm is self._norm
            and all(new is old for new, old in zip(model.layers, self._layers, strict=True))
            and all(module.get(name) is part for module, name, part in self._parts)
        )

    def _piece(self, number: int) -> Callable[..., tuple[mx.array, ...]]:
        """What comes after the attention of layer ``number`` - 1 and before that of ``number``: a
        function of hidden states (B, hidden_size), what was attended (B, heads, 1, head_dim) and
        the offset. It returns hidden states and, before an attention, queries, keys and values.

        Among ranks, only what comes between two sums is compiled: the sums' number and order, which
        must be the same on all ranks, are those of the calls in Python.
        """
        layers, norm, rotate = self._layers, self._norm, self._rotate
        last, ends = number == len(layers), self._ends

        def enter(x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            if last:
                return (norm(x) if ends else x,)
            return x, *layers[number].before_attention(x, rotate, offset)

        def first(x: mx.array, attended: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return enter(x, offset)

        if not number:
            return mx.compile(first)
        layer = layers[number - 1]
        attn, mlp = layer.self_attn, layer.mlp

        def add_and_feed(x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
            x = x + attended
            return x, mlp.part(layer.post_attention_layernorm(x))

        def add_and_enter(x: mx.array, fed: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return enter(x + fed, offset)

        shared = attn.group is not None
        if shared:
            add_and_feed, add_and_enter = mx.compile(add_and_feed), mx.compile(add_and_enter)

        def piece(x: mx.array, attended: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            x, fed = add_and_feed(x, all_sum(attn.combine_one(attended), attn.group))
            return add_and_enter(x, all_sum(fed, mlp.group), offset)

        return piece if shared else mx.compile(piece)
