"""A video read many times: thumbnails of all of it, and chosen frames of parts of it."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import HIGH, KINDS, counting, encode_video, number_of, turned, written

from mlx_onevision.errors import CancelledError, MediaError, RequestError, TooLargeError
from mlx_onevision.media.decoder import Limits, VideoReader
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.parallel import Budget
from mlx_onevision.subprocesses import INTERPRETER


@contextmanager
def opened(path: Path, **more: Any) -> Iterator[VideoReader]:
    with path.open("rb") as file, VideoReader(file, "it", **more) as reader:
        yield reader


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = counting(60, options={"g": "12", "bf": "2"})
    return written(tmp_path_factory.mktemp("clips") / "clip.mp4", data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_seen_small_at_its_time(kind: str, tmp_path: Path) -> None:
    with opened(written(tmp_path / f"a.{kind}", counting(40, kind))) as reader:
        seen = list(reader.thumbnails())
    assert [number_of(picture) for _, picture in seen] == list(range(40))
    assert [time for time, _ in seen] == pytest.approx([n / 25 for n in range(40)], abs=0.006)
    assert {picture.shape for _, picture in seen} == {(HIGH, 64, 3)}


def test_variable_frame_rate_goes_by_the_stamps(tmp_path: Path) -> None:
    stamps = [0, 40, 80, 1000, 1040, 3000, 3500, 3600]
    with opened(written(tmp_path / "a.mkv", counting(8, "mkv", stamps=stamps))) as reader:
        seen = list(reader.thumbnails())
        part = list(reader.thumbnails(0.9, 3.2))
    assert [time for time, _ in seen] == pytest.approx([stamp / 1000 for stamp in stamps])
    assert [number_of(picture) for _, picture in part] == [2, 3, 4, 5]


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:16, :32] = (250, 20, 20)
    with opened(
        written(tmp_path / "a.mp4", turned(encode_video([picture] * 3), 0, 1, -1, 0))
    ) as reader:
        seen = [picture for _, picture in reader.thumbnails()]
    assert len(seen) == 3
    for picture in seen:
        assert picture.shape == (64, 48, 3)  # 64x48 of the 96x48 pixels, a quarter to the right
        assert picture[10, 40, 0] > 180 and picture[40, 10, 0] < 60


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (37, 53)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    frames = [np.full((*size, 3), 200, np.uint8)] * 3
    data = encode_video(frames, "mkv", codec="ffv1", pixels="bgr0", options={})
    with opened(written(tmp_path / "a.mkv", data)) as reader:
        for _, picture in reader.thumbnails():
            assert picture.min() > 190 and min(picture.shape[:2]) >= 2


def test_what_is_left_of_a_broken_video_is_seen(tmp_path: Path) -> None:
    data = counting(80, container={"movflags": "faststart"}, options={"g": "10"})
    half = written(tmp_path / "half.mp4", data[: len(data) * 3 // 4])
    spoilt = bytearray(data)
    middle = len(data) * 2 // 3
    spoilt[middle : middle + 300] = bytes(300)
    with opened(half) as reader:
        seen = list(reader.thumbnails())
        assert 10 < len(seen) < 60 and reader.info.total < reader.info.claimed == 80
        whole = [number_of(picture) for _, picture in seen[:-1]]
        assert whole == list(range(len(whole)))
    with opened(written(tmp_path / "spoilt.mp4", bytes(spoilt))) as reader:
        times = [time for time, _ in reader.thumbnails()]
        assert len(times) >= 60 and times[0] == 0.0 and times[-1] == pytest.approx(79 / 25)


def test_looks_come_after_one_another_from_one_process(clip: Path) -> None:
    with opened(clip) as reader:
        assert (reader.info.total, reader.info.codec) == (60, "h264")
        process = reader._process
        for start, end, expected in (
            (1.0, 2.0, [25, 31, 37, 43]),
            (0.0, None, [0, 15, 30, 45]),
            (2.0, 2.16, [50, 51, 52, 53]),
        ):
            chosen = reader.read_frames(FrameOptions(num_frames=4, start=start, end=end))
            assert [number_of(picture) for _, picture in chosen.frames] == expected
            assert list(chosen.indices) == expected
            assert chosen.times == pytest.approx([number / 25 for number in expected])
            seen = [number_of(picture) for _, picture in reader.thumbnails(start, start + 0.12)]
            assert seen == [expected[0] + number for number in range(3)]
        assert reader._process is process


def test_a_look_that_is_given_up_spoils_no_other(clip: Path) -> None:
    with opened(clip) as reader:
        next(reader.thumbnails())
        next(reader.read_frames(FrameOptions(num_frames=9)).frames)
        reader.read_frames(FrameOptions(num_frames=3))
        chosen = reader.read_frames(FrameOptions(num_frames=2, start=1.0))
        assert [number_of(picture) for _, picture in chosen.frames] == [25, 42]
        with pytest.raises(RequestError, match=r"start is 9 s"):
            reader.read_frames(FrameOptions(start=9.0))
        assert [n for n, _ in reader.read_frames(FrameOptions(num_frames=2)).frames] == [0, 1]
        reader._process._process.kill()
        with pytest.raises(MediaError, match="broke off"):
            reader.read_frames(FrameOptions(num_frames=2))
        assert [n for n, _ in reader.read_frames(FrameOptions(num_frames=2)).frames] == [0, 1]
    with pytest.raises(ChildProcessError):  # none is left, not even a dead one
        os.waitpid(-1, os.WNOHANG)


def test_it_can_be_cancelled_and_has_limits(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = False

    def check() -> None:
        if enough:
            raise CancelledError("enough")

    with opened(clip, check=check) as reader:
        thumbnails = reader.thumbnails()
        next(thumbnails)
        enough = True
        with pytest.raises(CancelledError):
            list(reader.read_frames(FrameOptions(num_frames=5)).frames)
    with pytest.raises(TooLargeError), opened(clip, limits=Limits(pixels=100)):
        pass
    text = written(tmp_path / "text.mp4", b"dear diary\n" * 99)
    with pytest.raises(MediaError, match="no video"), opened(text):
        pass
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv(INTERPRETER, str(slow))
    short = Limits(seconds=0.3)
    with pytest.raises(TooLargeError, match=r"more than 0.3 s"), opened(clip, limits=short):
        pass


def test_a_decoder_that_cannot_start_gives_its_place_back(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    budget = Budget(1)
    with monkeypatch.context() as full:
        full.setattr(os, "pipe", pipe)
        with (
            pytest.raises(OSError, match="Too many open files"),
            opened(clip, limits=Limits(processes=budget)),
        ):
            pass

    def check() -> None:
        raise CancelledError("it waits for ever")

    budget.acquire(1, check)


PEAK = """
import resource, sys
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.decoder import VideoReader
with open(sys.argv[1], "rb") as file, VideoReader(file, "it") as reader:
    print(len(list(n for n, _ in enumerate(reader.thumbnails()))))
    print(sum(1 for _ in reader.read_frames(FrameOptions(num_frames=100)).frames))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_the_frames_that_have_been_seen_are_not_kept(tmp_path: Path) -> None:
    """200 frames of 0.7 MB, 100 of which are looked at whole, at 1.4 MB."""
    peaks = []
    for count in (20, 200):
        frames = [np.full((480, 960, 3), 40, np.uint8)] * count
        path = tmp_path / f"{count}.mp4"
        path.write_bytes(encode_video(frames, options={"preset": "ultrafast"}))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, path], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        thumbnails, looked, peak = map(int, done.stdout.split())
        assert (thumbnails, looked) == (count, min(count, 100))
        peaks.append(peak * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 40_000_000
