"""How far one distribution over the next token is from another, in double precision."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    """Compares logits, both (positions, vocabulary), where the ids ``following`` come next."""
    p, q = log_softmax(source), log_softmax(result)
    at = (np.arange(len(following)), following)
    # Never negative but for rounding, which is of the size of 1e-16.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    same = source.argmax(axis=-1) == result.argmax(axis=-1)
    return Divergence(kl, same, -p[at], -q[at])


def log_softmax(logits: Logits) -> Numbers:
    """Over the last axis. The largest entry is taken off first, so that nothing overflows."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
