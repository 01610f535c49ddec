"""A language model whose layers are divided among ranks: each computes consecutive ones of them.

As in mlx-lm, the last rank has the first layers and rank 0 the last ones, and with them the head,
so that the answer comes out where it is printed. Hidden states go from each rank to the one before
it. The embedding, and with it the tower, is where they begin.

All ranks go through the same steps. Those that only have layers before the last ones have nothing
to choose a token from, and get rank 0's.
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
    """A rank's layers. ``counts`` : how many each rank has, rank 0 first."""

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
        first = sum(self.counts[self.rank + 1 :])
        return range(first, first + self.counts[self.rank])

    def enter(self, h: mx.array) -> mx.array:
        """The hidden states that come from the rank before this; of ``h`` only the shape counts,
        except where the model begins.
        """
        return h if self.begins else receive(h, self.rank + 1, self.group)

    def leave(self, h: mx.array) -> mx.array:
        """Sends them on, except where the model ends."""
        if self.ends:
            return h
        sent = send(h, self.rank - 1, self.group)
        # Nothing that is evaluated later needs it; and it goes before what later steps send.
        mx.async_eval(sent)
        return sent


def of_layers(config: OneVisionConfig, layers: range) -> OneVisionConfig:
    """The configuration of a model of these layers alone."""
    text = config.text_config
    kinds = text.layer_types[layers.start : layers.stop]
    own = replace(text, num_hidden_layers=len(layers), layer_types=kinds)
    return replace(config, text_config=own)


def counts(
    split: Split, layers: Sequence[int], first: int, last: int, limits: Sequence[int]
) -> tuple[int, ...]:
    """How many layers each rank has, rank 0 first.

    split : the ranks' shares, whatever they sum to: 30 and 50 are 30 and 50 of 80 layers, and of
        others as many in proportion. "auto": each rank's memory is as full as the others'.
    layers : bytes of each. ``first``, ``last`` : of what else the ranks with the first and the last
        layers hold.
    limits : bytes of memory of each rank.
    """
    ranks, number = len(limits), len(layers)
    found, mean = [1] * ranks, sum(layers) / number
    others = [last, *[0] * (ranks - 2), first]

    def fill(rank: int) -> float:
        """With one layer more, of its memory or of its share."""
        if split == "auto":
            return (others[rank] + (found[rank] + 1) * mean) / limits[rank]
        return (found[rank] + 0.5) / split[rank]

    for _ in range(number - ranks):
        found[min(range(ranks), key=fill)] += 1
    return tuple(found)
