"""Small requests that ask for much: memory, time, processes. Each is refused, or answered within
bounds that hold for all requests together.
"""

import io
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hostile.sizes import cases
from PIL import Image, ImageFile
from videos import counting, encode_video, numbered

from mlx_onevision.errors import CancelledError, MediaError, TooLargeError
from mlx_onevision.media import image as module
from mlx_onevision.media import rgb
from mlx_onevision.media.decoder import Limits, VideoReader
from mlx_onevision.media.image import EncodedImage, PixelCount, load_image
from mlx_onevision.media.image_parts import MAX_FRAMES, MAX_PARTS, check_pages, orientation
from mlx_onevision.media.parallel import Budget
from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import EmbedRequest, Media
from mlx_onevision.plugins.service.media_policy import MediaPolicy

MANY = 20 * MAX_PARTS


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


@cache
def png(high: int, wide: int, before: bytes = b"") -> bytes:
    """A white image of one bit a pixel, with chunks ``before`` its pixels."""
    pack, row = zlib.compressobj(9), b"\0" + b"\xff" * ((wide + 7) // 8)
    rows = b"".join(pack.compress(row * min(64, high - n)) for n in range(0, high, 64))
    head = struct.pack(">IIBBBBB", wide, high, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + before + chunk(b"IDAT", rows + pack.flush()) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + parts


def saved(kind: str, size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, kind, **options)
    return file.getvalue()


def directory(entries: int, size: int, tag: int = 5) -> bytes:
    """EXIF whose entries all name the same ``size`` bytes."""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    return head + struct.pack("<HHII", tag, 1, size, 0) * entries + bytes(size)


def ico(image: bytes) -> bytes:
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(image), 22)
    return head + image


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 200 + data[-2:]


def gif(blocks: bytes) -> bytes:
    data = saved("GIF")
    place = data.index(b",", 13 + (3 << (data[10] & 7) + 1))
    return data[:place] + blocks + data[place:]


PARTS = "is in more than 50,000 parts; save it anew"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "13,000²": (lambda: png(13_000, 13_000), "has 169 megapixels"),
    "20,000²": (lambda: png(20_000, 20_000), "400000000 pixels"),
    "a million chunks": (lambda: png(8, 8, chunk(b"tEXt") * MANY), PARTS),
    "a million chunks of pixels": (lambda: png(8, 8, chunk(b"IDAT") * MANY), PARTS),
    "a million markers": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * MANY + saved("JPEG")[2:], PARTS),
    "a million blocks": (lambda: gif(b"!\xfe\1a\0" * MANY), PARTS),
    "a comment of a million letters": (lambda: gif(b"!\xfe" + b"\1a" * MANY + b"\0"), PARTS),
    "200 scans": (many_scans, "scans, more than 100; save it anew"),
}
MEASURED = """
import resource, sys, time
from pathlib import Path
from mlx_onevision.errors import MediaError
from mlx_onevision.media.image import load_image

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # where ru_maxrss begins with what the process that started this one had
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

small, *names = sys.argv[1:]
load_image(small)
for name in names:
    data, before, began = Path(name).read_bytes(), peak(), time.process_time()
    try:
        text = str(load_image(data, 120_000_000).shape)
    except MediaError as error:
        text = str(error)
    print(f"{peak() - before}|{time.process_time() - began}|{text}")
"""


def measured(*files: bytes, folder: Path) -> list[tuple[int, float, str]]:
    """Bytes, processor seconds and outcome of reading each, in a process of their own."""
    paths = [folder / str(number) for number in range(len(files) + 1)]
    for path, data in zip(paths, [saved("PNG"), *files], strict=True):
        path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return [(int(size), float(seconds), text) for size, seconds, text in lines]


def test_bombs_are_refused_at_once(tmp_path: Path) -> None:
    found = measured(*(make() for make, _ in BOMBS.values()), folder=tmp_path)
    for (name, (_, words)), (size, seconds, text) in zip(BOMBS.items(), found, strict=True):
        assert words in text, name
        assert size < 200 << 20 and seconds < 1, (name, size, seconds)


