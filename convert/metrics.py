"""A measured loss: divergence of next-token distributions, layer errors, sizes."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.convert.fit import Footprint

Logits = NDArray[np.float32]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """One entry for each position.

    kl : Kullback-Leibler divergence of the result's distribution from the source's, in nats.
    same : whether both have the same likeliest token.
    source_loss, result_loss : minus the logarithm of the probability of the token that follows.
    """

    kl: Numbers
    same: NDArray[np.bool_]
    source_loss: Numbers
    result_loss: Numbers


def diverge(source: Logits, result: Logits, following: NDArray[np.integer]) -> Divergence:
    """Compares logits (positions, vocabulary), before ``following`` ids, in double precision."""
    p, q = _log_softmax(source), _log_softmax(result)
    at = (np.arange(len(following)), following)
    # Never negative but for rounding, which is of the size of 1e-16.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    same = source.argmax(axis=-1) == result.argmax(axis=-1)
    return Divergence(kl, same, -p[at], -q[at])


def _log_softmax(logits: Logits) -> Numbers:
    """Over the last axis. The largest entry is taken off first, so that nothing overflows."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


Part = Literal["tower", "projector", "language"]


@dataclass(frozen=True)
class LayerLoss:
    """``error`` is the mean over sampled rows of |result - source| / |source|, Euclidean.

    Errors accumulate: the result's layer is fed what the result's layers below it gave, as when it
    answers. So a layer's own share is the rise over the one before it, and the last one's error is
    what reaches the head.
    """

    part: Part
    number: int
    error: float


@dataclass(frozen=True)
class DivergenceStats:
    """How far the distributions over the next token are apart, at some of the positions.

    kl_mean, kl_p99, kl_max : Kullback-Leibler divergence of the result's distribution from the
        source's, nats a position: the mean, the 99th percentile and the largest.
    top1_agreement : share of positions at which both have the same likeliest token, 0 to 1.
    """

    name: str
    positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True)
class Loss:
    """What was lost between two folders.

    all, conversations, texts : over every position, over those of the probes that are answered,
        and over those of texts that are only read. Rows of media are not among the positions: what
        they predict is neither trained nor read.
    probes : the same for each probe.
    tower_cosine_mean, tower_cosine_min : cosine between the features that the tower gives for the
        same patch; None without media.
    source_perplexity, result_perplexity : on the texts; None without any.
    bits_per_weight : of the result, scales and padding included, for each number of the source.
    weights_bytes : of the result's tensors; ``source_weights_bytes`` of the source's.
    disk_bytes : of all files in the result's folder when it was measured: of a new one, without its
        model card and its manifest, which come afterwards.
    memory : an estimate of the memory in use while the result answers about one 10-tile image.
    version : of the set of probes; losses of two versions do not compare.
    """

    source: str
    result: str
    dtype: str
    version: int
    all: DivergenceStats
    conversations: DivergenceStats | None
    texts: DivergenceStats | None
    tower_cosine_mean: float | None
    tower_cosine_min: float | None
    source_perplexity: float | None
    result_perplexity: float | None
    bits_per_weight: float
    weights_bytes: int
    source_weights_bytes: int
    disk_bytes: int
    memory: Footprint
    layers: tuple[LayerLoss, ...]
    probes: tuple[DivergenceStats, ...]

    @property
    def perplexity_ratio(self) -> float | None:
        """The result's perplexity over the source's; 1 is no loss."""
        result, source = self.result_perplexity, self.source_perplexity
        return None if result is None or source is None else result / source

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        extra = {"memory": self.memory.to_dict(), "perplexity_ratio": self.perplexity_ratio}
        return dataclasses.asdict(self) | extra
