"""LLaVA-OneVision in torch, as plain as can be, with the names of the published checkpoints.

The mathematics is transformers'; the differences are for speed alone. Tiles come as patches, so
that the patch convolution is a matrix product; the packing is a matrix product as well; and one
sequence holds several questions about the same media (see `buffers.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo_model.packing import PATCH, TOKENS
from examples.demo_model.samples import PREFIX, SLOTS, TEXT
from examples.demo_model.sizes import Shape


class TowerLayer(nn.Module):
    """One SigLIP layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size = shape.vision
        self.heads = shape.vision_heads
        self.layer_norm1 = nn.LayerNorm(size, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(size, size) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm2 = nn.LayerNorm(size, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(size, shape.vision_inner), "fc2": nn.Linear(shape.vision_inner, size)}
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, size = x.shape
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).view(n, length, self.heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, size)
        x = x + self.self_attn["out_proj"](h)
        h = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](h)


class Tower(nn.Module):
    """SigLIP without its head; `post_layernorm` is in the files, and not used by this family."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, shape.vision, PATCH, PATCH)
        self.embeddings.position_embedding = nn.Embedding(TOKENS, shape.vision)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([TowerLayer(shape) for _ in range(shape.vision_layers)])
        self.post_layernorm = nn.LayerNorm(shape.vision, eps=1e-6)

    def forward(self, patches: Tensor) -> Tensor:
        """Pixel values (n, TOKENS, 3 * PATCH * PATCH) to features (n, TOKENS, vision)."""
        conv = self.embeddings.patch_embedding
        x = F.linear(patches, conv.weight.flatten(1), conv.bias)
        x = x + self.embeddings.position_embedding.weight.to(x.dtype)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * full.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class TextLayer(nn.Module):
    """One Qwen2 layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        size, head = shape.text, shape.text // shape.heads
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.input_layernorm = Norm(size)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(size, size),
                "k_proj": nn.Linear(size, shape.kv_heads * head),
                "v_proj": nn.Linear(size, shape.kv_heads * head),
                "o_proj": nn.Linear(size, size, bias=False),
            }
        )
        self.post_attention_layernorm = Norm(size)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, shape.text_inner, bias=False),
                "up_proj": nn.Linear(size, shape.text_inner, bias=False),
                "down_proj": nn.Linear(shape.text_inner, size, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        n, length, size = x.shape
        h = self.input_layernorm(x)
        q = self.self_attn["q_proj"](h).view(n, length, self.heads, -1).transpose(1, 2)
        k = self.self_attn["k_proj"](h).view(n, length, self.kv_heads, -1).transpose(1, 2)
        v = self.self_attn["v_proj"](h).view(n, length, self.kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        share = self.heads // self.kv_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        mask = mask.to(q.dtype).expand(-1, self.heads, -1, -1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.self_attn["o_proj"](h.transpose(1, 2).reshape(n, length, size))
        h = self.post_attention_layernorm(x)
        h = F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)
        return x + self.mlp["down_proj"](h)


class TextModel(nn.Module):
    """Qwen2 without its head, which is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.text)
        self.layers = nn.ModuleList([TextLayer(shape) for _ in range(shape.text_layers)])
        self.norm = Norm(shape.text)
        head = shape.text // shape.heads
        step = 1.0 / shape.rope_theta ** (torch.arange(0, head, 2).float() / head)
        self.register_buffer("frequencies", step, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        angle = positions[..., None].float() * self.frequencies  # (n, length, head / 2)
        angle = torch.cat([angle, angle], -1)[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return x


class OneVision(nn.Module):
    """The whole network; `state_dict` has the names of the hub's original files."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = Tower(shape)
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear_1 = nn.Linear(shape.vision, shape.text)
        self.multi_modal_projector.linear_2 = nn.Linear(shape.text, shape.text)
        self.image_newline = nn.Parameter(torch.randn(shape.text) * 0.02)
        self.language_model = nn.Module()
        self.language_model.model = TextModel(shape)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02 if "embed" in name else 0.03)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, patches: Tensor) -> Tensor:
        """Pixel values (n, TOKENS, 3 * PATCH * PATCH) to projected features (n, TOKENS, text)."""
        x = self.vision_tower.vision_model(patches)
        projector = self.multi_modal_projector
        return projector.linear_2(F.gelu(projector.linear_1(x)))

    def read(
        self,
        media: Tensor,
        newline: Tensor,
        rows: Tensor,
        prefix: Tensor,
        ids: Tensor,
        group: Tensor,
        place: Tensor,
    ) -> Tensor:
        """Hidden states (n, TEXT, text) behind each token of the question buffers.

        media : packed features (n, SLOTS, text), zero where `newline` (n, SLOTS) is true and from
            `rows` (n,) on.
        prefix : (PREFIX,) token ids in front of the media.
        ids, group, place : (n, TEXT), `buffers.Buffers`.
        """
        model = self.language_model.model
        media = media + newline[..., None].to(media.dtype) * self.image_newline.to(media.dtype)
        n = len(ids)
        head = model.embed_tokens(prefix).expand(n, -1, -1).to(media.dtype)
        x = torch.cat([head, media, model.embed_tokens(ids).to(media.dtype)], 1)
        front = torch.arange(PREFIX + SLOTS, device=ids.device).expand(n, -1)
        before = (rows + PREFIX)[:, None]
        positions = torch.cat([front, before + place], 1)
        x = model(x, positions, reach(before, group))
        return model.norm(x[:, PREFIX + SLOTS :])

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.language_model.model.embed_tokens.weight)


def reach(before: Tensor, group: Tensor) -> Tensor:
    """What each token sees, as numbers to add (n, 1, length, length): 0, or a very negative one.

    A media row sees what is before it; a question's token sees the media and its own question.
    before : (n, 1), the true length of prefix and media.
    """
    n = len(group)
    length = PREFIX + SLOTS + TEXT
    index = torch.arange(length, device=group.device)
    own = torch.cat([group.new_zeros(n, PREFIX + SLOTS), group], 1)
    media = (index < before)[:, None, :]
    same = (own[:, None, :] == own[:, :, None]) & (own > 0)[:, None, :]
    seen = (media | same) & (index[None, None, :] <= index[None, :, None])
    zero = torch.zeros((), device=group.device, dtype=torch.bfloat16)
    return torch.where(seen, zero, zero - 1e4)[:, None]
