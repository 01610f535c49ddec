# pyright: reportUnknownMemberType=false
"""A language model whose layers are divided among ranks (pipeline parallelism): each computes a run
of consecutive layers.

As in mlx-lm (models/pipeline.py), the last rank has the first layers, the embedding and the tower,
and rank 0 has the last ones and the head, so that the answer arises where it is printed. Hidden
states go from each rank to the one with the next lower number.

All ranks go through the same steps. Only rank 0 has logits; it sends the others the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.distributed import receive, send

Split = Literal["auto"] | Sequence[float]


@dataclass(frozen=True)
class Stage:
    """This rank's part of the model. ``counts`` : how many layers each rank has, rank 0 first."""

    group: mx.distributed.Group
    counts: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def begins(self) -> bool:
        """Whether it has the first layers, the embedding, the projector and the tower."""
        return self.rank == len(self.counts) - 1

    @property
    def behind(self) -> int:
        """How many ranks have layers before its own."""
        return len(self.counts) - 1 - self.rank

    @property
    def ends(self) -> bool:
        """Whether it has the last layers and the head."""
        return self.rank == 0

    @property
    def layers(self) -> range:
        """The numbers of its layers in the whole model, from 0."""
        first = sum(self.counts[self.rank + 1 :])
        return range(first, first + self.counts[self.rank])

    def enter(self, h: mx.array) -> mx.array:
        """The hidden states (B, L, hidden_size) that the rank with the layers before sends; ``h``
        itself where the model begins. Elsewhere only its shape and type are used.
        """
        return h if self.begins else receive(h, self.rank + 1, self.group)

    def leave(self, h: mx.array) -> mx.array:
        """Sends hidden states to the rank with the layers behind; none where the model ends."""
        if self.ends:
            return h
        sent = send(h, self.rank - 1, self.group)
        # No later evaluation needs its result, so without this MLX would never send it; and later
        # sends must follow it.
        mx.async_eval(sent)
        return sent


def of_layers(config: OneVisionConfig, layers: range) -> OneVisionConfig:
    """The configuration of a model that has only these layers."""
    text = config.text_config
    kinds = text.layer_types[layers.start : layers.stop]
    own = replace(text, num_hidden_layers=len(layers), layer_types=kinds)
    return replace(config, text_config=own)


def counts(
    split: Split, layers: Sequence[int], first: int, last: int, limits: Sequence[int]
) -> tuple[int, ...]:
    """How many layers each rank gets, rank 0 first.

    split : the ranks' shares, whatever their sum: 30 and 50 are 30 and 50 of 80 layers, or of
        another number in proportion. "auto" fills the memory of all ranks equally.
    layers : bytes of each layer.
    first, last : bytes of what else the ranks with the first and with the last layers hold.
    limits : bytes of memory of each rank.
    """
    ranks, number = len(limits), len(layers)
    found, mean = [1] * ranks, sum(layers) / number
    others = [last, *[0] * (ranks - 2), first]

    def fill(rank: int) -> float:
        """How full a rank is with one layer more: of its memory, or of its share."""
        if split == "auto":
            return (others[rank] + (found[rank] + 1) * mean) / limits[rank]
        return (found[rank] + 0.5) / split[rank]

    for _ in range(number - ranks):
        found[min(range(ranks), key=fill)] += 1
    return tuple(found)
