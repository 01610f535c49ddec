"""Qwen2, the language model: a pre-norm decoder with grouped-query attention and rotary positions.

Follows transformers' ``Qwen2Model``. It takes embeddings, not ids: looking ids up, which for images
and videos means the feature bank, is the caller's. Caches are mlx-lm's, or anything that has their
``update_and_fetch``, ``make_mask``, ``offset`` and ``state``. Its matrices are the checkpoints', or
those that :func:`layers.fuse` joined them to.

Where a group of ranks shares the layers, the configuration is that of one rank's share: of its
heads and its part of the MLP's inner values. Each rank's products are parts of a sum then. It has a
part of each row of the embedding, too, where the head is a matrix of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_onevision.config.model import TextConfig
from mlx_onevision.distributed import all_sum, join
from mlx_onevision.network.layers import ACTIVATIONS, Pace, gated, halves_of, on_cuda
from mlx_onevision.network.memory_sizes import CACHE_STEP
from mlx_onevision.network.stages import Stage

Mask = mx.array | str | None


class RotaryEmbedding:
    """Rotates pairs of dimensions half a head apart by an angle that grows with the position."""

    def __init__(self, config: TextConfig) -> None:
        self.dims = config.head_dim
        inverse, self.length = config.rope.frequencies(
            config.head_dim, config.max_position_embeddings
        )
        # mx.fast.rope takes the periods, not the frequencies.
        self.periods = mx.array(1.0 / inverse.astype("float64"), mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        settings: dict[str, Any] = {"traditional": False, "base": None, "scale": 1.0}
        x = mx.fast.rope(x, self.dims, offset=offset, freqs=self.periods, **settings)
        return x if self.length == 1.0 else x * self.length


class Attention(nn.Module):
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
        """Rotated queries (B, heads, L, dim) and keys, and values, of kv_heads.

        x : (B, L, hidden_size), or (B, hidden_size) of one position each.
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
        """What each query reads of the cache and the new keys and values, (B, heads, L, dim)."""
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        return attention(queries, keys, values, self.scale, mask, cache)

    def combine(self, attended: mx.array) -> mx.array:
        """(B, heads, L, dim) of :meth:`attend` to (B, L, hidden_size)."""
        B, _, L, _ = attended.shape
        return all_sum(self.o_proj(attended.transpose(0, 2, 1, 3).reshape(B, L, -1)), self.group)

    def combine_one(self, attended: mx.array) -> mx.array:
        """(B, heads, 1, dim) of :meth:`attend` to this rank's part of (B, hidden_size)."""
        return self.o_proj(attended.reshape(len(attended), -1))


class MLP(nn.Module):
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
        """This rank's part of the sum."""
        if "gate_up_proj" in self:
            gate, up = halves_of(self.gate_up_proj, x)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.gated(gate, up))


class DecoderLayer(nn.Module):
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
        # The offset is read before the update, which moves a batch cache's in place.
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
        """What the layer makes of the last positions; the cache gets the keys of all."""
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


def nothing() -> None:
    """Of a step that has no common points."""


