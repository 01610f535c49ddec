"""Processes that make samples while the GPU trains: scenes as numbers, and exact tiles.

Each group of a batch has two parts: samples whose tiles the GPU draws from the scenes' numbers, and
samples whose tiles were drawn and cut exactly, in the processes. Beside them stands text alone.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from examples.demo_model import layouts as packings
from examples.demo_model import samples
from examples.demo_model.buffers import Buffers, Told
from examples.demo_model.layouts import Layouts
from examples.demo_model.packing import TILE
from examples.demo_model.samples import GROUPS, Group, Medium
from examples.demo_model.scenes import sample_size
from examples.demo_model.tiling import exact_tiles
from examples.demo_model.words import Words
from examples.demo_model.world import Size

Arrays = dict[str, NDArray[Any]]
Batch = dict[str, torch.Tensor]
_SLOT = sum(group.exact * group.tiles for group in GROUPS) * TILE * TILE * 3
_AHEAD = 2  # rounds of exact tiles that a process may be ahead


def most_shapes(step: int) -> int:
    """The curriculum: few shapes first."""
    return 1 if step < 150 else 2 if step < 600 else 3 if step < 1200 else 4


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


def told_part(count: int, words: Words, rng: Random) -> Arrays:
    """`count` samples of text alone."""
    told = Told.empty(count)
    for row in range(count):
        told.fill(row, words, rng)
    return {"slots": told.slots, "length": told.rows} | dict(vars(told.buffers))


class Loader:
    """Worker processes and what they have made, on the device.

    What is made depends on the seed and on the number of the step alone, and is handed out in that
    order, whichever process is done first: each makes every n-th, and the trainer waits for the one
    that is next. Every step has new samples to draw; exact tiles take longer, so they are made for
    every `renew`-th step, and those between take some of the last ones once more.

    Make it before CUDA is touched: the processes are forks.
    """

    def __init__(
        self, layouts: Layouts, words: Words, seed: int, workers: int, renew: int, first: int = 0
    ) -> None:
        """`first` is the step that training goes on from."""
        fork = multiprocessing.get_context("fork")
        self._seed, self._renew, self._step = seed, renew, first
        drawers = max(1, workers // 3)
        cutters = max(1, workers - drawers)
        self._drawn = [fork.Queue(max(2, 24 // drawers)) for _ in range(drawers)]
        self._exact = [fork.Queue(_AHEAD) for _ in range(cutters)]
        self._free = [fork.Semaphore(_AHEAD) for _ in range(cutters)]
        self._slots = [[mmap.mmap(-1, _SLOT) for _ in range(_AHEAD)] for _ in range(cutters)]
        self.waited = 0.0
        """Seconds that the trainer has waited for samples."""
        self._processes = []
        for number in range(drawers + cutters):
            drawing = number < drawers
            process = fork.Process(
                target=self._draw if drawing else self._cut,
                args=(layouts, words, number if drawing else number - drawers),
                daemon=True,
            )
            process.start()
            self._processes.append(process)

    def _draw(self, layouts: Layouts, words: Words, number: int) -> None:
        for step in itertools.count(self._step + number, len(self._drawn)):
            rng = Random(f"{self._seed} drawn {step}")
            most = most_shapes(step)
            parts = [
                drawn_part(group, group.count - group.exact, layouts, words, rng, most)
                for group in GROUPS
            ]
            self._drawn[number].put([*parts, told_part(samples.TOLD, words, rng)])

    def _cut(self, layouts: Layouts, words: Words, number: int) -> None:
        del layouts
        slots = itertools.cycle(self._slots[number])
        for turn in itertools.count(self._step // self._renew + number, len(self._exact)):
            rng = Random(f"{self._seed} exact {turn}")
            most = most_shapes(turn * self._renew)
            parts = [exact_part(group, group.exact, words, rng, most) for group in GROUPS]
            self._free[number].acquire()
            slot, at = next(slots), 0
            for part in parts:
                tiles = part.pop("tiles")
                slot[at : at + tiles.nbytes] = tiles.tobytes()
                at += tiles.nbytes
            self._exact[number].put(parts)

    def start(self, device: torch.device, keep: int = 100) -> None:
        """Begin to bring what is made to the device, in the background."""
        self._device = device
        self._ready: queue.Queue[list[Batch]] = queue.Queue(8)
        self._ready_exact: queue.Queue[list[Batch]] = queue.Queue(4)
        self._kept: deque[list[Batch]] = deque(maxlen=keep)
        for bring in (self._bring_drawn, self._bring_exact):
            threading.Thread(target=bring, daemon=True).start()

    def _bring_drawn(self) -> None:
        with _aside(self._device):
            for made in itertools.cycle(self._drawn):
                parts = [to_device(part, self._device) for part in made.get()]
                self._wait()
                self._ready.put(parts)

    def _bring_exact(self) -> None:
        with _aside(self._device):
            slots = [itertools.cycle(of_one) for of_one in self._slots]
            for number in itertools.cycle(range(len(self._exact))):
                self._ready_exact.put(self._take_exact(number, next(slots[number])))

    def _take_exact(self, number: int, slot: mmap.mmap) -> list[Batch]:
        parts, at = [], 0
        for group, part in zip(GROUPS, self._exact[number].get(), strict=True):
            shape = (group.exact, group.tiles, TILE, TILE, 3)
            size = int(np.prod(shape))
            tiles = np.frombuffer(slot, np.uint8, size, at).reshape(shape)
            at += size
            parts.append(to_device(part | {"tiles": tiles}, self._device))
        self._wait()
        self._free[number].release()
        return parts

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
            exact = [self._kept[rng.randrange(len(self._kept))][n] for n in range(len(GROUPS))]
        self.waited += time.time() - begun
        self._step += 1
        return [_used(part) for part in drawn], [_used(part) for part in exact]

    def _get(self, ready: queue.Queue[list[Batch]]) -> list[Batch]:
        while True:
            try:
                return ready.get(timeout=5)
            except queue.Empty:
                if not all(process.is_alive() for process in self._processes):
                    raise RuntimeError("a loader process has died") from None

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
