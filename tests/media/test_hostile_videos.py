"""Files that are no video, not a whole one, too large a one, or want to be followed elsewhere.

Each ends in frames or in one sentence, within its limits, and opens no other file and no address.
"""

import base64
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from checkpoints import write
from click.testing import CliRunner
from hostile.sizes import cases
from PIL import Image
from videos import HIGH, KINDS, WIDE, counting, encode_video, number_of, written

from mlx_onevision.cli.main import cli
from mlx_onevision.errors import MediaError, RequestError, TooLargeError
from mlx_onevision.media.decoder import Limits
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.video import VideoFrames, load_video

SIZE = 56


def load(source: Any, limits: Limits | None = None, **options: Any) -> VideoFrames:
    return load_video(source, SIZE, FrameOptions(**options), limits=limits)


def refused(source: Any, *parts: str, **options: Any) -> str:
    with pytest.raises((MediaError, RequestError)) as error:
        load(source, **options)
    return sentence(str(error.value), *parts)


def sentence(message: str, *parts: str) -> str:
    """One line, short, without a full stop; names what is wrong."""
    assert "\n" not in message and len(message) < 300 and not message.endswith(".")
    for part in parts:
        assert part in message, message
    return message


def empty(kind: str) -> bytes:
    """A file whose video has not a single frame."""
    buffer = io.BytesIO()
    codec, pixels, _ = KINDS[kind]
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(kind, kind)) as out:
        stream: Any = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        out.start_encoding()
    return buffer.getvalue()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream: Any = out.add_stream("aac", rate=48000, layout="mono")
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 48000, number * 1024
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


@cache
def huge(high: int, wide: int) -> bytes:
    """One black frame of Motion JPEG, which is quick to write."""
    frame = np.zeros((high, wide, 3), np.uint8)
    return encode_video([frame], "mkv", codec="mjpeg", pixels="yuvj420p", options={})


def claims_to_be_huge() -> bytes:
    """A small GIF that says it has 65,535 by 65,535 pixels."""
    buffer = io.BytesIO()
    Image.new("P", (40, 30)).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    data[6:10] = b"\xff" * 4
    return bytes(data)


def test_what_is_no_video_is_one_sentence(tmp_path: Path) -> None:
    refused(tmp_path / "none.mp4", "none.mp4", "does not exist")
    refused(tmp_path, "is a folder")
    refused("ftp://host/a.mp4", "http")
    refused("data:video/mp4,hello", "base64")
    refused(b"", "empty")
    refused(written(tmp_path / "empty.mp4", b""), "empty.mp4", "empty")
    refused(written(tmp_path / "text.mp4", b"dear diary\n" * 99), "text.mp4", "no video")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "no ordinary file")
    refused(written(tmp_path / "sound.mp4", sound()), "sound.mp4", "only sound")
    refused(counting(3), "start is 9 s", start=9)


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "webm", "avi"])
def test_no_frame_at_all(kind: str) -> None:
    refused(empty(kind), "no ")


# Lists that name other files.


