"""The memory of this device: what of it a model may use, and the sizes of a loaded one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.distributed import gather_integers, least
from mlx_onevision.network.layers import ARRAYS, JOINED, LongStepLinear, fewest_dense_rows
from mlx_onevision.network.memory_budget import MemoryModel
from mlx_onevision.network.memory_sizes import CHUNKS, NEVER
from mlx_onevision.network.stages import Stage


def working_set() -> int:
    """Bytes of memory that the device should use: Metal's advice, else the machine's memory."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "memory_size", "total_memory"):
        if key in info:
            return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_model(checkpoint: Checkpoint, kv_bits: int | None) -> MemoryModel:
    """The sizes of a model on this device."""
    model, on_cpu = checkpoint.model, mx.default_device().type == mx.cpu
    leaves = dict(tree_flatten(model.parameters())).values()
    # Any: the classes of a network's modules are not declared.
    modules: dict[str, Any] = dict(model.named_modules())
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
        sum(leaf.nbytes for leaf in leaves),
        itemsize=model.dtype.size,
        backend="cpu" if on_cpu else "metal" if mx.metal.is_available() else "cuda",
        kv_bits=kv_bits,
        # A CPU is no faster with more, and a prompt can be interrupted between two of them.
        most_chunk=CHUNKS[-1] if on_cpu else CHUNKS[0],
        dense_rows=lowest,
        dense_tower=tower <= checkpoint.config.tokens_per_tile,
        joined=max((sum(m[n].nbytes for n in ARRAYS if n in m) for m in joined), default=0),
        has_tower=model.stage is None or model.stage.begins,
    )


def among_stages(own: MemoryModel, limit: int, stage: Stage) -> MemoryModel:
    """``own`` with those of the other ranks, which all ranks go by."""
    others: list[tuple[MemoryModel, int]] = []
    found = gather_integers([own.weights, own.joined, own.has_tower, limit], stage.group)
    for rank, (weights, joined, has_tower, most) in enumerate(found):
        if rank != stage.rank:
            text = replace(own.config.text_config, num_hidden_layers=stage.counts[rank])
            config = replace(own.config, text_config=text)
            other = replace(own, config=config, weights=weights, joined=joined)
            others.append((replace(other, has_tower=bool(has_tower)), most))
    return replace(own, others=tuple(others))


@contextmanager
def wired() -> Iterator[None]:
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
