"""Processes that make samples while the GPU trains: scenes as numbers, and exact tiles.

Each group of a batch has two parts: samples whose tiles the GPU draws from the scenes' numbers, and
samples whose tiles were drawn and cut exactly, in the processes. Parts are remembered: where no new
one is ready, the trainer takes an old one again and never waits.
"""

from __future__ import annotations

import mmap
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.demo_model import layouts as packings
from examples.demo_model import samples
from examples.demo_model.layouts import Layouts
from examples.demo_model.packing import TILE
from examples.demo_model.samples import GROUPS, Buffers, Group, Medium
from examples.demo_model.scenes import sample_size
from examples.demo_model.tiling import exact_tiles
from examples.demo_model.words import Words
from examples.demo_model.world import Size

Arrays = dict[str, NDArray[Any]]
Batch = dict[str, torch.Tensor]
_SLOT = max(group.exact * group.tiles for group in GROUPS) * TILE * TILE * 3


def most_shapes(progress: float) -> int:
    """The curriculum: few shapes first."""
    return 1 if progress < 0.01 else 2 if progress < 0.04 else 3 if progress < 0.08 else 4


def _texts(media: list[Medium], words: Words, rng: Random) -> Arrays:
    buffers = Buffers.empty(len(media))
    for row, medium in enumerate(media):
        buffers.fill(row, samples.ask(rng, medium), words, rng)
    return dict(vars(buffers))


def drawn_part(
    group: Group, count: int, layouts: Layouts, words: Words, rng: Random, most: int
) -> Arrays:
    """`count` samples of a group as numbers, for the GPU to draw."""
    pictures = group.pictures
    shapes = np.zeros((count, pictures, samples.SHAPES, samples.FEATURES), np.float32)
    shapes[..., 8] = shapes[..., 11] = 1  # divided by, also where there is no shape
    back = np.ones((count, pictures, 11), np.float32)
    window = np.ones((count, pictures, 5), np.float32)
    times = np.zeros((count, group.tiles), np.float32)
    layout = np.zeros(count, np.int64)
    media = []
    for row in range(count):
        image = rng.choice(layouts.groups[group.name]) if group.media == "image" else 0
        size = layouts.sizes[image] if group.media == "image" else None
        medium = samples.sample_medium(rng, group, size, most)
        media.append(medium)
        layout[row] = packings.layout_number(layouts, group, medium, image)
        for index, scene in enumerate(medium.scenes):
            numbers, back[row, index] = samples.scene_numbers(scene)
            shapes[row, index, : len(scene.shapes)] = numbers[: len(scene.shapes)]
            if group.media != "image":
                window[row, index] = packings.medium_window(medium, index)
        times[row, : len(medium.times)] = medium.times
    part = {"shapes": shapes, "back": back, "window": window, "times": times, "layout": layout}
    return part | _texts(media, words, rng)


def exact_part(group: Group, count: int, words: Words, rng: Random, most: int) -> Arrays:
    """`count` samples of a group with their exact tiles (count, tiles, TILE, TILE, 3)."""
    tiles = np.zeros((count, group.tiles, TILE, TILE, 3), np.uint8)
    media: list[Medium] = []
    rows = []
    while len(media) < count:
        size: Size | None = None
        if group.media == "image":
            # Large pictures take long to draw, so they are fewer.
            size = sample_size(rng, high=rng.choice((500, 900, 900, 2000)))
            if packings.image_group(size) is not group:
                continue
        medium = samples.sample_medium(rng, group, size, most, largest=360)
        cut = exact_tiles(medium, rng)
        tiles[len(media), : len(cut)] = cut
        media.append(medium)
        rows.append(packings.medium_rows(medium))
    index, weight, newline, length = packings.stack_rows(rows)
    part = {"index": index, "weight": weight, "newline": newline, "rows": length, "tiles": tiles}
    return part | _texts(media, words, rng)