@pytest.fixture
def visits() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that has a video, and what was asked of it."""
    asked: list[str] = []
    data = counting(3)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/film.mp4", asked
    server.shutdown()
    server.server_close()


def lists(target: str) -> dict[str, str]:
    """Playlists of three kinds that name a file or an address."""
    return {
        "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
        "mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-main:2011"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="80" '
        f'height="48" codecs="avc1.42c01e"><BaseURL>{target}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>\n",
    }


@pytest.mark.parametrize("kind", ["ffconcat", "m3u8", "mpd"])
def test_a_list_that_names_another_file_opens_nothing(
    kind: str, tmp_path: Path, visits: tuple[str, list[str]]
) -> None:
    """By its own name, as an MP4, as bytes and in a data URI."""
    address, asked = visits
    for target in (str(written(tmp_path / "target.mp4", counting(3))), address):
        data = lists(target)[kind].encode()
        encoded = base64.b64encode(data).decode()
        for suffix in (kind, "mp4"):
            refused(written(tmp_path / f"list.{suffix}", data), f"list.{suffix}", "no video")
        refused(data, "as bytes", "no video")
        refused(f"data:video/mp4;base64,{encoded}", "data URI", "no video")
        refused(f"data:application/vnd.apple.mpegurl;base64,{encoded}", "data URI", "no video")
    assert not asked


def test_names_that_libav_would_follow(tmp_path: Path) -> None:
    target = written(tmp_path / "target.mp4", counting(3))
    for name in (f"concat:{target}", f"subfile,,start,0,end,0,,:{target}", f"file:{target}"):
        refused(name, "does not exist")


# Files that break off.


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("fast mp4", cases(25, 100)),
        ("mp4", cases(5, 20)),
        ("mkv", cases(10, 40)),
        ("gif", cases(10, 40)),
    ],
)
def test_a_file_that_breaks_off(kind: str, points: int) -> None:
    """At many points: what could be decoded, with a note; or one sentence. Soon, either way."""
    fast = {"container": {"movflags": "faststart"}} if kind == "fast mp4" else {}
    data = counting(60, kind.split()[-1], **fast)

    def at(point: int) -> VideoFrames | None:
        try:
            return load(data[: len(data) * point // (points + 1)], num_frames=6)
        except MediaError as error:
            sentence(str(error), "as bytes")
            return None

    with ThreadPoolExecutor(3) as pool:
        clips = list(pool.map(at, range(1, points + 1)))
    for clip in filter(None, clips):
        assert clip.times is not None
        whole = len(clip.tiles) - (kind == "gif")  # its last frame may be there in part
        shown = [number_of(tile) for tile in clip.tiles[:whole]]
        assert shown == [round(second * 25) for second in clip.times[:whole]]
    last = clips[-1]
    if kind == "mp4":  # its index stands at the end
        assert not any(clips)
    else:
        assert last is not None and len(last.tiles) >= 5
        assert kind != "fast mp4" or "breaks off" in last.notes[0]


def test_damage_in_the_middle_leaves_the_rest() -> None:
    data = bytearray(counting(80, options={"g": "10"}))
    middle = data.index(b"mdat") + 2000
    data[middle : middle + 300] = bytes(300)
    clip = load(bytes(data), num_frames=16)
    assert len(clip.tiles) >= 8
    assert clip.indices[0] == 0 and clip.indices[-1] > 60


# Files that are too large, or take too long.


def test_not_all_frames_are_used_where_some_cannot_be_decoded() -> None:
    data = bytearray(counting(80, container={"movflags": "faststart"}, options={"g": "10"}))
    assert load(bytes(data), num_frames=90).notes[0].endswith("asked for: all are used")
    middle = len(data) * 2 // 3
    data[middle : middle + 300] = bytes(300)
    damaged, fewer = load(bytes(data), num_frames=90).notes
    assert "of 80 chosen frames cannot be decoded" in damaged
    assert fewer.endswith("has 80 frames there, fewer than the 90 that were asked for")


def test_a_frame_that_is_too_large_is_refused() -> None:
    data = counting(2)
    with pytest.raises(TooLargeError, match=f"{WIDE}x{HIGH}"):
        load(data, limits=Limits(pixels=WIDE * HIGH - 1))
    assert len(load(data, limits=Limits(pixels=WIDE * HIGH)).tiles) == 2


def test_8k_is_read_and_more_is_not() -> None:
    assert load(huge(4320, 7680)).tiles.shape == (1, SIZE, SIZE, 3)
    refused(huge(4400, 8192), "8192x4400")
    refused(claims_to_be_huge(), "none of its 1 frames can be decoded")


def test_decoding_ends_when_its_time_is_up() -> None:
    started = time.monotonic()
    refused(huge(4320, 7680), "more than 0.1 s", limits=Limits(seconds=0.1))
    assert time.monotonic() - started < 5


# All of them as a person meets them.

HOSTILE: dict[str, Callable[[], bytes]] = {
    "only sound": sound,
    "no frames": lambda: empty("mp4"),
    "8k and more": lambda: huge(4400, 8192),
    "text": lambda: b"dear diary\n" * 99,
    "a playlist": lambda: lists("/etc/hosts")["m3u8"].encode(),
    "a list of files": lambda: lists("/etc/hosts")["ffconcat"].encode(),
    "a manifest": lambda: lists("/etc/hosts")["mpd"].encode(),
    "nothing but its first bytes": lambda: counting(9)[:40],
    "half of it": lambda: (data := counting(9))[: len(data) // 2],
    "all but its end": lambda: counting(9)[:-99],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.mark.parametrize("name", HOSTILE)
def test_the_command_says_one_sentence(name: str, folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.mp4", HOSTILE[name]())
    common = ("generate", "--model", str(folder), "--prompt", "What?", "--video", str(path))
    done = CliRunner().invoke(cli, common)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "defect" not in line
    sentence(line, "bad.mp4")


def test_the_command_reads_one_pixel(folder: Path, tmp_path: Path) -> None:
    pixel = encode_video(
        [np.zeros((1, 1, 3), np.uint8)], "mkv", codec="ffv1", pixels="bgr0", options={}
    )
    path = written(tmp_path / "pixel.mkv", pixel)
    common = ("generate", "--model", str(folder), "--prompt", "What?", "--video", str(path))
    done = CliRunner().invoke(cli, [*common, "--max-tokens", "4"])
    assert (done.exit_code, done.stderr) == (0, "")
