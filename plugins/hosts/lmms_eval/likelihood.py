"""How likely an answer is, as the reference measures it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Likelihood:
    """loss : minus the mean logarithm of the probabilities of the answer's tokens, its end of turn
    included. greedy : whether each of the answer's own tokens is the likeliest in its place.
    """

    loss: float
    greedy: bool


def likelihood(
    logits: NDArray[np.floating], following: NDArray[np.integer], own: int
) -> Likelihood:
    """logits : (n, vocabulary), of the positions before each of ``following``, (n,).
    own : so many of these are the answer's, the others end it.
    """
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    chosen = rows[np.arange(len(following)), following]
    losses = np.log(np.exp(rows).sum(axis=-1)) - chosen
    greedy = rows.argmax(axis=-1)[:own] == following[:own]
    return Likelihood(float(losses.mean()), bool(greedy.all()))
