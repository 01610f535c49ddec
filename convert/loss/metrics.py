"""A measured loss: divergence of next-token distributions, layer errors, sizes."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.network.memory_sizes import Footprint

Logits = NDArray[np.float32]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """For each position the Kullback-Leibler divergence of the result's distribution from the
    source's, in nats; whether both have the same likeliest token; and the loss of both
    on the token that follows.
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
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


Part = Literal["tower", "projector", "language"]
PARTS: tuple[Part, ...] = ("tower", "projector", "language")


@dataclass(frozen=True)
class LayerLoss:
    """``error`` is the mean over sampled rows of |result - source| / |source|, Euclidean.

    Errors accumulate: a layer's own share is the rise over the one before it.
    """

    part: Part
    number: int
    error: float


@dataclass(frozen=True)
class DivergenceStats:
    """Mean, 99th percentile and maximum of the KL divergence over some positions, in nats, and the
    share of positions (0 to 1) at which both models have the same likeliest token.
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

    all, conversations, texts, probes : over every position, those of the probes that are answered,
        those of texts that are only read, and those of each probe; never over rows of media.
    tower_cosine_mean, tower_cosine_min : cosine between the features that the tower gives for the
        same patch; None without media.
    source_perplexity, result_perplexity : on the texts; None without any.
    bits_per_weight : of the result, scales and padding included, for each number of the source.
    weights_bytes : of the result's tensors; ``source_weights_bytes`` of the source's.
    disk_bytes : of all files in the result's folder; a new one has no card and manifest yet.
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
        result, source = self.result_perplexity, self.source_perplexity
        return None if result is None or source is None else result / source

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        extra = {"memory": self.memory.to_dict(), "perplexity_ratio": self.perplexity_ratio}
        return dataclasses.asdict(self) | extra
