"""Hard cuts: frames at which one scene ends and the next begins.

A hard cut is one frame that differs from the one before it by several times as much as the frames
around it differ from theirs, in most of the image, and from which the video does not come back:
after the flash of a camera it does. It is looked for among all frames, so that a scene full of
motion hides none. numpy only.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.describe.colours import Pixels, block_means

AROUND = 5  # frames on either side that show how much moves
# A frame's change is its mean difference from the frame before it, in levels (of 256).
LEAP = 2.8  # a hard cut changes this many times as much as three quarters of those around it
NOISE = 0.5  # levels by which even a still image may change
FAINTEST = 1.5  # levels; a smaller change is no hard cut
MOST = 0.4  # at least this part of the image's blocks changes by more than noise at a hard cut
# After a flash the video comes back. A change is taken for a flash, and not for a cut, where a
# frame up to FLASH after it is like one up to FLASH before it. Two frames are alike where they
# differ by less than AWAY times the change.
AWAY = 0.5
FLASH = 0.5  # seconds
MOST_COMPARED = 32  # frames on either side, whatever the frame rate
SHORTEST = 0.5  # seconds between hard cuts


class HardCuts:
    """Hard cuts among all frames. Keeps a second of them, as the mean colours of their blocks."""

    def __init__(self, start: float) -> None:
        self.cuts: list[float] = []  # seconds
        self._start = start
        self._frames: deque[tuple[float, NDArray[np.float32]]] = deque()
        self._changes: deque[float] = deque()  # of each of these, from the one before it
        self._next = 1  # the first of them that has not been judged

    def watching(self, frames: Iterable[tuple[float, Pixels]]) -> Iterator[tuple[float, Pixels]]:
        """The same frames, looked at as they pass."""
        for time, pixels in frames:
            self._add(time, block_means(pixels))
            yield time, pixels
        while self._next < len(self._frames):
            self._judge()

    def _add(self, time: float, blocks: NDArray[np.float32]) -> None:
        change = float(np.abs(blocks - self._frames[-1][1]).mean()) if self._frames else 0.0
        self._frames.append((time, blocks))
        self._changes.append(change)
        while self._next + AROUND < len(self._frames) and (
            self._frames[self._next][0] + FLASH <= time
        ):
            self._judge()
        while self._next > 2 * AROUND and self._frames[self._next - 1][0] - self._frames[0][0] > 1:
            self._frames.popleft()
            self._changes.popleft()
            self._next -= 1

    def _judge(self) -> None:
        place, self._next = self._next, self._next + 1
        time, after = self._frames[place]
        before, change = self._frames[place - 1][1], self._changes[place]
        if change < FAINTEST or time - max([self._start, *self.cuts[-1:]]) < SHORTEST:
            return
        changes = list(self._changes)
        others = changes[max(1, place - AROUND) : place] + changes[place + 1 : place + 1 + AROUND]
        if not others or change < LEAP * (float(np.quantile(others, 0.75)) + NOISE):
            return
        if (np.abs(after - before).mean(-1) >= NOISE).mean() < MOST:
            return
        # All are compared with all, as a flash may change while it lasts.
        frames = list(self._frames)
        earlier = _some([before, *(b for t, b in frames[: place - 1] if time - t <= FLASH)])
        later = _some([after, *(b for t, b in frames[place + 1 :] if t - time < FLASH)])
        if all(np.abs(later - block).mean((1, 2)).min() >= AWAY * change for block in earlier):
            self.cuts.append(time)


def _some(blocks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The first, and others evenly spread: ``MOST_COMPARED`` or fewer, (frames, blocks, 3)."""
    return np.stack(blocks[:: -(-len(blocks) // MOST_COMPARED)])
