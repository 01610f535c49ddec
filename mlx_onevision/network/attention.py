# pyright: reportUnknownMemberType=false
"""Attention of the language model: rotary positions, masks, and the products with a KV cache."""

from typing import Any

import mlx.core as mx

from mlx_onevision.config.networks import TextConfig
from mlx_onevision.network.layers import on_cuda
from mlx_onevision.network.memory_sizes import CACHE_STEP

Mask = mx.array | str | None
"""Which keys a query sees: a boolean array that broadcasts to (B, heads, queries, keys), "causal",
or None for all of them."""


class RotaryEmbedding:
    """Rotates pairs of dimensions half a head apart by angles that grow with the position:
    ``Qwen2RotaryEmbedding`` and ``apply_rotary_pos_emb`` of the reference (modeling_qwen2.py).
    """

    def __init__(self, config: TextConfig) -> None:
        self.dims = config.head_dim
        inverse, self.length = config.rope.frequencies(
            config.head_dim, config.max_position_embeddings
        )
        # mx.fast.rope takes the reciprocals: (head_dim / 2,), in positions a radian.
        self.periods = mx.array(1.0 / inverse.astype("float64"), mx.float32)

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """``x`` (B, heads, L, head_dim) rotated. offset : the first position; of each row, (B,)."""
        settings: dict[str, Any] = {"traditional": False, "base": None, "scale": 1.0}
        x = mx.fast.rope(x, self.dims, offset=offset, freqs=self.periods, **settings)
        return x if self.length == 1.0 else x * self.length


def attention(
    queries: mx.array, keys: Any, values: Any, scale: float, mask: Mask, cache: Any | None
) -> mx.array:
    """What each query reads, (B, heads, L, head_dim).

    queries : (B, heads, L, head_dim).
    keys, values : (B, kv_heads, positions, head_dim), or the triples of a quantized cache. Those
        are used as they are in a decode step, and dequantized in a longer one, for a fused kernel
        that holds no scores.
    cache : where they come from, if from one.
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
    """Causal attention to a cache, padded to multiples of ``CACHE_STEP`` positions: on CUDA, MLX
    lets cuDNN plan every new pair of lengths, which takes longer than the prefill of a turn.
    """
    stop = cache.offset
    start = stop - queries.shape[2]
    first = start // CACHE_STEP * CACHE_STEP
    # The causal mask hides what lies behind ``stop`` from all queries but those of the padding.
    last = min(-(-stop // CACHE_STEP) * CACHE_STEP, cache.keys.shape[2])
    padded = mx.pad(queries, [(0, 0), (0, 0), (start - first, last - stop), (0, 0)])
    keys, values = (held[..., :last, :] for held in (cache.keys, cache.values))
    attended = mx.fast.scaled_dot_product_attention(
        padded, keys, values, scale=scale, mask="causal"
    )
    return attended[..., start - first : stop - first, :]


def attention_mask(h: mx.array, cache: Any | None, window: int | None) -> Mask:
    """A causal mask for hidden states (B, L, D) behind the positions of ``cache``, within a
    ``window`` of positions if there is one; in the cheapest form that expresses it.
    """
    L = h.shape[1]
    if cache is not None:
        return cache.make_mask(L, return_array=False, window_size=window)
    if window is None or L <= window:
        return None if L == 1 else "causal"
    positions = mx.arange(L)
    behind = positions[:, None] - positions[None]  # (queries, keys)
    return (behind >= 0) & (behind < window)
