"""How large the network is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Widths, layers and heads of the tower and of the language model."""

    vocabulary: int
    vision: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_inner: int = 512
    text: int = 192
    text_layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    text_inner: int = 512
    rope_theta: float = 10_000.0
