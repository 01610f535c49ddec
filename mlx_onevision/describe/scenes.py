"""Scene detection: where a video is cut into scenes, from small images of its frames.

Hard cuts are looked for among all frames (:mod:`~mlx_onevision.describe.hard_cuts`), fades and
dissolves in samples. Four times a second the frame on screen is sampled, so that a video has the
same samples whatever its frame rate. Each becomes a histogram of its colours for each quarter of
the image (:mod:`~mlx_onevision.describe.colours`). The distance of two samples is the part of their
pixels that changed colour, from 0 to 1.

A step from which the samples do not come back is a cut, too; how large it has to be depends on how
much moved just before. A fade or a dissolve is one, in its middle: there, the video has left its
colours of a moment ago by small steps and come to rest. A pan that is slower than that is no cut.

numpy only. A video of any length passes through; the frames of its last seconds are kept.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from math import ceil
from typing import Any, Literal

from mlx_onevision.describe.colours import Histogram, Pixels, distance, histogram
from mlx_onevision.describe.hard_cuts import HardCuts
from mlx_onevision.errors import RequestError

FrameSource = Iterable[tuple[float, Pixels]]
"""The second at which each frame appears, and a small image of it, uint8 RGB (h, w, 3)."""
Span = tuple[float, float]
"""Start and end in seconds."""
DetectorName = Literal["histogram", "pyscenedetect"]

RATE = 4  # samples a second
STILL = 4  # seconds after which a frame that stays is not sampled again until it goes
_INSTANT = 1e-6  # seconds; times are compared up to this
ENOUGH = 4  # samples that show how much moves in a scene
LENGTH = 0.6  # seconds of a scene, at least, to PySceneDetect's command


@dataclass(frozen=True)
class Detector:
    """What counts as a cut. Distances are parts of an image, from 0 to 1; times are seconds.

    step : samples that differ by this much or more are a step, which may be a cut. A sample that is
        closer than this to the scene before has returned to it.
    least, leap : where little has moved lately, a smaller distance is a step, too: ``leap`` times
        the largest between the last samples, but never below ``least``.
    drift : the first and the last sample of a fade differ by at least this much.
    rest : a gradual change is over when two samples in a row differ by at most this part of the
        change's mean, or of the distance that is a step.
    flash : an image that is gone after this time was a flash.
    fade : a change that takes longer is no cut.
    shortest : a cut this soon after another one does not count.

    Raises:
        RequestError: for a number out of range.
    """

    step: float = 0.4
    least: float = 0.15
    leap: float = 4.0
    drift: float = 0.6
    rest: float = 0.5
    flash: float = 0.5
    fade: float = 2.0
    shortest: float = 1.0

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
    hard = HardCuts(start)
    samples = _SampledFrames(hard.watching(frames), start, end, seen)
    soft = [samples.first_of_scene(time) for time in find_cuts(samples)]
    apart, sharp = Detector().shortest, hard.cuts
    soft = [time for time in soft if time - start >= apart]
    soft = [time for time in soft if all(abs(time - other) >= apart for other in sharp)]
    yield from sorted(sharp + soft)


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
        # Any: it may be absent where types are checked.
        code: Any = import_module("scenedetect").FrameTimecode
        content: Any = import_module("scenedetect.detectors").ContentDetector
    except ImportError:
        raise RequestError(
            "PySceneDetect is not installed; pip install 'mlx-onevision[scenes]', or use the "
            "histogram finder"
        ) from None
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
            detector = content(min_scene_len=max(1, round(LENGTH * rate)))
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