@pytest.mark.parametrize(
    "kind",
    [
        *("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "QOI", "JPEG2000", "AVIF", "HEIF"),
        *("ICO of PNG", "ICO of BMP"),
    ],
)
def test_too_many_pixels_are_refused_before_any_is_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pillow_heif.register_heif_opener()
    inner = kind.removeprefix("ICO of ")
    data = saved(inner, (1200, 1000))
    if kind == "ICO of BMP":  # no file's head, and its mask counts
        data = data[14:22] + struct.pack("<i", 2 * 1000) + data[26:] + bytes(1216 // 8 * 1000)
    if kind != inner:
        data = ico(data)
        data = data[:12] + b"\x18\0" + data[14:]  # bits a pixel, with which a BMP has a mask

    def decode(_: ImageFile.ImageFile) -> None:
        raise ValueError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(TooLargeError, match=r"has 1 megapixels \(1200x1000\); at most 1 are"):
        load_image(data, 1_100_000)
    with pytest.raises(MediaError, match="it was decoded"):
        load_image(data)


def animation(kind: str, count: int) -> bytes:
    """Each frame has a colour of its own, so that none is left out."""
    if kind == "TIFF":  # Pillow takes minutes for it
        (offset,) = struct.unpack("<I", (page := saved("TIFF", (40, 40)))[4:8])
        (entries,) = struct.unpack_from("<H", page, offset)
        following, data = offset + 2 + 12 * entries, bytearray(page)
        for _ in range(count - 1):  # all of them about the same pixels
            struct.pack_into("<I", data, following, len(data))
            following = len(data) + 2 + 12 * entries
            data += page[offset : offset + 2 + 12 * entries] + bytes(4)
        return bytes(data)
    frames = [Image.new("RGB", (40, 40), (n % 251, n % 7, 0)) for n in range(1, count)]
    file = io.BytesIO()
    first = Image.new("RGB", (40, 40), "teal")
    first.save(file, kind, save_all=True, append_images=frames, lossless=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame_or_too_long(kind: str, tmp_path: Path) -> None:
    files = [animation(kind, count) for count in (MAX_FRAMES, cases(MAX_FRAMES + 1, 10_000))]
    assert np.array_equal(load_image(files[0])[0, 0], [0, 128, 128])
    (read, refused) = measured(*files, folder=tmp_path)
    assert read[2] == "(40, 40, 3)"
    assert (
        "has more than 1,000 frames or pages, of which an image is the first; save that"
        in refused[2]
    )
    assert all(size < 100 << 20 and seconds < 1 for size, seconds, _ in (read, refused))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
def test_pages_are_counted_in_every_form_of_tiff(order: str, big: bool) -> None:
    number, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HH", 8, 0) if big else b""

    def pages(most: int) -> io.BytesIO:
        data = head
        for _ in range(most):
            data += struct.pack(order + number, len(data) + struct.calcsize(number))
            data += struct.pack(order + count, 2) + bytes(2 * entry)
        return io.BytesIO(data + bytes(8))

    check_pages(pages(MAX_FRAMES), "a.tiff")
    with pytest.raises(MediaError, match=r"a\.tiff has more than 1,000 frames"):
        check_pages(pages(MAX_FRAMES + 1), "a.tiff")
    loop = pages(2).getvalue()[: -8 if big else -10]
    check_pages(io.BytesIO(loop), "a.tiff")  # it breaks off within a directory
    far = struct.pack(order + number, (1 << 8 * struct.calcsize(order + number)) - 1)
    check_pages(io.BytesIO(head[: 8 if big else 4] + far), "a.tiff")
    around = bytearray(pages(1).getvalue())
    around[-8 : -8 + struct.calcsize(number)] = around[8:16] if big else around[4:8]
    with pytest.raises(MediaError, match="more than 1,000 frames"):
        check_pages(io.BytesIO(around), "a.tiff")


def test_harmless_parts_without_end_cost_little(tmp_path: Path) -> None:
    """Metadata is left out before Pillow sees it."""
    jpeg = saved("JPEG")
    exif = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part
        for part in [directory(4000, 15_000)] * 20
    )
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27), 9))
    names = ["exif of a PNG", "exif of a JPEG", "text of 128 MB"]
    found = measured(
        png(48, 64, chunk(b"eXIf", directory(60_000, 300_000))),
        jpeg[:2] + exif + jpeg[2:],
        png(48, 64, text),
        folder=tmp_path,
    )
    for name, (size, seconds, outcome) in zip(names, found, strict=True):
        assert outcome == "(48, 64, 3)", name
        assert size < 100 << 20 and seconds < 1, (name, size, seconds)


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientations_as_pillow_reads_them(order: str) -> None:
    for turn in (*range(1, 9), 0, 17):
        exif = Image.Exif()
        exif.endian = order
        exif[0x010E], exif[0x0112] = "a", turn
        data = exif.tobytes()
        assert orientation(data) == orientation(data[6:]) == turn
        for length in range(len(data)):
            assert orientation(data[:length]) in (1, turn)
    assert orientation(directory(3, 4, tag=0x0112)) == 1
    assert orientation(b"II*\0\xff\xff\xff\xff") == orientation(b"") == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK", "LA"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_strips_are_turned_as_wholes_are(
    mode: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = np.arange(50 * 41 * 3, dtype=np.uint32).reshape(50, 41, 3) * 7 % 256
    image = Image.fromarray(levels.astype(np.uint8)).convert(mode)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    image.save(file, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    whole = load_image(file.getvalue())
    monkeypatch.setattr(rgb, "_LARGE", 16 * 41 * 7)
    assert np.array_equal(load_image(file.getvalue()), whole)


# Memory of all images together.

TOGETHER = """
import resource, sys
from pathlib import Path
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.media import image as module
from mlx_onevision.media.parallel import Budget, parallel_map
from mlx_onevision.media.tiles import pad_to_square_tile

{peak}

most = int(sys.argv[2])
module._memory = Budget(most)
def tile(data):
    _, read = module.identify_image(data)
    with read() as pixels:
        tile = pad_to_square_tile(pixels, ImageConfig())
        del pixels
    return tile
tile(Path(sys.argv[1]).read_bytes())
before = peak()
parallel_map(tile, [Path(sys.argv[1]).read_bytes()] * 12)
print(peak() - before)
"""


def test_images_are_reduced_to_tiles_one_after_another(tmp_path: Path) -> None:
    """Twelve images, two at a time: what is decoded never passes the budget, and what was resized
    is not kept by work that was given up.
    """
    side = cases(2600, 6300)
    data = png(side, side)
    (tmp_path / "a.png").write_bytes(data)
    one = 4 * side * side
    peak = MEASURED[MEASURED.index("def peak") : MEASURED.index("small,")]
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER.format(peak=peak), str(tmp_path / "a.png"), str(2 * one)],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    # One is in what was there before; beside it are the tables of each thread.
    assert int(done.stdout) < 2 * one + (40 << 20)


