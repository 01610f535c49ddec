"""Videos to tiles: every container, which frames exactly, and the process that decodes."""

import os
import re
import stat
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from images import noise
from PIL import Image
from videos import (
    BITS,
    KINDS,
    counting,
    encode_video,
    number_of,
    numbered,
    trimmed,
    turned,
    written,
)

from mlx_onevision.errors import CancelledError, MediaError, RequestError
from mlx_onevision.media.decoder import Limits, VideoReader
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.resize import resize
from mlx_onevision.media.video import TooManyFramesError, VideoFrames, load_video
from mlx_onevision.subprocesses import INTERPRETER

SIZE = 56


def load(
    source: Any, size: int = SIZE, limits: Limits | None = None, **options: Any
) -> VideoFrames:
    return load_video(source, size, FrameOptions(**options), limits=limits)


def numbers(clip: VideoFrames) -> list[int]:
    return [number_of(tile) for tile in clip.tiles]


def decoded(data: Path, **options: Any) -> list[np.ndarray]:
    """Whole frames, before they become tiles."""
    with data.open("rb") as file, VideoReader(file, "it", once=True) as reader:
        return [frame.copy() for _, frame in reader.read_frames(FrameOptions(**options)).frames]


def refused(source: Any, *parts: str, limits: Limits | None = None, **options: Any) -> str:
    with pytest.raises((MediaError, RequestError)) as error:
        load(source, limits=limits, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 300 and not message.endswith(".")
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_frames_and_no_others(kind: str) -> None:
    clip = load(counting(50, kind), num_frames=8)
    assert clip.indices == (0, 6, 12, 18, 25, 31, 37, 43)
    assert numbers(clip) == list(clip.indices)
    assert clip.times == pytest.approx([index / 25 for index in clip.indices], abs=0.006)
    assert (clip.total, clip.notes) == (50, ())
    assert clip.length == pytest.approx(2.0, abs=0.05)
    assert clip.tiles.shape == (8, SIZE, SIZE, 3) and clip.tiles.dtype == np.uint8


@pytest.mark.parametrize(
    ("data", "total"),
    [
        (lambda: trimmed(counting(80), 1000), 25),
        (lambda: trimmed(counting(80, options={"bf": "0"}), 2000), 50),
        (lambda: trimmed(counting(80, "mov"), 400), 10),
        # The gaps become frames without a byte.
        (
            lambda: encode_video(
                map(numbered, range(9)), "avi", stamps=[0, 1, 2, 8, 9, 10, 20, 21, 30]
            ),
            9,
        ),
        (
            lambda: encode_video(
                map(numbered, range(3)), "avi", stamps=[0, 5, 6], options={"bf": "0"}
            ),
            3,
        ),
    ],
    ids=["mp4", "mp4 in order", "mov", "avi", "avi in order"],
)
def test_frames_that_are_left_out_on_purpose_are_no_damage(
    data: Callable[[], bytes], total: int
) -> None:
    clip = load(data())
    assert clip.notes == () and abs(clip.total - total) <= 1
    assert numbers(clip) == list(clip.indices)


@pytest.mark.parametrize("kind", ["mp4", "avi"])
@pytest.mark.parametrize("between", [False, True], ids=["in a frame", "between frames"])
def test_frames_that_are_cut_off_are_noted(kind: str, between: bool) -> None:
    options = {"movflags": "faststart"} if kind == "mp4" else {}
    data = counting(80, kind, container=options, options={"g": "12", "bf": "0"})
    with av.open(BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        place = packets[40].pos
    assert place is not None
    clip = load(data[: place if between else place + 20], num_frames=5)
    assert re.search(r"breaks off: 4[01] of its 80 frames are there", clip.notes[0])


def test_an_mpeg_stream_of_blu_rays_and_camcorders() -> None:
    """M2TS: a transport stream with four bytes of time before each packet."""
    data = counting(40, "ts", container={"mpegts_m2ts_mode": "1"})
    assert data[4] == 0x47
    clip = load(data, num_frames=8)
    assert numbers(clip) == list(clip.indices) and clip.times is not None
    assert clip.times == pytest.approx([n / 25 for n in clip.indices], abs=0.001)


def test_theora_is_decoded() -> None:
    assert "theora" in av.codecs_available


@pytest.mark.parametrize(
    ("kind", "options", "part"),
    [
        ("WEBP", {"save_all": True}, "it is an animated WebP, of which only the first frame"),
        ("WEBP", {}, "it is an image, not a video; give it as an image"),
        ("JPEG", {}, "it is an image, not a video; give it as an image"),
        ("PNG", {}, "it is an image, not a video; give it as an image"),
        ("AVIF", {}, "it is an image, not a video; give it as an image"),
    ],
)
def test_an_image_is_refused_as_one(kind: str, options: dict[str, Any], part: str) -> None:
    file = BytesIO()
    frames = [Image.fromarray(noise(20, 30, 3, seed=n)) for n in range(3)]
    more = {"append_images": frames[1:]} if options else {}
    frames[0].save(file, kind, **options, **more)
    refused(file.getvalue(), part)


@pytest.mark.parametrize("data", [b"nothing of the kind", b"#EXTM3U\nhttp://a/b.ts", bytes(400)])
def test_a_refusal_names_the_kinds_that_are_read(data: bytes) -> None:
    refused(data, "(MP4, MOV, Matroska, WebM, AVI, GIF, MPEG-TS, M2TS, MPEG-PS, Ogg)")


def test_32_frames_unless_the_caller_says_how_many(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", counting(100))
    assert load(path).indices == tuple(i * 100 // 32 for i in range(32))
    assert load(str(path), fps=5).indices == tuple(range(0, 100, 5))
    assert load(path, start=1, end=2, num_frames=5).indices == (25, 30, 35, 40, 45)
    with path.open("rb") as file:
        assert load(file, num_frames=1).indices == (0,)


def test_more_frames_than_there_are_means_all_of_them() -> None:
    clip = load(counting(5), num_frames=8)
    assert numbers(clip) == [0, 1, 2, 3, 4]
    (note,) = clip.notes
    assert "5 frames" in note and "8" in note
    assert load(counting(5)).notes == ()  # nobody asked for more


@pytest.mark.parametrize("kind", KINDS)
def test_from_end_to_end_frames_may_come_twice(kind: str) -> None:
    clip = load(counting(5, kind), num_frames=8, ends=True)
    assert numbers(clip) == list(clip.indices) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert clip.notes == ()
    assert numbers(load(counting(50, kind), num_frames=3, ends=True)) == [0, 24, 49]
    frames = [np.full((SIZE, SIZE, 3), value, np.uint8) for value in range(3)]
    clip = load(frames, num_frames=4, ends=True)
    assert clip.tiles[:, 0, 0, 0].tolist() == [0, 0, 1, 2] and clip.notes == ()


@pytest.mark.parametrize("reordered", [0, 2])
@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_what_is_sought_is_what_counting_from_the_start_finds(kind: str, reordered: int) -> None:
    data = counting(300, kind, options={"g": "25", "bf": str(reordered)})
    clip = load(data, num_frames=7)
    assert numbers(clip) == list(clip.indices) == [i * 300 // 7 for i in range(7)]


def test_frames_of_a_gop_that_refers_back_across_its_key_frame() -> None:
    """Open groups: frames before a key frame in time but behind it in the file."""
    data = counting(120, options={"g": "20", "x264-params": "open-gop=1:bframes=3:b-adapt=0"})
    assert numbers(load(data, num_frames=40)) == list(range(0, 120, 3))
    assert numbers(load(data, num_frames=3)) == [0, 40, 80]


def test_variable_frame_rate_goes_by_the_stamps() -> None:
    stamps = [0, 40, 80, 1000, 1040, 3000, 3500, 3600]
    data = counting(8, "mkv", stamps=stamps)
    clip = load(data)
    assert numbers(clip) == list(range(8))
    assert clip.times == pytest.approx([stamp / 1000 for stamp in stamps])
    assert load(data, start=0.9, end=3.2).indices == (2, 3, 4, 5)
    assert load(data, fps=2).indices == (0, 2, 4, 5)
    assert numbers(load(counting(8, stamps=stamps), num_frames=4)) == [0, 2, 4, 6]


MATRICES = {
    "a quarter right": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "a quarter left": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


@cache
def upright() -> bytes:
    """A video with a corner of one colour and the opposite one of another."""
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:16, :32] = (250, 20, 20)
    picture[32:, 64:] = (20, 20, 250)
    return encode_video([picture] * 2)


@pytest.mark.parametrize("name", MATRICES)
def test_a_turned_video_is_upright(name: str, tmp_path: Path) -> None:
    matrix, expected = MATRICES[name]
    (frame,) = decoded(written(tmp_path / "plain.mp4", upright()), num_frames=1)
    (turn,) = decoded(written(tmp_path / "turned.mp4", turned(upright(), *matrix)), num_frames=1)
    np.testing.assert_array_equal(turn, expected(frame))
    clip = load(tmp_path / "turned.mp4", num_frames=1)
    np.testing.assert_array_equal(
        clip.tiles[0], resize(np.ascontiguousarray(expected(frame)), (SIZE, SIZE))
    )


@pytest.mark.parametrize(
    ("kind", "codec", "pixels"),
    [
        ("mp4", "libx265", "yuv420p10le"),
        ("mkv", "libx264", "yuv422p10le"),
        ("webm", "libsvtav1", "yuv420p10le"),
        ("mkv", "ffv1", "yuv444p"),
        ("mov", "prores_ks", "yuv422p10le"),
        ("mov", "mjpeg", "yuvj420p"),
        ("avi", "rawvideo", "bgr24"),
        ("mkv", "libx264", "gray"),
    ],
)
def test_other_codecs_and_ten_bits(kind: str, codec: str, pixels: str) -> None:
    clip = load(counting(9, kind, codec=codec, pixels=pixels, options={}), num_frames=3)
    assert numbers(clip) == [0, 3, 6]
    assert clip.tiles.min() < 12 and clip.tiles.max() > 243  # black is black and white is white
    if sys.platform == "linux":
        assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (2, 200), (241, 3)])
@pytest.mark.parametrize("kind", ["gif", "mkv"])
def test_odd_sizes(kind: str, size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 255, np.uint8)
    picture[0] = 0
    if kind == "gif":
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, "GIF")
        data = buffer.getvalue()
    else:
        data = encode_video([picture] * 3, kind, codec="ffv1", pixels="bgr0", options={})
    clip = load(data)
    assert clip.tiles.shape[1:] == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(clip.tiles[-1], resize(picture, (SIZE, SIZE)))


def test_large_frames_come_whole(tmp_path: Path) -> None:
    """Of several times what the pipe holds."""
    frames = [noise(900, 1300, 3, seed=seed) for seed in range(3)]
    path = tmp_path / "clip.mkv"
    path.write_bytes(encode_video(frames, "mkv", codec="ffv1", pixels="bgr0", options={}))
    for frame, expected in zip(decoded(path), frames, strict=True):
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_frame(kind: str) -> None:
    clip = load(counting(1, kind))
    assert clip.indices == (0,) and clip.total == 1 and numbers(clip) == [0]
    assert load(counting(1, kind), fps=2).indices == (0,)


def test_frames_that_are_there_already(tmp_path: Path) -> None:
    frames = np.stack([numbered(n) for n in range(10)])
    expected = np.stack([resize(frame, (SIZE, SIZE)) for frame in frames])
    paths = []
    for number, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(frame).save(paths[-1])
    pictures = [Image.fromarray(frame) for frame in frames]
    sources = [frames, frames.transpose(0, 3, 1, 2), list(frames), tuple(pictures), paths]
    for source in sources:
        clip = load(source)
        np.testing.assert_array_equal(clip.tiles, expected)
        assert clip.indices == tuple(range(10)) and clip.times is None and clip.length is None
        assert load(source, num_frames=4).indices == (0, 2, 5, 7)
    assert "10 frames" in load(frames, num_frames=11).notes[0]
    np.testing.assert_array_equal(load(frames[..., :1]).tiles, expected)


@pytest.mark.parametrize(
    ("source", "options", "part"),
    [
        (np.zeros((5, 8, 8), np.uint8), {}, "four axes"),
        (np.zeros((2, 5, 8, 8, 3), np.uint8), {}, "four axes"),
        (np.zeros((5, 8, 8, 3)), {}, "frame 0 of a video: the array of shape (8, 8, 3) holds"),
        (np.zeros((5, 8, 8, 7), np.uint8), {}, "channels"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "no frame"),
        ([], {}, "no frame"),
        (["no/such.png"], {}, "no/such.png"),
        (np.zeros((5, 8, 8, 3), np.uint8), {"fps": 2}, "no clock"),
        ([np.zeros((8, 8, 3), np.uint8)], {"start": 1}, "no clock"),
        (17, {}, "a int is not a video"),
    ],
)
def test_frames_that_are_none(source: Any, options: dict[str, Any], part: str) -> None:
    refused(source, part, **options)


def test_too_many_frames_are_refused_before_any_is_decoded() -> None:
    for source in (counting(40), np.zeros((40, 8, 8, 3), np.uint8)):
        with pytest.raises(TooManyFramesError) as error:
            load_video(source, SIZE, FrameOptions(num_frames=40), most=20)
        assert error.value.wanted == 40


# The process.


def interpreter(path: Path, script: str) -> str:
    """A stand-in for the Python that decodes."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("kill -9 $$", "signal 9"),
        ("kill -SEGV $$", "signal 11"),
        ("exit 3", "code 3"),
        ("echo nonsense", "broke off"),
        ("""echo '{"video": {"total": 1}}'""", "broke off"),
        ("""echo '{"error": 5}'""", "broke off"),
        ("exec cat /dev/zero", "broke off"),
        ("exec sleep 60", "more than 0.5 s"),
    ],
)
def test_whatever_becomes_of_the_process_is_one_sentence(
    script: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERPRETER, interpreter(tmp_path / "python", script))
    started = time.monotonic()
    refused(counting(2), part, limits=Limits(seconds=0.5))
    assert time.monotonic() - started < 10
    with pytest.raises(ChildProcessError):  # none is left, not even a dead one
        os.waitpid(-1, os.WNOHANG)


def test_frames_that_are_not_what_they_say_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = '{"video": {"total": 2, "length": 1, "claimed": 2, "codec": "x"}}'
    chosen = '{"chosen": {"indices": [0, 1], "times": [0, 1]}}'
    good = '"place": 0, "wide": 4, "high": 4, "stride": 12, "bytes": 48, "matrix": [1, 0, 0, 1]'
    for old, new in [('"wide": 4', '"wide": 4000000'), ('"place": 0', '"place": 2'),
                     ('"bytes": 48', '"bytes": 9000000000'), ('"stride": 12', '"stride": 11'),
                     ('"high": 4', '"high": -4'), ("[1, 0, 0, 1]", "[1]")]:  # fmt: skip
        frame = '{"frame": {' + good.replace(old, new) + "}}"
        script = f"echo '{info}'; echo '{chosen}'; echo '{frame}'; exec cat /dev/zero"
        monkeypatch.setenv(INTERPRETER, interpreter(tmp_path / "python", script))
        refused(counting(2), "broke off")


def test_memory_is_bounded(tmp_path: Path) -> None:
    data = encode_video([np.zeros((1200, 1600, 3), np.uint8)] * 4)
    assert len(load(data).tiles) == 4
    with pytest.raises(MediaError):
        load(data, limits=Limits(memory=60 << 20))


def test_no_more_than_a_frame_and_the_tiles_are_held() -> None:
    frames = (np.full((720, 1280, 3), 2 * n, np.uint8) for n in range(24))
    data = encode_video(frames, options={"preset": "ultrafast"})
    one = 720 * 1280 * 3
    load(data, num_frames=2)  # what is kept once for all
    tracemalloc.start()
    clip = load(data, num_frames=24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(clip.tiles) == 24
    assert peak < clip.tiles.nbytes + 8 * one


def test_it_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise CancelledError("enough")

    with pytest.raises(CancelledError):
        load_video(counting(4), SIZE, check=check)
    with pytest.raises(CancelledError):
        load_video(np.zeros((4, 8, 8, 3), np.uint8), SIZE, check=check)
    monkeypatch.setenv(INTERPRETER, interpreter(tmp_path / "python", "exec sleep 60"))
    with pytest.raises(CancelledError):
        load_video(counting(4), SIZE, check=check)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_an_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("executable", "exec_prefix", "base_exec_prefix"):
        monkeypatch.setattr(f"sys.{name}", "/no/such/HostApp")
    refused(counting(2), INTERPRETER)


def test_a_host_application_is_not_started_as_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert numbers(load(counting(2))) == [0, 1]


def test_numbers_can_be_read_back() -> None:
    for number in (0, 1, 341, 682, 2**BITS - 1):
        assert number_of(resize(numbered(number), (SIZE, SIZE))) == number
