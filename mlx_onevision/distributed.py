"""The processes that ``mlx.launch`` started together, where it did; the only place that initialises
MLX's communication. A process that was started by itself neither imports nor initialises anything.

Ranks that compute together must begin the same sums and gathers in the same order. So those of a
step all stand in one chain: each needs what came of the one before.
"""

import json
import os
import select
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from mlx_onevision.errors import OneVisionError

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass
class Traffic:
    """What a rank has sent, counted when a sum or gather is begun, as a ring sends it: each rank
    sends a sum's values on twice, but for a share each time, and a gather's parts all but one.
    """

    sent: int = 0  # bytes


TRAFFIC = Traffic()
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # of ring, JACCL and NCCL; of MPI


def launched() -> bool:
    return any(name in os.environ for name in RANKS)


def rank() -> int:
    """This process's number, 0 for one that was started by itself; nothing is initialised."""
    return int(next((os.environ[name] for name in RANKS if name in os.environ), 0))


def prefix() -> str:
    """What an error of this process begins with: among ranks, whose it is."""
    return f"rank {rank()}: " if launched() else ""


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


def all_sum(x: "mx.array", ranks: "mx.distributed.Group | None") -> "mx.array":
    """The sum over the ranks; ``x`` itself for one alone."""
    if ranks is None:
        return x
    import mlx.core as mx

    TRAFFIC.sent += 2 * (ranks.size() - 1) * x.nbytes // ranks.size()
    return mx.distributed.all_sum(x, group=ranks)


def all_gather(x: "mx.array", ranks: "mx.distributed.Group | None") -> "mx.array":
    """What all ranks have, along the first axis; ``x`` itself for one alone."""
    if ranks is None:
        return x
    import mlx.core as mx

    TRAFFIC.sent += (ranks.size() - 1) * x.nbytes
    return mx.distributed.all_gather(x, group=ranks)


def join(x: "mx.array", ranks: "mx.distributed.Group | None") -> "mx.array":
    """What all ranks have, along the last axis."""
    if ranks is None:
        return x
    gathered = all_gather(x[None], ranks)
    return gathered.moveaxis(0, -2).reshape(*x.shape[:-1], -1)


def send(x: "mx.array", to: int, ranks: "mx.distributed.Group") -> "mx.array":
    """``x``, sent to another rank once it is evaluated."""
    import mlx.core as mx

    TRAFFIC.sent += x.nbytes
    return mx.distributed.send(x, to, group=ranks)


def receive(like: "mx.array", source: int, ranks: "mx.distributed.Group") -> "mx.array":
    """What another rank sends, of the shape and type of ``like``."""
    import mlx.core as mx

    return mx.distributed.recv_like(like, source, group=ranks)


def gather_integers(values: Sequence[int], ranks: "mx.distributed.Group") -> list[list[int]]:
    """Those of each rank, for all of them."""
    import mlx.core as mx

    gathered: Any = all_gather(mx.array([list(values)], mx.int64), ranks).tolist()
    return gathered


class Links:
    """The connections to other ranks: TCP, of the backends ring and JACCL. They are looked at, and
    never read from; on other backends there are none.

    For in MLX 0.32.4 a sum that begins just after another rank has ended may wait for ever.
    """

    def __init__(self) -> None:
        ports = set(_ports())
        self.sockets = [found for fd in _descriptors() if (found := _connection(fd, ports))]

    def lost(self) -> bool:
        """Whether a rank at another end has ended."""
        return any(map(_closed, self.sockets))


def _ports() -> Iterator[int]:
    """On which ranks listen for each other."""
    addresses = [os.environ.get("MLX_JACCL_COORDINATOR", "")]
    if file := os.environ.get("MLX_HOSTFILE"):
        with open(file, encoding="utf-8") as hosts:
            addresses += [address for host in json.load(hosts) for address in host]
    for address in addresses:
        port = address.rpartition(":")[2]
        if port.isdecimal():
            yield int(port)


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/dev/fd")]


def _connection(descriptor: int, ports: set[int]) -> socket.socket | None:
    """The connection that it is, where one of its ends has one of the ports."""
    try:
        found = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # it is something else, or closed by now
        return None
    try:
        ends = found.getsockname(), found.getpeername()
        if any(end[1] in ports for end in ends if isinstance(end, tuple)):
            return found
    except OSError:  # it listens
        pass
    found.close()
    return None


def _closed(connection: socket.socket) -> bool:
    """Whether the other end has closed. A read would not say so while there is data that MLX has
    not taken yet, and where it waits for something else it never takes it.
    """
    if sys.platform == "linux":
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        return bool(poll.poll(0))
    with closing(select.kqueue()) as queue:
        readable = select.kevent(connection, select.KQ_FILTER_READ, select.KQ_EV_ADD)
        return any(one.flags & select.KQ_EV_EOF for one in queue.control([readable], 1, 0))


def gather_texts(text: str, ranks: "mx.distributed.Group") -> list[str]:
    """A text of each rank, for all of them."""
    import mlx.core as mx
    import numpy as np

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.array(all_gather(mx.array([len(data)]), ranks))
    gathered = np.array(
        all_gather(mx.array(np.pad(data, (0, sizes.max() - len(data)))[None]), ranks)
    )
    return [row[:size].tobytes().decode() for row, size in zip(gathered, sizes, strict=True)]


def least(values: Sequence[float], ranks: "mx.distributed.Group | None") -> list[float]:
    """The least of each value over all ranks, in float32: every rank gets the same."""
    if ranks is None:
        return list(values)
    import mlx.core as mx

    gathered = all_gather(mx.array([list(values)], mx.float32), ranks)
    return [float(value) for value in gathered.min(axis=0).tolist()]  # pyright: ignore