class Loader:
    """Worker processes and what they have made, on the device.

    Make it before CUDA is touched: the processes are forks. `progress` sets the curriculum.
    """

    def __init__(
        self, layouts: Layouts, words: Words, seed: int, drawers: int, cutters: int
    ) -> None:
        fork = multiprocessing.get_context("fork")
        self.progress: Synchronized[float] = fork.Value("d", 0.0)
        self._slots = [mmap.mmap(-1, _SLOT) for _ in range(3 * cutters)]
        self._free = fork.Queue()
        for number in range(len(self._slots)):
            self._free.put(number)
        self._drawn, self._exact = fork.Queue(24), fork.Queue()
        self.made = {"drawn": 0, "exact": 0}
        self._processes = []
        for number in range(drawers + cutters):
            drawing = number < drawers
            process = fork.Process(
                target=self._draw if drawing else self._cut,
                args=(layouts, words, Random(f"{seed} {number} {drawing}")),
                daemon=True,
            )
            process.start()
            self._processes.append(process)

    def _draw(self, layouts: Layouts, words: Words, rng: Random) -> None:
        while True:
            most = most_shapes(self.progress.value)
            parts = [
                drawn_part(group, group.count - group.exact, layouts, words, rng, most)
                for group in GROUPS
            ]
            self._drawn.put(parts)

    def _cut(self, layouts: Layouts, words: Words, rng: Random) -> None:
        del layouts
        while True:
            for number, group in rng.sample(list(enumerate(GROUPS)), len(GROUPS)):
                most = most_shapes(self.progress.value)
                part = exact_part(group, group.exact, words, rng, most)
                slot = self._free.get()
                tiles = part.pop("tiles")
                self._slots[slot][: tiles.nbytes] = tiles.tobytes()
                self._exact.put((number, slot, part))

    def start(self, device: torch.device, keep: int = 120) -> None:
        """Begin to bring what is made to the device, in the background; wait for the first."""
        self._device = device
        self._batches: deque[list[Batch]] = deque(maxlen=keep)
        self._fresh: deque[list[Batch]] = deque(maxlen=8)
        self._cuts: list[deque[Batch]] = [deque(maxlen=keep) for _ in GROUPS]
        self._fresh_cuts: list[deque[Batch]] = [deque(maxlen=8) for _ in GROUPS]
        for receive in (self._receive_drawn, self._receive_exact):
            threading.Thread(target=receive, daemon=True).start()
        while not self._batches or not all(self._cuts):
            if not all(process.is_alive() for process in self._processes):
                raise RuntimeError("a loader process has died")
            time.sleep(0.05)

    def _receive_drawn(self) -> None:
        with _aside(self._device):
            self._take_drawn()

    def _receive_exact(self) -> None:
        with _aside(self._device):
            self._take_exact()

    def _take_drawn(self) -> None:
        while True:
            parts = [to_device(part, self._device) for part in self._drawn.get()]
            self._wait()
            while len(self._fresh) == self._fresh.maxlen:
                time.sleep(0.002)
            self._batches.append(parts)
            self._fresh.append(parts)
            self.made["drawn"] += 1

    def _take_exact(self) -> None:
        while True:
            number, slot, part = self._exact.get()
            group = GROUPS[number]
            shape = (group.exact, group.tiles, TILE, TILE, 3)
            size = int(np.prod(shape))
            tiles = np.frombuffer(self._slots[slot], np.uint8, size).reshape(shape)
            batch = to_device(part | {"tiles": tiles}, self._device)
            self._wait()
            self._free.put(slot)
            self._cuts[number].append(batch)
            self._fresh_cuts[number].append(batch)
            self.made["exact"] += 1

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def next(self, rng: Random) -> tuple[list[Batch], list[Batch]]:
        """For each group, a part to draw and an exact one: new ones, or old ones once more."""
        drawn = self._fresh.popleft() if self._fresh else _any(rng, self._batches)
        exact = [
            fresh.popleft() if fresh else _any(rng, old)
            for fresh, old in zip(self._fresh_cuts, self._cuts, strict=True)
        ]
        return [_used(part) for part in drawn], [_used(part) for part in exact]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()


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


def _any(rng: Random, kept: deque[Any]) -> Any:
    # Another thread appends meanwhile, so nothing may iterate here.
    return kept[rng.randrange(len(kept))]


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