class Qwen2(nn.Module):
    """group : ranks that share each layer. tied : the embedding is the head, too.

    stage : which of the ranks this is that divide the layers; ``config`` is that of its own.
    """

    def __init__(
        self,
        config: TextConfig,
        group: mx.distributed.Group | None = None,
        tied: bool = True,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        self._stage = stage
        self._embedding_group = None if tied else group
        ranks = 1 if self._embedding_group is None else self._embedding_group.size()
        if stage is None or stage.begins or (tied and stage.ends):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size // ranks)
        self.layers = [DecoderLayer(config, group) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rotate = RotaryEmbedding(config)
        self._pieces: _Pieces | None = None
        self._padding: mx.array | None = None  # of the batch that was last looked at
        self._is_padded = False
        # Each layer's window: how many positions back a query sees, itself included.
        self._windows = [
            config.sliding_window if kind == "sliding_attention" else None
            for kind in config.layer_types
        ]

    def look_up(self, ids: mx.array) -> mx.array:
        """The embeddings of ids of the vocabulary, shape = (..., hidden_size)."""
        return join(self.embed_tokens(ids).astype(self.norm.weight.dtype), self._embedding_group)

    def __call__(
        self,
        h: mx.array,
        cache: Sequence[Any] | None = None,
        interval: int = 0,
        check: Callable[[], None] = lambda: None,
        last: int | None = None,
    ) -> mx.array:
        """Final hidden states, normalised; of so many of the ``last`` positions alone, for which
        the last layer then computes what the others need not know.

        h : mx.array, shape = (B, L, hidden_size)
            Embeddings of the positions that follow those in the cache.
        cache : one KV cache a layer, or None for a sequence that stands alone.
        interval : the most layers whose intermediate values are held at once (0: all); see
            :class:`layers.Pace`.
        check : called at every evaluation point; what it raises leaves the caches of the layers
            behind as they were. Where ranks divide the layers, they have no common points, and it
            is called once, before the layers, when what they read has come.
        """
        stage = self._stage
        if stage is not None:
            h = stage.enter(h)
            if h.shape[1] > 1 and not stage.begins:
                mx.eval(h)
                check()
            check = nothing
        caches: Sequence[Any | None] = cache if cache is not None else [None] * len(self.layers)
        masks = {
            window: self._mask(h, caches[self._windows.index(window)], window)
            for window in set(self._windows)
        }
        # What stands in a layer's place, to record it, is called as a whole.
        plain = all(type(layer) is DecoderLayer for layer in self.layers)
        ends = stage is None or stage.ends
        if h.shape[1] == 1 and cache is not None and plain:
            h = self._decode(h, cache, [masks[window] for window in self._windows])
            return h if stage is None else stage.leave(h)
        # A CPU computes at once what it is given, and gains nothing by an overlap.
        on_gpu = mx.default_device().type == mx.gpu
        if on_gpu:  # which begins with the first layers of a short step before the last are built
            most = max(2, len(self.layers) // 2)
            interval = min(interval, most) if interval else most
        halves = interval == 1 and plain and on_gpu
        pace = Pace(interval, halves)
        for number, (layer, window, layer_cache) in enumerate(
            zip(self.layers, self._windows, caches, strict=True), start=1
        ):
            if last is not None and number == len(self.layers) and plain and ends:
                h = layer.of_last(h, last, self._rotate, masks[window], layer_cache)
            elif halves:
                h = layer.attend(h, self._rotate, masks[window], layer_cache)
                pace.evaluate(h, [] if layer_cache is None else layer_cache.state)
                h = layer.feed_forward(h)
            else:
                h = layer(h, self._rotate, masks[window], layer_cache)
            if pace.is_due(number):
                pace.evaluate(h, [] if layer_cache is None else layer_cache.state)
                check()
        if stage is not None and not ends:
            h = stage.leave(h)
            return h if last is None else h[:, -last:]
        return self.norm(h if last is None else h[:, -last:])

    def _mask(self, h: mx.array, cache: Any | None, window: int | None) -> Mask:
        """Of a batch's decode step, too: none where no row has padding."""
        padding = getattr(cache, "left_padding", None)
        if h.shape[1] > 1 or window is not None or not isinstance(padding, mx.array):
            return attention_mask(h, cache, window)
        if padding is not self._padding:
            self._padding, self._is_padded = padding, bool(np.array(padding).any())
        return attention_mask(h, cache, window) if self._is_padded else None

    def _decode(self, h: mx.array, caches: Sequence[Any], masks: Sequence[Mask]) -> mx.array:
        """A step of one token a sequence, where building the graph in Python and launching it would
        take longer than a fast device needs to run it: everything between two attentions is
        compiled, and computed without the axis of positions, which would be reshaped away and back
        around each product.
        """
        if self._pieces is None or not self._pieces.are_current(self):
            self._pieces = _Pieces(self)
        compiled = self._pieces.compiled
        x = attended = h[:, 0]  # nothing is attended yet, and the first piece does not ask for it
        held, offset = None, mx.array(0)
        for layer, piece, cache, mask in zip(self.layers, compiled, caches, masks, strict=False):
            if isinstance(cache.offset, mx.array):  # of each row
                cache.offset = caches[0].offset if held is None else held
                held = offset = cache.offset
            elif cache.offset != held:
                held = cache.offset
                offset = mx.array(held)
            x, *projected = piece(x, attended, offset)
            attended = layer.self_attn.attend(*projected, mask, cache)
        return compiled[-1](x, attended, offset)[0][:, None]


class _Pieces:
    """What a decode step computes before, between and after the attentions of the layers, compiled.

    The weights are constants of it: to hand them over with every call would take as long as the
    rest of a step does. So each is remembered with its place, to notice when one is replaced.
    """

    def __init__(self, model: Qwen2) -> None:
        # Not of the model itself, which would only be freed by the collector of cycles.
        self._layers, self._norm, self._rotate = list(model.layers), model.norm, model._rotate
        self._ends = model._stage is None or model._stage.ends
        self._parts: list[tuple[nn.Module, str, Any]] = []
        for top in (*self._layers, self._norm):
            mx.eval(top.parameters())  # a lazy one would be read and joined again in every step
            for module in top.modules():
                self._parts += [
                    (module, name, part)
                    for name, part in module.items()
                    if isinstance(part, mx.array | nn.Module)
                ]
        self.compiled = [self._piece(n) for n in range(len(self._layers) + 1)]

    def are_current(self, model: Qwen2) -> bool:
        return (
            len(model.layers) == len(self._layers)
            and model.norm is self._norm
            and all(new is old for new, old in zip(model.layers, self._layers, strict=True))
            and all(module.get(name) is part for module, name, part in self._parts)
        )

    def _piece(self, number: int) -> Callable[..., tuple[mx.array, ...]]:
        """What comes after the attention of layer ``number`` - 1 and before that of ``number``.

        Among ranks, what stands between two sums is compiled, and not the sums: their order, which
        must be the same on all ranks, and their count are those of the calls in Python.
        """
        layers, norm, rotate = self._layers, self._norm, self._rotate
        last, ends = number == len(layers), self._ends

        def enter(x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            if last:
                return (norm(x) if ends else x,)
            return x, *layers[number].before_attention(x, rotate, offset)

        if not number:
            return mx.compile(lambda x, attended, offset: enter(x, offset))
        layer = layers[number - 1]
        attention, mlp = layer.self_attn, layer.mlp

        def feed(x: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
            x = x + attended
            return x, mlp.part(layer.post_attention_layernorm(x))

        def leave(x: mx.array, fed: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            return enter(x + fed, offset)

        shared = attention.group is not None
        if shared:
            feed, leave = mx.compile(feed), mx.compile(leave)

        def piece(x: mx.array, attended: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            x, fed = feed(x, all_sum(attention.combine_one(attended), attention.group))
            return leave(x, all_sum(fed, mlp.group), offset)

        return piece if shared else mx.compile(piece)


def attention(
    queries: mx.array, keys: Any, values: Any, scale: float, mask: Mask, cache: Any | None
) -> mx.array:
    """Attention, also to the keys and values of a cache that keeps them quantized: in a decode step
    as they are, in a longer one dequantized, so that no scores have to be held.
    """
    if cache is not None and hasattr(cache, "bits"):
        settings = {"group_size": cache.group_size, "bits": cache.bits}
        if queries.shape[2] == 1 and not isinstance(mask, str):
            from mlx_lm.models.base import quantized_scaled_dot_product_attention

            return quantized_scaled_dot_product_attention(
                queries,
                keys,
                values,
                scale,
                mask,
                **settings,
            )
        keys, values = (mx.dequantize(*x, dtype=queries.dtype, **settings) for x in (keys, values))
    elif mask == "causal" and cache is not None and on_cuda():
        from mlx_lm.models.cache import KVCache

        if type(cache) is KVCache:
            return _attention_in_steps(queries, cache, scale)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _attention_in_steps(queries: mx.array, cache: Any, scale: float) -> mx.array:
    """Causal attention to a cache, computed for whole steps of it. On CUDA, MLX has cuDNN plan
    every pair of lengths that it has not seen, which takes longer than the prefill of a turn.
    """
    stop = cache.offset
    start = stop - queries.shape[2]
    first = start // CACHE_STEP * CACHE_STEP
    # No real query sees what lies behind ``stop``.
    last = min(-(-stop // CACHE_STEP) * CACHE_STEP, cache.keys.shape[2])
    padded = mx.pad(queries, [(0, 0), (0, 0), (start - first, last - stop), (0, 0)])
    keys, values = (held[..., :last, :] for held in (cache.keys, cache.values))
    attended = mx.fast.scaled_dot_product_attention(
        padded, keys, values, scale=scale, mask="causal"
    )
    return attended[..., start - first : stop - first, :]


def attention_mask(h: mx.array, cache: Any | None, window: int | None) -> Mask:
    """Causal, or causal within a window; in the cheapest form that says it."""
    L = h.shape[1]
    if cache is not None:
        return cache.make_mask(L, return_array=False, window_size=window)
    if window is None or L <= window:
        return None if L == 1 else "causal"
    positions = mx.arange(L)
    behind = positions[:, None] - positions[None]
    return (behind >= 0) & (behind < window)
