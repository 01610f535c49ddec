"""The processes that ``mlx.launch`` started together, where it did; the only place that initialises
MLX's communication. A process that was started by itself neither imports nor initialises anything.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from mlx_onevision.errors import OneVisionError

if TYPE_CHECKING:
    import mlx.core as mx

RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # of ring, JACCL and NCCL; of MPI


def launched() -> bool:
    return any(name in os.environ for name in RANKS)


def rank() -> int:
    """This process's number, 0 for one that was started by itself; nothing is initialised."""
    return int(next((os.environ[name] for name in RANKS if name in os.environ), 0))


@cache
def group() -> "mx.distributed.Group | None":
    """The group of all processes; None for one alone. Connects to the others when first called.

    Raises:
        OneVisionError: where the others cannot be reached.
    """
    if not launched():
        return None
    import mlx.core as mx

    try:
        found = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise OneVisionError(f"rank {rank()} does not reach the other ranks: {error}") from error
    if found.rank() != rank():
        raise OneVisionError(
            f"MLX found no other ranks for rank {rank()}; start all with one mlx.launch, and name "
            "a --backend that every machine has"
        )
    return found if found.size() > 1 else None


def least(values: Sequence[float], ranks: "mx.distributed.Group | None") -> list[float]:
    """The least of each value over all ranks, in float32: every rank gets the same."""
    if ranks is None:
        return list(values)
    import mlx.core as mx

    gathered = mx.distributed.all_gather(mx.array([list(values)], mx.float32), group=ranks)
    return [float(value) for value in gathered.min(axis=0).tolist()]  # pyright: ignore
