# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""The memory of this device: what of it a model may use, and the sizes of a loaded one."""

import os
import threading
import uuid
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.distributed import gather_integers, gather_texts, least
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.network.layers import (
    ARRAYS,
    JOINED,
    LongStepLinear,
    arrays_of,
    device_kind,
    fewest_dense_rows,
    modules_of,
)
from mlx_onevision.network.memory_budget import MemoryModel
from mlx_onevision.network.memory_sizes import CHUNKS, NEVER
from mlx_onevision.network.stages import Stage

# Of a machine's memory, or of what a container may use: the rest is the system's and the program's.
USABLE = 7 / 8
CGROUPS = Path("/sys/fs/cgroup")


def working_set() -> int:
    """Bytes of memory that the device should use: Metal's advice, a GPU's own memory, or else of
    the machine's, or of what this process is limited to, :data:`USABLE`.
    """
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if key in info:
            return int(info[key])
    return int(USABLE * host_memory())


def ranks_here(group: mx.distributed.Group | None) -> int:
    """How many processes of a group share this one's device: those of its machine, or on CUDA,
    where each rank has a GPU of its own, this one alone.
    """
    if group is None or device_kind() == "cuda":
        return 1
    machines = gather_texts(machine(), group)
    return machines.count(machines[group.rank()])


def machine() -> str:
    """An identifier of this machine: the boot's on Linux, else the network interface's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return str(uuid.getnode())


def host_memory() -> int:
    """Bytes of memory of the machine, or fewer where a control group, as of a container or a batch
    job, limits this process.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return memory
    return min([memory, *cgroup_limits(groups, CGROUPS)])


