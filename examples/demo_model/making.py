"""Processes that make samples, and hand them out in an order that does not depend on them.

Each group of a batch has two parts: samples whose tiles the GPU draws from the scenes' numbers, and
samples whose tiles were drawn and cut exactly, in the processes. Beside them stands text alone.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.demo_model import layouts as packings
from examples.demo_model import samples
from examples.demo_model.buffers import Buffers, TextBuffer
from examples.demo_model.layouts import Layouts
from examples.demo_model.packing import TILE
from examples.demo_model.samples import GROUPS, Group, Medium
from examples.demo_model.scenes import sample_size
from examples.demo_model.tiling import exact_tiles
from examples.demo_model.words import Words
from examples.demo_model.world import Size

Arrays = dict[str, NDArray[Any]]
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
            if packings.image_group(size).name != group.name:
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
    text_only = TextBuffer.empty(count)
    for row in range(count):
        text_only.fill(row, words, rng)
    return {"slots": text_only.slots, "length": text_only.rows} | dict(vars(text_only.buffers))


class Makers:
    """Worker processes and what they have made.

    What is made depends on the seed and on the number of the step alone, and is handed out in that
    order, whichever process is done first: each makes every n-th, and who takes waits for the one
    that is next. Every step has new samples to draw; exact tiles take longer, so they are made for
    every `renew`-th step.

    Make it before CUDA is touched: the processes are forks.
    """

    def __init__(
        self,
        layouts: Layouts,
        words: Words,
        seed: int,
        workers: int,
        renew: int,
        first: int = 0,
        groups: Sequence[Group] = GROUPS,
        text_only: int = samples.TEXT_SAMPLES,
    ) -> None:
        """`first` is the step to begin with; `text_only` samples of a step are text alone."""
        fork = multiprocessing.get_context("fork")
        self.groups = groups
        self._seed, self._renew, self._first, self._text_only = seed, renew, first, text_only
        drawers = max(1, workers // 3)
        cutters = max(1, workers - drawers)
        self._drawn = [fork.Queue(max(2, 24 // drawers)) for _ in range(drawers)]
        self._exact = [fork.Queue(_AHEAD) for _ in range(cutters)]
        self._free = [fork.Semaphore(_AHEAD) for _ in range(cutters)]
        room = sum(group.exact * group.tiles for group in groups) * TILE * TILE * 3
        self._slots = [[mmap.mmap(-1, room) for _ in range(_AHEAD)] for _ in range(cutters)]
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
        for step in itertools.count(self._first + number, len(self._drawn)):
            rng = Random(f"{self._seed} drawn {step}")
            most = most_shapes(step)
            parts = [
                drawn_part(group, group.count - group.exact, layouts, words, rng, most)
                for group in self.groups
            ]
            self._drawn[number].put([*parts, told_part(self._text_only, words, rng)])

    def _cut(self, layouts: Layouts, words: Words, number: int) -> None:
        del layouts
        slots = itertools.cycle(self._slots[number])
        for turn in itertools.count(self._first // self._renew + number, len(self._exact)):
            rng = Random(f"{self._seed} exact {turn}")
            most = most_shapes(turn * self._renew)
            parts = [exact_part(group, group.exact, words, rng, most) for group in self.groups]
            self._free[number].acquire()
            slot, at = next(slots), 0
            for part in parts:
                tiles = part.pop("tiles")
                slot[at : at + tiles.nbytes] = tiles.tobytes()
                at += tiles.nbytes
            self._exact[number].put(parts)

    def drawn(self) -> Iterator[list[Arrays]]:
        """Of each step: for each group a part to draw, then text alone."""
        for made in itertools.cycle(self._drawn):
            yield made.get()

    def exact(self) -> Iterator[list[Arrays]]:
        """Of every `renew`-th step: for each group an exact part.

        Its tiles are read until the next is asked for; copy what is to be kept.
        """
        slots = [itertools.cycle(of_one) for of_one in self._slots]
        for number in itertools.cycle(range(len(self._exact))):
            with self._taken(number, next(slots[number])) as parts:
                yield parts

    @contextmanager
    def _taken(self, number: int, slot: mmap.mmap) -> Iterator[list[Arrays]]:
        parts, at = [], 0
        for group, part in zip(self.groups, self._exact[number].get(), strict=True):
            shape = (group.exact, group.tiles, TILE, TILE, 3)
            size = int(np.prod(shape))
            tiles = np.frombuffer(slot, np.uint8, size, at).reshape(shape)
            at += size
            parts.append(part | {"tiles": tiles})
        try:
            yield parts
        finally:
            self._free[number].release()

    def alive(self) -> bool:
        """Whether every process is still at work."""
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
