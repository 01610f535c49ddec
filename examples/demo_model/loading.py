"""What the processes have made, on the device, while the GPU trains."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import numpy as np
import torch

from examples.demo_model.making import Arrays, Makers

Batch = dict[str, torch.Tensor]


class Loader:
    """Parts of one step after another, on the device.

    Exact tiles are made for every `renew`-th step only; the steps between take some of the last
    ones once more.
    """

    def __init__(self, makers: Makers, seed: int, renew: int, first: int = 0) -> None:
        """The `seed`, `renew` and `first` step that the makers were given."""
        self._makers, self._seed, self._renew, self._step = makers, seed, renew, first
        self.waited = 0.0
        """Seconds that the trainer has waited for samples."""

    def start(self, device: torch.device, keep: int = 100) -> None:
        """Begin to bring what is made to the device, in the background."""
        self._device = device
        self._ready: queue.Queue[list[Batch]] = queue.Queue(8)
        self._ready_exact: queue.Queue[list[Batch]] = queue.Queue(4)
        self._kept: deque[list[Batch]] = deque(maxlen=keep)
        for made, ready in (
            (self._makers.drawn(), self._ready),
            (self._makers.exact(), self._ready_exact),
        ):
            threading.Thread(target=self._bring, args=(made, ready), daemon=True).start()

    def _bring(self, made: Iterator[list[Arrays]], ready: queue.Queue[list[Batch]]) -> None:
        with _aside(self._device):
            for parts in made:
                brought = [to_device(part, self._device) for part in parts]
                self._wait()
                ready.put(brought)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def next(self) -> tuple[list[Batch], list[Batch]]:
        """Parts of the next step: for each group one to draw, then text alone; exact ones."""
        begun = time.time()
        drawn = self._get(self._ready)
        if not self._kept or self._step % self._renew == 0:
            exact = self._get(self._ready_exact)
            self._kept.append(exact)
        else:
            rng = Random(f"{self._seed} again {self._step}")
            count = len(self._makers.groups)
            exact = [self._kept[rng.randrange(len(self._kept))][n] for n in range(count)]
        self.waited += time.time() - begun
        self._step += 1
        return [_used(part) for part in drawn], [_used(part) for part in exact]

    def _get(self, ready: queue.Queue[list[Batch]]) -> list[Batch]:
        while True:
            try:
                return ready.get(timeout=5)
            except queue.Empty:
                if not self._makers.alive():
                    raise RuntimeError("a loader process has died") from None

    def close(self) -> None:
        self._makers.close()


def to_device(part: Arrays, device: torch.device) -> Batch:
    """Copies of the arrays on the device, which get there as one piece."""
    starts, end = [], 0
    for array in part.values():
        starts.append(end)
        end += -(-array.nbytes // 16) * 16
    piece = np.empty(end, np.uint8)
    for start, array in zip(starts, part.values(), strict=True):
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        piece[start : start + array.nbytes] = flat
    whole = torch.from_numpy(piece).to(device)
    return {
        name: whole[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for start, (name, array) in zip(starts, part.items(), strict=True)
    }


_DTYPES = {
    "uint8": torch.uint8,
    "bool": torch.bool,
    "int16": torch.int16,
    "int64": torch.int64,
    "float32": torch.float32,
}


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Copy beside the training, not behind all that it has queued."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield


def _used(batch: Batch) -> Batch:
    """Tell the allocator that the main stream reads what another one has copied."""
    tensor = batch["ids"]  # all share one piece of memory
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch
