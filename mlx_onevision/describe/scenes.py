"""Scene detection: where a video is cut into scenes, from small images of its frames.

A hard cut is one frame that differs from the one before it by several times as much as the frames
around it differ from theirs, in most of the image, and from which the video does not come back:
after the flash of a camera it does. It is looked for among all frames, so that a scene full of
motion hides none.

Fades and dissolves are looked for in samples. Four times a second the frame on screen is sampled,
so that a video has the same samples whatever its frame rate. Each becomes a histogram of its
colours (brightness and two colour differences), one for each quarter of the image, so that a new
arrangement of the same colours counts as well. A pixel is shared out between neighbouring bins:
noise then moves little, whatever bin edge it is near. The distance of two samples is the part of
their pixels that changed colour, from 0 to 1.

A step from which the samples do not come back is a cut, too; how large it has to be depends on how
much moved just before. A fade or a dissolve is one, in its middle: there, the video has left its
colours of a moment ago by small steps and come to rest. A pan that is slower than that is no cut.

numpy only. A video of any length passes through; the frames of its last seconds are kept.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import RequestError

Pixels = NDArray[np.uint8]
Histogram = NDArray[np.float32]
FrameSource = Iterable[tuple[float, Pixels]]
"""The second at which each frame appears, and a small image of it, uint8 RGB (h, w, 3)."""
Span = tuple[float, float]
"""Start and end in seconds."""
DetectorName = Literal["histogram", "pyscenedetect"]

RATE = 4  # samples a second
STILL = 4  # seconds after which a frame that stays is not sampled again until it goes
_INSTANT = 1e-6  # seconds; times are compared up to this

GRID = 2  # cells a side
BINS = (5, 7, 7)  # of brightness and of the two colour differences
FARTHEST = 96.0  # colour differences beyond this share the last bin
ENOUGH = 4  # samples that show how much moves in a scene
SIDE = 64  # pixels of an image that count, across and down

# BT.601: brightness, blue and red minus brightness; 0 to 255, and -128 to 127 around grey.
_COLOURS = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_LOWEST = np.array([0.0, -FARTHEST, -FARTHEST], np.float32)
_SPACING = np.array([255.0, 2 * FARTHEST, 2 * FARTHEST], np.float32) / (np.array(BINS) - 1)


BLOCKS = 16  # across and down, of whose mean colours consecutive frames are compared
AROUND = 5  # frames on either side that show how much moves
LEAP = 2.8  # of a hard cut, relative to the upper quartile of these
NOISE = 0.5  # levels by which a still image may change
FAINTEST = 1.5  # levels, of the mean change at a hard cut
MOST = 0.4  # the part of the blocks that changes at least by as much as noise
AWAY = 0.5  # of the change at a hard cut, within ``FLASH`` no frame is nearer to those before it
FLASH = 0.5  # seconds
SHORTEST = 0.5  # seconds between hard cuts
LENGTH = 0.6  # seconds of a scene, at least, to PySceneDetect's command


@dataclass(frozen=True)
class Detector:
    """What counts as a cut. Distances are parts of an image, from 0 to 1; times are seconds."""

    step: float = 0.4
    """From one sample to the next: at least this is a step, and it takes less to be back."""
    least: float = 0.15
    """Where little moves, less is a step: ``leap`` times the largest change of a moment ago, if it
    is no less than this."""
    leap: float = 4.0
    drift: float = 0.6
    """Over a fade, from its beginning to its end."""
    rest: float = 0.5
    """A change is over once it goes on at no more than this part of its mean, or of a step."""
    flash: float = 0.5
    """An image that is gone after this time was a flash."""
    fade: float = 2.0
    """A change that takes longer is no cut."""
    shortest: float = 1.0
    """A cut this soon after another one does not count."""

    def __post_init__(self) -> None:
        for name in ("step", "least", "drift", "rest"):
            if not 0 < getattr(self, name) <= 1:
                raise RequestError(f"{name} is {getattr(self, name)}; it must be in 0 to 1")
        for name in ("leap", "flash", "fade", "shortest"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RequestError(f"{name} is {getattr(self, name)}; it must be 0 or more")


def cuts(
    frames: FrameSource,
    start: float,
    end: float,
    finder: DetectorName = "histogram",
    seen: Callable[[float], None] = lambda _: None,
) -> Iterator[float]:
    """The times of the frames at which scenes after the first begin, as soon as each is certain:
    the first frame since the sample before a cut that is more like what follows than like what
    went before.

    start, end : seconds, of the part that is searched.
    finder : ``histogram`` is this package's own detector, ``pyscenedetect`` the content detector of
        that package.
    seen : called with the time of each sample.

    Raises:
        RequestError: for another detector, or one that is not installed.
    """
    if finder not in ("histogram", "pyscenedetect"):
        raise RequestError(f"the finder is {finder!r}; it must be histogram or pyscenedetect")
    if finder == "pyscenedetect":
        yield from _by_pyscenedetect(frames, start, seen)
        return
    hard = _HardCuts(start)
    samples = _SampledFrames(hard.watching(frames), start, end, seen)
    soft = [samples.first_of_scene(time) for time in find_cuts(samples)]
    apart, sharp = Detector().shortest, hard.cuts
    soft = [time for time in soft if time - start >= apart]
    soft = [time for time in soft if all(abs(time - other) >= apart for other in sharp)]
    yield from sorted(sharp + soft)


class _HardCuts:
    """Hard cuts among all frames. Keeps a second of them, as the mean colours of their blocks."""

    def __init__(self, start: float) -> None:
        self.cuts: list[float] = []
        self._start = start
        self._frames: deque[tuple[float, NDArray[np.float32]]] = deque()
        self._changes: deque[float] = deque()  # of each of these, from the one before it
        self._next = 1  # the first of them that has not been judged

    def watching(self, frames: FrameSource) -> FrameSource:
        """The same frames, looked at as they pass."""
        for time, pixels in frames:
            self._add(time, _blocks(pixels))
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
        frames = list(self._frames)
        later = [b for t, b in frames[place + 1 :] if t - time < FLASH]
        earlier = [b for t, b in frames[: place - 1] if time - t <= FLASH]
        back = [np.abs(b - before).mean() for b in later] + [
            np.abs(b - after).mean() for b in earlier
        ]
        if all(distance >= AWAY * change for distance in back):
            self.cuts.append(time)


def _blocks(image: Pixels) -> NDArray[np.float32]:
    """The mean colours of an image's blocks, float32 (blocks, 3)."""
    means = image.astype(np.float32)
    for axis, length in enumerate(image.shape[:2]):
        edges = np.unique(np.arange(BLOCKS) * length // BLOCKS)
        sizes = np.diff([*edges, length]).astype(np.float32)
        shape = (-1, 1, 1) if axis == 0 else (-1, 1)
        means = np.add.reduceat(means, edges, axis) / sizes.reshape(shape)
    return (means @ _COLOURS.T).reshape(-1, 3)


def find_cuts(samples: FrameSource, detector: Detector = Detector()) -> Iterator[float]:
    """The times at which scenes after the first begin, in seconds, as soon as each is certain.

    samples : in order; four a second are enough, and their size does not matter. A cut is given the
        time of the first sample after it.

    Raises:
        RequestError: for a time that is not after the one before it, or another kind of array.
    """
    scene: deque[tuple[float, Histogram]] = deque()  # the last samples, as long as a fade
    away: list[tuple[float, Histogram]] = []  # since a step that may turn out to be a flash
    changes: deque[tuple[float, float]] = deque()  # in the same time
    bound = detector.step
    last_time, last_cut = -float("inf"), -float("inf")
    for time, image in samples:
        if not time > last_time:
            raise RequestError(f"the frame at {time} s comes after the one at {last_time} s")
        last_time = time
        seen = (time, histogram(image))
        cut: float | None = None
        change = distance(seen[1], scene[-1][1]) if scene else 0.0
        if not away:
            bound = _step(changes, detector)
        if away:
            if change < bound:
                away.clear()
            else:
                away.append(seen)
                if not _has_settled(away, bound, detector):
                    continue
                cut = _middle(scene[-1][1], away)
                scene, away = deque(away), []
                changes.clear()
        elif change >= bound:
            away.append(seen)
            continue
        elif scene and _has_faded(seen[1], scene, detector):
            cut = _middle(scene[0][1], [*scene, seen])
            scene.clear()
            changes.clear()
        else:
            changes.append((time, change))
        if not scene or scene[-1] is not seen:
            scene.append(seen)
        while changes and time - changes[0][0] > detector.fade:
            changes.popleft()
        while time - scene[0][0] > detector.fade:
            scene.popleft()
        if cut is not None and cut - last_cut >= detector.shortest:
            last_cut = cut
            yield cut


def _step(changes: Sequence[tuple[float, float]], detector: Detector) -> float:
    """What is a step now: less in a scene in which little has moved for a while."""
    if len(changes) < ENOUGH:
        return detector.step
    largest = max(change for _, change in changes)
    return min(detector.step, max(detector.least, detector.leap * largest))


def _has_settled(away: Sequence[tuple[float, Histogram]], bound: float, detector: Detector) -> bool:
    """Whether the video is somewhere else for good: neither in a flash nor on its way still."""
    (_, one), (now, other) = away[-2:]
    since = now - away[0][0]
    return since >= detector.flash and (
        distance(one, other) <= detector.rest * bound or since >= detector.fade
    )


def _has_faded(
    seen: Histogram, scene: Sequence[tuple[float, Histogram]], detector: Detector
) -> bool:
    """Whether small steps have led far away, and the last one was smaller still."""
    drift = distance(seen, scene[0][1])
    if drift < detector.drift:
        return False
    return distance(seen, scene[-1][1]) <= detector.rest * drift / len(scene)


def _middle(begin: Histogram, change: Sequence[tuple[float, Histogram]]) -> float:
    """The time of the first one that is more like the last one than like ``begin``."""
    last, end = change[-1]
    return next((t for t, h in change if distance(h, end) < distance(h, begin)), last)


def histogram(image: NDArray[np.uint8]) -> Histogram:
    """The colours of each cell of an image, float32 (cells, bins); each cell's sum is 1.

    Raises:
        RequestError: for anything but uint8 (h, w, 3).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise RequestError(f"a frame is uint8 (h, w, 3), not {image.dtype} {image.shape}")
    high, wide = image.shape[:2]
    if min(high, wide) < GRID:
        raise RequestError(f"a frame has at least {GRID}x{GRID} pixels, not {wide}x{high}")
    pixels = image[:: ceil(high / SIDE), :: ceil(wide / SIDE)].astype(np.float32)
    high, wide = pixels.shape[:2]
    bins = np.array(BINS)
    place = (pixels.reshape(-1, 3) @ _COLOURS.T - _LOWEST) / _SPACING
    place = np.clip(place, 0, bins - 1)
    below = np.minimum(place.astype(np.int64), bins - 2)
    above = place - below  # each pixel's share in the upper neighbour
    rows = np.arange(high) * GRID // high
    cols = np.arange(wide) * GRID // wide
    cell = (rows[:, None] * GRID + cols).reshape(-1)
    total = np.zeros(GRID * GRID * int(bins.prod()))
    for corner in np.ndindex(2, 2, 2):
        y, b, r = (below + corner).T
        weights = np.where(np.array(corner, bool), above, 1 - above).prod(axis=1)
        flat = ((cell * BINS[0] + y) * BINS[1] + b) * BINS[2] + r
        total += np.bincount(flat, weights, minlength=total.size)
    cells = total.reshape(GRID * GRID, -1)
    return (cells / cells.sum(axis=1, keepdims=True)).astype(np.float32)


def distance(one: Histogram, other: Histogram) -> float:
    """The part of the pixels that changed colour, 0 to 1."""
    return float(np.abs(one - other).sum() / (2 * len(one)))


class _SampledFrames:
    """The frame on screen four times a second; less often while it stays the same for long.

    Keeps the frames that a detector may still name as a cut.
    """

    def __init__(
        self, frames: FrameSource, start: float, end: float, seen: Callable[[float], None]
    ) -> None:
        self._source, self._start, self._end, self._seen = frames, start, end, seen
        self._frames: deque[tuple[float, Pixels]] = deque()
        self._kept = Detector().fade + 2

    def __iter__(self) -> Iterator[tuple[float, Pixels]]:
        number = 0
        for time, pixels in self._source:
            yield from self._until(number, time)
            number = max(number, ceil((time - self._start - _INSTANT) * RATE))
            self._frames.append((time, pixels))
        yield from self._until(number, self._end)

    def _until(self, number: int, time: float) -> Iterator[tuple[float, Pixels]]:
        """The samples from ``number`` on at which the last frame is on screen."""
        if not self._frames:
            return
        after = ceil((time - self._start - _INSTANT) * RATE)
        still = number + STILL * RATE
        for sample in [*range(number, min(after, still)), *range(still, after)[-1:]]:
            moment = self._start + sample / RATE
            # The last one from before that time may have been on screen then.
            while len(self._frames) > 1 and self._frames[1][0] < moment - self._kept:
                self._frames.popleft()
            self._seen(moment)
            yield moment, self._frames[-1][1]

    def first_of_scene(self, moment: float) -> float:
        """The time of the first frame of the scene that is sampled at ``moment`` and was not at the
        sample before.
        """
        shown = [frame for frame in self._frames if frame[0] <= moment + _INSTANT]
        before = [n for n, (time, _) in enumerate(shown) if time <= moment - 1 / RATE + _INSTANT]
        change = [(time, histogram(p)) for time, p in shown[before[-1] if before else 0 :]]
        return _middle(change[0][1], change[1:] or change)


def _by_pyscenedetect(
    frames: FrameSource, start: float, seen: Callable[[float], None]
) -> Iterator[float]:
    """PySceneDetect's content detector, with its command's settings, on every frame."""
    try:
        from scenedetect import FrameTimecode  # pyright: ignore
        from scenedetect.detectors import ContentDetector  # pyright: ignore
    except ImportError:
        raise RequestError(
            "PySceneDetect is not installed; pip install 'mlx-onevision[scenes]', or use the "
            "histogram finder"
        ) from None
    code: Any = FrameTimecode
    times: list[float] = []
    waiting: list[Pixels] = []
    detector: Any = None
    rate = 1.0
    for time, pixels in frames:
        times.append(time)
        waiting.append(pixels)
        if len(times) == 1:  # the second one tells the frame rate
            continue
        if detector is None:
            rate = 1 / max(time - times[0], 1e-3)
            detector = ContentDetector(min_scene_len=max(1, round(LENGTH * rate)))
        for number, image in enumerate(waiting, len(times) - len(waiting)):
            found = detector.process_frame(code(number, fps=rate), image[..., ::-1].copy())
            yield from (times[cut.frame_num] for cut in found if cut.frame_num)
        waiting.clear()
        seen(time)
    if detector is not None:
        found = detector.post_process(code(len(times) - 1, fps=rate))
        yield from (times[cut.frame_num] for cut in found if cut.frame_num)


def scenes(
    cuts: Iterable[float], start: float, end: float, longest: float | None = None
) -> list[Span]:
    """The spans between cuts, from ``start`` to ``end``; those outside are left out.

    longest : seconds; longer spans are divided into equal parts.
    """
    _check(start, end)
    if longest is not None and not longest > 0:
        raise RequestError(f"the longest scene is {longest} s; it must be more than 0")
    times = [start, *sorted({cut for cut in cuts if start < cut < end}), end]
    spans: list[Span] = []
    for begin, stop in pairwise(times):
        parts = 1 if longest is None else max(1, ceil((stop - begin) / longest))
        edges = [begin + (stop - begin) * part / parts for part in range(parts)] + [stop]
        spans += pairwise(edges)
    return spans


def windows(start: float, end: float, seconds: float) -> list[Span]:
    """Spans of ``seconds``; a rest shorter than half of that belongs to the last one."""
    _check(start, end)
    if not seconds > 0:
        raise RequestError(f"a window is {seconds} s long; it must be more than 0")
    count = max(1, int((end - start) / seconds + 0.5))
    edges = [start + number * seconds for number in range(count)] + [end]
    return list(pairwise(edges))


def _check(start: float, end: float) -> None:
    if not 0 <= start < end < float("inf"):
        raise RequestError(f"there is nothing between {start} s and {end} s")