def test_a_budget_is_never_passed_and_leaves_nobody_waiting() -> None:
    budget, held, most = Budget(10), [0], [0]
    lock = threading.Lock()

    def work(size: int) -> None:
        with budget.holding(size):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= size

    threads = [threading.Thread(target=work, args=[size % 7 + 1]) for size in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and 7 < most[0] <= 10
    with budget.holding(1000):  # alone, whatever it is

        def cancelled() -> None:
            raise CancelledError("gone")

        with pytest.raises(CancelledError):
            budget.acquire(1, cancelled)
    budget.acquire(10)


def test_the_pixels_of_a_request_are_counted_together() -> None:
    together = PixelCount(5000)
    images = [EncodedImage(png(48, 50 + n), f"image {n}", 4000, together) for n in range(3)]
    load_image(images[0])
    load_image(images[1])
    with pytest.raises(TooLargeError, match="more than 0 megapixels together; at most 0 are read"):
        load_image(images[2])


# Kinds of images that the process of the request does not decode.


def watched(call: Callable[[], Any]) -> tuple[Any, int]:
    """What ``call`` returns, and how many processes it started."""
    started = []
    watching = True

    def hook(event: str, _: Any) -> None:
        if watching and event == "subprocess.Popen":
            started.append(event)

    sys.addaudithook(hook)
    try:
        return call(), len(started)
    finally:
        watching = False


def test_rare_kinds_of_images_are_decoded_elsewhere() -> None:
    with open_backend("engine", policy=MediaPolicy()) as backend:

        def vector(kind: str, **options: Any) -> Any:
            medium = Media("image", data=saved(kind, **options))
            return backend.embed(EmbedRequest([medium])).vectors

        expected, started = watched(lambda: vector("PNG"))
        assert started == 0
        for kind, options, processes in (
            ("JPEG", {"quality": 100, "subsampling": 0}, 0),
            ("WEBP", {"lossless": True}, 0),
            ("GIF", {}, 0),
            ("BMP", {}, 0),
            ("TIFF", {}, 1),
            ("PPM", {}, 1),
            ("QOI", {}, 1),
            ("JPEG2000", {}, 1),
        ):
            found, started = watched(lambda k=kind, o=options: vector(k, **o))
            assert started == processes, kind
            assert np.abs(np.array(found) - expected).max() < (0.2 if kind == "JPEG" else 1e-6)
        for data, words in (
            (ico(png(3000, 15_000)), "cannot read the image given as bytes: it has 45 megapixels"),
            (b"II*\0" + bytes(9), "cannot read the image given as bytes: it is"),
            (b"%PDF", "it is not an image of the kinds that are read"),
        ):
            with pytest.raises(PluginError, match=words):
                backend.embed(EmbedRequest([Media("image", data=data)]))
    with open_backend("engine", policy=MediaPolicy.trusting()) as backend:
        assert watched(lambda: vector("TIFF"))[1] == 0


def test_what_would_take_more_than_the_memory_is_decoded_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MEMORY", 64 * 48 * 9)
    limits = Limits(memory=1 << 30)
    for progressive, processes in ((False, 0), (True, 1)):
        data = saved("JPEG", progressive=progressive)
        pixels, started = watched(
            lambda d=data: load_image(EncodedImage(d, "a", 9999, None, limits))
        )
        assert started == processes and np.array_equal(pixels, load_image(data))


# Processes that decode.


def promising(frames: int) -> bytes:
    """A small MP4 whose tables promise many frames."""
    data = bytearray(encode_video([numbered(1)] * 30, "mp4", container={"movflags": "faststart"}))
    table = data.index(b"stsz") - 4
    (size,) = struct.unpack_from(">I", data, table)
    new = struct.pack(">I4sIII", 20, b"stsz", 0, 100, frames)
    data[table : table + size] = new + struct.pack(">I4s", size - 20, b"free") + bytes(size - 28)
    for kind, offset in ((b"stts", 12), (b"stsc", 16)):
        place = data.index(kind) + offset
        data[place : place + 4] = struct.pack(">I", frames)
    return bytes(data)


def reader(data: bytes, folder: Path, limits: Limits, **options: Any) -> VideoReader:
    path = folder / "a.mp4"
    path.write_bytes(data)
    with path.open("rb") as file:
        return VideoReader(file, "'a.mp4'", limits, **options)


def test_tables_that_promise_millions_are_refused_before_they_are_read(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TooLargeError, match=r"a\.mp4': it has more than 4,000,000 frames"):
        reader(promising(30_000_000), tmp_path, Limits(memory=256 << 20))
    # A process starts in a second or so, and 30 million entries take a minute and two gigabytes.
    assert time.monotonic() - began < 15


def test_so_many_decoders_work_at_once(tmp_path: Path) -> None:
    """One that rests between two commands is not counted, one that is not read to its end is."""
    limits = Limits(processes=Budget(1))
    with reader(counting(9), tmp_path, limits) as first:
        with reader(counting(9), tmp_path, limits) as second:  # the first one rests
            frames = first.thumbnails()
            next(frames)
            done: list[int] = []
            thread = threading.Thread(
                target=lambda: done.append(len(list(second.thumbnails()))), daemon=True
            )
            thread.start()
            thread.join(1)
            assert thread.is_alive() and not done
            list(frames)
            thread.join(30)
            assert done == [9]
            frames = first.thumbnails()
            next(frames)
            del frames  # given up
            assert len(list(second.thumbnails())) == 9


@pytest.fixture
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program of the shell in the place of the decoder."""

    def put(program: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
        monkeypatch.setenv("MLX_ONEVISION_PYTHON", str(path))

    return put


def test_a_hung_decoder_gives_its_place_back(
    tmp_path: Path, interpreter: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(seconds=0.5, processes=Budget(1))
    interpreter("exec sleep 600")
    for _ in range(2):
        with pytest.raises(TooLargeError, match=r"takes more than 0\.5 s"):
            reader(counting(3), tmp_path, limits)
        with pytest.raises(TooLargeError, match=r"takes more than 0\.5 s"):
            load_image(EncodedImage(saved("TIFF"), "a.tif", 9999, None, limits))
    interpreter("exit 3")
    with pytest.raises(MediaError, match=r"broke off \(code 3\)"):
        load_image(EncodedImage(saved("TIFF"), "a.tif", 9999, None, limits))
    monkeypatch.delenv("MLX_ONEVISION_PYTHON")
    assert limits.processes is not None
    limits.processes.acquire(1)


def test_a_decoder_knows_no_secrets(
    tmp_path: Path, interpreter: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "MLX_ONEVISION_API_KEY", "AWS_SECRET_ACCESS_KEY", "HOME"):
        monkeypatch.setenv(name, "secret")
    seen = tmp_path / "seen"
    interpreter(f"/usr/bin/env > '{seen}'; exit 3")
    with pytest.raises(MediaError):
        reader(counting(3), tmp_path, Limits())
    assert "PATH=" in seen.read_text() and "secret" not in seen.read_text()


# Text that comes as base64.


def test_blanks_in_base64_take_no_memory_of_their_own(tmp_path: Path) -> None:
    program = """
    import resource, sys
    from mlx_onevision.media.sources import data_uri
    text = "data:image/png;base64," + "A " * 15_000_000 + "AA=="[: 0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data_uri(text)
    unit = 1 if sys.platform == "darwin" else 1024
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    # A copy as bytes, one without blanks, and what they stand for.
    assert int(done.stdout) < 100 << 20
