# pyright: reportUnknownMemberType=false
"""The processes that ``mlx.launch`` started together: which of them this is, what they send each
other, and whether the others are still there. The only place that initialises MLX's communication;
a process that was started by itself neither imports nor initialises anything.

Ranks that compute together must begin the same sums and gathers in the same order. So those of a
step form one chain: each depends on the result of the one before.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_onevision.errors import OneVisionError

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass
class Traffic:
    """What this rank has sent in all, counted when an operation begins, by what MLX's ring sends:
    for a sum of ``n`` bytes over ``r`` ranks 2 (r - 1) n / r, for a gather of parts of ``n`` bytes
    (r - 1) n.
    """

    sent: int = 0  # bytes


TRAFFIC = Traffic()
RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # of ring, JACCL and NCCL; of MPI


def launched() -> bool:
    """Whether ``mlx.launch`` has started this process."""
    return any(name in os.environ for name in RANKS)


def rank() -> int:
    """This process's number, 0 for one that was started by itself; nothing is initialised."""
    return int(next((os.environ[name] for name in RANKS if name in os.environ), 0))


def prefix() -> str:
    """What an error of this process begins with: among ranks, whose it is."""
    return f"rank {rank()}: " if launched() else ""


class World(NamedTuple):
    """This process among those that were started together.

    local : whether all of them run on this machine.
    """

    rank: int = 0
    size: int = 1
    local: bool = True


def world() -> World:
    """Which of how many processes this is, by the environment that ``mlx.launch`` sets; nothing is
    initialised.
    """
    get = os.environ.get
    if number := get("OMPI_COMM_WORLD_RANK"):
        size = int(get("OMPI_COMM_WORLD_SIZE", 1))
        return World(int(number), size, int(get("OMPI_COMM_WORLD_LOCAL_SIZE", 0)) == size)
    if size := get("MLX_WORLD_SIZE"):  # NCCL
        return World(rank(), int(size), get("NCCL_HOST_IP", "").startswith("127."))
    path = get("MLX_HOSTFILE") or get("MLX_IBV_DEVICES")  # ring, JACCL
    text = Path(path).read_text(encoding="utf-8") if path else ""
    hosts = json.loads(text) if text.strip() else [["127.0.0.1"]]
    local = all(str(address).startswith("127.") for host in hosts for address in host)
    return World(rank(), len(hosts), local)


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
    """The sum of the ranks' arrays, of the shape of each; ``x`` itself for one process alone."""
    if ranks is None:
        return x
    import mlx.core as mx

    TRAFFIC.sent += 2 * (ranks.size() - 1) * x.nbytes // ranks.size()
    return mx.distributed.all_sum(x, group=ranks)


def all_gather(x: "mx.array", ranks: "mx.distributed.Group | None") -> "mx.array":
    """The arrays of all ranks (n, ...) as one, (ranks * n, ...); ``x`` itself for one alone."""
    if ranks is None:
        return x
    import mlx.core as mx

    TRAFFIC.sent += (ranks.size() - 1) * x.nbytes
    return mx.distributed.all_gather(x, group=ranks)


def join(x: "mx.array", ranks: "mx.distributed.Group | None") -> "mx.array":
    """The arrays of all ranks (..., n) as one, (..., ranks * n); ``x`` itself for one alone."""
    if ranks is None:
        return x
    gathered = all_gather(x[None], ranks)
    return gathered.moveaxis(0, -2).reshape(*x.shape[:-1], -1)


def send(x: "mx.array", to: int, ranks: "mx.distributed.Group") -> "mx.array":
    """``x``, which is sent to another rank when what this returns is evaluated."""
    import mlx.core as mx

    TRAFFIC.sent += x.nbytes
    return mx.distributed.send(x, to, group=ranks)


def receive(like: "mx.array", source: int, ranks: "mx.distributed.Group") -> "mx.array":
    """What another rank sends, of the shape and type of ``like``."""
    import mlx.core as mx

    return mx.distributed.recv_like(like, source, group=ranks)


def gather_integers(values: Sequence[int], ranks: "mx.distributed.Group") -> list[list[int]]:
    """The integers of every rank, in their order, for all of them; each rank gives as many."""
    import mlx.core as mx

    gathered: Any = all_gather(mx.array([list(values)], mx.int64), ranks).tolist()
    return gathered


def gather_texts(text: str, ranks: "mx.distributed.Group") -> list[str]:
    """The text of every rank, in their order, for all of them."""
    import mlx.core as mx
    import numpy as np

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.array(all_gather(mx.array([len(data)]), ranks), np.int64)  # (ranks,)
    padded = np.pad(data, (0, sizes.max() - len(data)))[None]
    gathered = np.array(all_gather(mx.array(padded), ranks), np.uint8)  # uint8 (ranks, longest)
    return [row[:size].tobytes().decode() for row, size in zip(gathered, sizes, strict=True)]


def least(values: Sequence[float], ranks: "mx.distributed.Group | None") -> list[float]:
    """The smallest of each value over all ranks, rounded to float32; every rank gets the same."""
    if ranks is None:
        return list(values)
    import mlx.core as mx

    gathered = all_gather(mx.array([list(values)], mx.float32), ranks)  # (ranks, values)
    found: Any = gathered.min(axis=0).tolist()
    return found


class Links:
    """The TCP connections to other ranks, of the backends ring and JACCL; on other backends there
    are none. They are polled for an end, and never read from: MLX 0.32.4 may wait for ever in a sum
    that begins just after another rank has ended.
    """

    def __init__(self) -> None:
        ports = set(_ports())
        self.sockets = [found for fd in _descriptors() if (found := _connection(fd, ports))]

    def lost(self) -> bool:
        """Whether a rank at another end has ended."""
        return any(map(_closed, self.sockets))


def _ports() -> Iterator[int]:
    """The ports on which ranks listen for each other."""
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
    """A duplicate of a descriptor's connection, where one of its ends has one of ``ports``."""
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
