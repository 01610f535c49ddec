"""From a film's small pictures to the exact frames at which its scenes begin.

Detectors look at what is on screen at four moments a second: a film has the same moments whatever
its frame rate, and a picture that stays is seen as often as one that moves. The cut is then the
first frame since the moment before that is more like what follows than like what went before.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.describe.scenes import Detector, distance, find_cuts, histogram
from mlx_onevision.errors import RequestError

Pixels = NDArray[np.uint8]
Film = Iterable[tuple[float, Pixels]]
"""The second at which each frame appears, and a small picture of it, uint8 RGB (h, w, 3)."""

Finder = Literal["histogram", "pyscenedetect"]

RATE = 4  # moments a second
STANDS = 4  # seconds after which a picture that stays is not looked at again until it goes
_INSTANT = 1e-6  # seconds; stamps and moments are compared up to this


def cuts(
    film: Film,
    start: float,
    end: float,
    finder: Finder = "histogram",
    seen: Callable[[float], None] = lambda _: None,
) -> Iterator[float]:
    """The times of the frames at which scenes after the first begin, as soon as each is certain.

    film : its frames; those of the last seconds are kept.
    start, end : seconds, of the part that is looked at.
    finder : ``histogram`` is this package's own (see :mod:`scenes`), ``pyscenedetect`` the content
        detector of that package.
    seen : called with each moment that has been looked at.

    Raises:
        RequestError: for another finder, or one that is not installed.
    """
    if finder not in ("histogram", "pyscenedetect"):
        raise RequestError(f"the finder is {finder!r}; it must be histogram or pyscenedetect")
    find = _pyscenedetect() if finder == "pyscenedetect" else find_cuts
    moments = _Moments(film, start, end)
    for moment in find(_told(moments, seen)):
        yield moments.first_after(moment)


class _Moments:
    """What is on screen four times a second; less often while it stays the same for long.

    Keeps the frames that a detector may still name as a cut.
    """

    def __init__(self, film: Film, start: float, end: float) -> None:
        self._film, self._start, self._end = film, start, end
        self._frames: deque[tuple[float, Pixels]] = deque()
        self._kept = Detector().fade + 2

    def __iter__(self) -> Iterator[tuple[float, Pixels]]:
        number = 0
        for time, picture in self._film:
            yield from self._until(number, time)
            number = max(number, ceil((time - self._start - _INSTANT) * RATE))
            self._frames.append((time, picture))
        yield from self._until(number, self._end)

    def _until(self, number: int, time: float) -> Iterator[tuple[float, Pixels]]:
        """The moments from ``number`` on at which the last frame is on screen."""
        if not self._frames:
            return
        after = ceil((time - self._start - _INSTANT) * RATE)
        standing = number + STANDS * RATE
        for one in [*range(number, min(after, standing)), *range(standing, after)[-1:]]:
            moment = self._start + one / RATE
            # The last one from before that time may have been on screen then.
            while len(self._frames) > 1 and self._frames[1][0] < moment - self._kept:
                self._frames.popleft()
            yield moment, self._frames[-1][1]

    def first_after(self, moment: float) -> float:
        """The time of the first frame of the scene that is on screen at ``moment``, and was not a
        moment before.
        """
        shown = [(time, picture) for time, picture in self._frames if time <= moment + _INSTANT]
        before = [n for n, (time, _) in enumerate(shown) if time <= moment - 1 / RATE + _INSTANT]
        change = shown[before[-1] if before else 0 :]
        begin, end = histogram(change[0][1]), histogram(change[-1][1])
        for time, picture in change[1:]:
            colours = histogram(picture)
            if distance(colours, end) < distance(colours, begin):
                return time
        return change[-1][0]


def _told(moments: Film, seen: Callable[[float], None]) -> Iterator[tuple[float, Pixels]]:
    for time, picture in moments:
        seen(time)
        yield time, picture


def _pyscenedetect() -> Callable[[Film], Iterator[float]]:
    """PySceneDetect's content detector, with its own idea of how much is a cut."""
    try:
        from scenedetect import FrameTimecode  # pyright: ignore
        from scenedetect.detectors import ContentDetector  # pyright: ignore
    except ImportError:
        raise RequestError(
            "PySceneDetect is not installed; pip install 'mlx-onevision[scenes]', or use the "
            "histogram finder"
        ) from None
    detector: Any = ContentDetector(min_scene_len=RATE)
    code: Any = FrameTimecode

    def find(film: Film) -> Iterator[float]:
        times: list[float] = []
        for number, (time, picture) in enumerate(film):
            times.append(time)
            found = detector.process_frame(code(number, fps=float(RATE)), picture[..., ::-1].copy())
            yield from (times[cut.frame_num] for cut in found if cut.frame_num)
        if times:
            found = detector.post_process(code(len(times) - 1, fps=float(RATE)))
            yield from (times[cut.frame_num] for cut in found if cut.frame_num)

    return find