def cgroup_limits(groups: str, root: Path) -> Iterator[int]:
    """Bytes that control groups allow, of both versions; ``groups`` : as in /proc/self/cgroup. The
    groups above limit, too. Inside a container its own may be the root, whatever its path outside.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder == root.parent:
                break
            with suppress(OSError, ValueError):  # no such group here, or "max"
                yield int((folder / name).read_text(encoding="ascii"))


def memory_model(checkpoint: Checkpoint, kv_bits: int | None) -> MemoryModel:
    """The sizes of a model on this device."""
    model, on_cpu = checkpoint.model, device_kind() == "cpu"
    modules = modules_of(model)
    joined = [m[name] for m in modules.values() for name in JOINED if name in m]
    dense_rows = {
        name: fewest_dense_rows(module, model.dtype)
        for name, module in modules.items()
        if isinstance(module, LongStepLinear)
    }
    language = [n for name, n in dense_rows.items() if name.startswith("language_model")]
    vision = [n for name, n in dense_rows.items() if not name.startswith(("language_model", "lm_"))]
    # Measured; ranks must plan the same steps.
    lowest, tower = least([min(language, default=NEVER), min(vision, default=NEVER)], model.group)
    return MemoryModel(
        model.config,  # of this rank's share
        sum(array.nbytes for array in arrays_of(model.parameters()).values()),
        itemsize=model.dtype.size,
        backend=device_kind(),
        kv_bits=kv_bits,
        # A CPU is no faster with more, and a prompt can be interrupted between two of them.
        most_chunk=CHUNKS[-1] if on_cpu else CHUNKS[0],
        dense_rows=lowest,
        dense_tower=tower <= checkpoint.config.tokens_per_tile,
        joined=max((sum(m[n].nbytes for n in ARRAYS if n in m) for m in joined), default=0),
        has_tower=model.stage is None or model.stage.begins,
    )


def among_stages(own: MemoryModel, limit: int, stage: Stage) -> MemoryModel:
    """``own`` with the sizes of the other ranks, by which all ranks plan. ``limit`` : bytes that
    this rank may use.
    """
    others: list[tuple[MemoryModel, int]] = []
    found = gather_integers([own.weights, own.joined, own.has_tower, limit], stage.group)
    for rank, (weights, joined, has_tower, most) in enumerate(found):
        if rank != stage.rank:
            text = replace(own.config.text_config, num_hidden_layers=stage.counts[rank])
            config = replace(own.config, text_config=text)
            other = replace(own, config=config, weights=weights, joined=joined)
            others.append((replace(other, has_tower=bool(has_tower)), most))
    return replace(own, others=tuple(others))


@dataclass(eq=False)
class Share:
    """What one of this process's models may use: its weights, and a part of what those of all
    leave free of the device.

    weights : bytes of them. most : bytes that it may use by its own limit. smaller : called, on
        another thread, when the part has become smaller. left : for good.
    """

    weights: int
    most: int
    smaller: Callable[[], None]
    left: bool = False


class Shares:
    """Divides what the device should use among the models of this process. What the weights leave
    free is divided in equal parts, and what one may not use by its own limit goes to the others.
    So each plans for itself, and all of them together never for more than there is.
    """

    def __init__(self, total: Callable[[], int]) -> None:
        self._total = total
        self._lock = threading.RLock()  # a model may be collected within it
        self._shares: list[Share] = []

    def join(self, share: Share, admit: Callable[[int], None] = lambda limit: None) -> None:
        """Counts a model, before its weights are read: of two that are loaded at once, the second
        has what the first leaves. Called again, it has changed.

        admit : raises where its limit is too small; then it is not counted.
        """
        with self._lock:
            admit(self.limit(share))
            others = [other for other in self._shares if other is not share]
            self._shares = others if share.left else [*others, share]
        for other in others:
            other.smaller()

    def leave(self, share: Share) -> None:
        with self._lock:
            share.left = True
            self._shares = [other for other in self._shares if other is not share]

    def limit(self, share: Share) -> int:
        """Bytes that it may use, one that has not joined yet, too."""
        with self._lock:
            shares = [share, *(other for other in self._shares if other is not share)]
        free = self._total() - sum(each.weights for each in shares)
        if free < 0:
            return min(share.most, share.weights + free)
        wanted = sorted((max(0, each.most - each.weights), each is not share) for each in shares)
        for place, (most, other) in enumerate(wanted):
            part = min(most, free // (len(wanted) - place))
            if not other:
                return min(share.most, share.weights + part)
            free -= part
        raise AssertionError("it is among them")

    @contextmanager
    def counted(self, share: Share) -> Generator[None]:
        """OutOfMemoryErrors say what other models hold, if that is taken from this one's limit."""
        try:
            yield
        except OutOfMemoryError as error:
            with self._lock:
                others = sum(other.weights for other in self._shares if other is not share)
            if not others or self.limit(share) >= share.most:
                raise
            text = f"{error}, or close another: those of this process hold {others / 1e9:.2f} GB"
            raise type(error)(text) from None


class ProcessLimit:
    """MLX's own limit, one a process: it makes its cache of freed buffers count, too. It is what
    the models of this process may use together, and MLX's default while one has no limit or none
    is left.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a model may be collected within it
        self._limits: dict[object, int | None] = {}
        self._applied: int | None = None
        self._default = 0  # known while one is applied

    def hold(self, owner: object, limit: int | None) -> None:
        """Counts a limit, or that there is none, as long as ``owner`` is there."""
        key = object()
        with self._lock:
            self._limits[key] = limit
            self._apply()
        weakref.finalize(owner, self._leave, key)

    def _leave(self, key: object) -> None:
        with self._lock:
            del self._limits[key]
            self._apply()

    def _apply(self) -> None:
        while (wanted := self._wanted()) != self._applied:  # again if one was collected meanwhile
            if self._applied is None:
                self._default = mx.get_memory_limit()
            mx.set_memory_limit(self._default if wanted is None else wanted)
            self._applied = wanted

    def _wanted(self) -> int | None:
        limits = list(self._limits.values())
        given = [limit for limit in limits if limit is not None]
        return min(sum(given), working_set()) if given and len(given) == len(limits) else None


@contextmanager
def wired() -> Generator[None]:
    """On a Mac, keeps the memory in use resident while a request runs, and only then."""
    limit = mx.device_info().get("max_recommended_working_set_size")
    if limit is None:
        yield
        return
    before = mx.set_wired_limit(int(limit))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


shares = Shares(lambda: working_set())
process_limit = ProcessLimit()
"""Both of this process."""
