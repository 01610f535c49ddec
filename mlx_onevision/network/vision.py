# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""SigLIP (arXiv 2303.15343), the vision tower: a pre-norm ViT without a class token.

Follows transformers' ``SiglipVisionModel`` (modeling_siglip.py) up to the hidden states that
LLaVA-OneVision reads. The norm after the last layer and the pooling head are left out: their
outputs are never used.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_onevision.config.networks import VisionConfig
from mlx_onevision.media.parallel import no_check
from mlx_onevision.network.layers import ACTIVATIONS, Pace


class Attention(nn.Module):
    """Full attention among the patches of a tile: ``SiglipAttention`` of the reference."""

    qkv_proj: nn.Linear  # once fused

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        dims = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (dims // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims)
        self.v_proj = nn.Linear(dims, dims)
        self.out_proj = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        B, N, D = x.shape
        if "qkv_proj" in self:
            joined = self.qkv_proj(x)
        else:
            joined = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        joined = joined.reshape(B, N, 3, self.num_heads, -1).transpose(2, 0, 3, 1, 4)
        queries, keys, values = joined
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale)
        return self.out_proj(output.transpose(0, 2, 1, 3).reshape(B, N, D))


class MLP(nn.Module):
    """The feed-forward part of a layer: ``SiglipMLP`` of the reference."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    """One layer of hidden states (tiles, patches, hidden_size): ``SiglipEncoderLayer``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, under the name that checkpoints have for them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]


class Embeddings(nn.Module):
    """Pixel values (tiles, S, S, 3) to (tiles, patches, hidden_size)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        # The convolution has no padding: pixels that do not fill a patch are dropped.
        patches = self.patch_embedding(pixels).flatten(1, 2)  # row by row
        return patches + self.position_embedding.weight


class VisionTower(nn.Module):
    """The tower, from pixel values to the hidden states of some of its layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The type that the tower computes in."""
        return self.embeddings.patch_embedding.weight.dtype

    def __call__(
        self,
        pixels: mx.array,
        feature_layers: Sequence[int],
        interval: int = 0,
        check: Callable[[], None] = no_check,
    ) -> mx.array:
        """The hidden states (tiles, patches, hidden_size * len(feature_layers)) of tiles.

        pixels : float32 (tiles, S, S, 3), normalised.
        feature_layers : the hidden states to return, joined along the last axis. 0 is what enters
            the first layer, k what leaves the k-th. Layers above the highest one are not run.
        interval : the most layers whose values are held at once; see :class:`layers.Pace`.
        check : called at every evaluation point; what it raises ends the encoding.
        """
        x = self.embeddings(pixels.astype(self.dtype))  # (tiles, patches, hidden_size)
        states, pace = {0: x}, Pace(interval)
        for number, layer in enumerate(self.encoder.layers[: max(feature_layers)], start=1):
            x = layer(x)
            if pace.is_due(number):
                pace.evaluate(x)
                check()
            if number in feature_layers:
                states[number] = x
        return mx.concatenate([states[number] for number in feature_layers], axis=-1)
