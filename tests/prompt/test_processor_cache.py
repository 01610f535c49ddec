"""Media that come again are not decoded, resized and hashed again; nothing else changes."""

import io
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import noise
from PIL import Image, ImageFile
from prompts import checkpoint, config
from videos import counting, encode_video, numbered

from mlx_onevision.errors import ContextOverflowError, MediaError
from mlx_onevision.media import image as images
from mlx_onevision.media import resize
from mlx_onevision.media.image import DecodedImage
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder, config())


class Work:
    """What was decoded and resized: images loaded by Pillow, processes started, resizing passes."""

    def __init__(self) -> None:
        self.loaded = self.started = self.passes = 0

    @property
    def all(self) -> tuple[int, int, int]:
        return self.loaded, self.started, self.passes


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    seen, lock = Work(), threading.Lock()

    def count(owner: Any, method: str, name: str, counts: Any = lambda *_: True) -> None:
        original = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with lock:
                setattr(seen, name, getattr(seen, name) + bool(counts(*args)))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    # Pillow calls load() of a decoded image, too, which has no parts left to read.
    count(ImageFile.ImageFile, "load", "loaded", lambda image: image.tile)
    count(subprocess, "Popen", "started", lambda args: "decoder_process" in args[2])
    count(resize, "_across", "passes")
    count(resize, "_down", "passes")
    yield seen


def png(*size: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(*size, 3, seed=seed)).save(file, "PNG")
    return file.getvalue()


def ask(processor: Processor, *media: Any, turns: int = 1, **options: Any) -> Inputs:
    content = [{"type": kind, kind: source} for kind, source in media]
    talk: list[dict[str, Any]] = [{"role": "user", "content": [*content, text("Q")]}]
    for _ in range(turns - 1):
        talk += [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}]
    return processor.prepare(normalise_messages(messages=talk), **options)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def same(one: Inputs, other: Inputs) -> None:
    assert [m.key for m in one.media] == [m.key for m in other.media]
    for first, second in zip(one.media, other.media, strict=True):
        np.testing.assert_array_equal(first.tiles, second.tiles)
        assert (first.size, first.packing, first.tokens) == (
            second.size,
            second.packing,
            second.tokens,
        )


@pytest.mark.parametrize("kind", ["bytes", "path", "file", "array", "object", "decoded"])
def test_an_image_is_prepared_once(
    kind: str, processor: Processor, folder: Path, work: Work, tmp_path: Path
) -> None:
    data, path = png(100, 300), tmp_path / "image.png"
    path.write_bytes(data)
    pixels = noise(100, 300, 3)

    def source() -> Any:
        given = {"bytes": data, "path": path, "array": pixels, "decoded": DecodedImage(pixels)}
        given |= {"file": io.BytesIO(data), "object": Image.fromarray(pixels)}
        return given[kind]

    first = ask(processor, ("image", source()))
    before = work.all
    assert before[0] == (kind in ("bytes", "path", "file")) and before[2] > 0
    second = ask(processor, ("image", source()), turns=2)
    assert work.all == before
    same(first, second)
    same(second, ask(Processor.from_folder(folder, config()), ("image", source()), turns=2))


def test_a_video_file_is_decoded_once(processor: Processor, folder: Path, work: Work) -> None:
    data = counting(20)
    first = ask(processor, ("video", data), num_frames=5)
    before = work.all
    assert before[1] == 1
    second = ask(processor, ("video", data), turns=3, num_frames=5)
    assert work.all == before
    same(first, second)
    same(second, ask(Processor.from_folder(folder, config()), ("video", data), num_frames=5))


def test_a_video_array_is_resized_once(processor: Processor, work: Work) -> None:
    frames = np.stack([numbered(n) for n in range(6)])
    first = ask(processor, ("video", frames))
    before = work.all
    same(first, ask(processor, ("video", frames.copy()), turns=2))
    assert work.all == before
    frames[3] = 255 - frames[3]
    other = ask(processor, ("video", frames))
    assert other.media[0].key != first.media[0].key and work.all != before


def test_other_options_are_another_entry(processor: Processor) -> None:
    data, clip = png(100, 300), counting(20)
    tiled, single = (ask(processor, ("image", data), tiling=t) for t in ("always", "never"))
    assert len(tiled.media[0].tiles) > 1 and len(single.media[0].tiles) == 1
    pair = ask(processor, ("image", data), ("image", data))
    same(Inputs(pair.input_ids, pair.media[:1], ""), single)
    numbers = [
        ask(processor, ("video", clip), **options).media[0].video.indices  # type: ignore[union-attr]
        for options in ({"num_frames": 2}, {"num_frames": 4}, {"num_frames": 4, "ends": True}, {})
    ]
    assert numbers == [(0, 10), (0, 5, 10, 15), (0, 6, 12, 19), tuple(range(20))]


def test_a_file_replaced_under_its_name_is_another(processor: Processor, tmp_path: Path) -> None:
    """Even with the same size and time."""
    path = tmp_path / "image.bmp"
    for kind, suffix in (("image", "bmp"), ("video", "mp4")):
        path = tmp_path / f"medium.{suffix}"
        keys = []
        for seed in (1, 2):
            if kind == "image":
                Image.fromarray(noise(40, 60, 3, seed=seed)).save(path)
            else:
                path.write_bytes(encode_video([noise(32, 32, 3, seed=seed)] * 2))
            os.utime(path, (1, 1))
            keys.append(ask(processor, (kind, path)).media[0].key)
        assert keys[0] != keys[1]


def test_a_video_written_to_while_it_is_decoded_is_not_kept(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_onevision.media import video

    path = tmp_path / "clip.mp4"
    path.write_bytes(counting(3))
    original = video._from_file

    def meddling(*args: Any) -> Any:
        made = original(*args)
        os.utime(path, (1, 1))
        return made

    monkeypatch.setattr(video, "_from_file", meddling)
    ask(processor, ("video", path))
    assert processor.cache.nbytes == 0


def test_what_was_evicted_is_prepared_again(folder: Path, work: Work) -> None:
    data = [png(56, 56, seed=seed) for seed in range(3)]
    processor = Processor.from_folder(folder, config())
    one = ask(processor, ("image", data[0]), tiling="never").media[0].tiles.nbytes
    processor.cache.capacity = 2 * one
    first = [ask(processor, ("image", item), tiling="never") for item in data]
    assert processor.cache.nbytes == 2 * one and work.loaded == 3
    for item, made in zip(data, first, strict=True):
        same(made, ask(processor, ("image", item), tiling="never"))
    assert work.loaded == 6 and processor.cache.nbytes == 2 * one


def test_without_a_cache_it_works_the_same(folder: Path, work: Work) -> None:
    processor = Processor.from_folder(folder, config())
    processor.cache.capacity = 0
    data = png(56, 80)
    same(ask(processor, ("image", data)), ask(processor, ("image", data)))
    assert work.loaded == 2


def test_a_large_file_is_not_kept(
    processor: Processor, tmp_path: Path, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_READ", 100)
    path = tmp_path / "image.png"
    path.write_bytes(png(30, 40))
    same(ask(processor, ("image", path)), ask(processor, ("image", path)))
    assert work.loaded == 2


def test_errors_and_notes_come_every_time(processor: Processor) -> None:
    for _ in range(2):
        with pytest.raises(MediaError, match="not an image of the kinds that are read"):
            ask(processor, ("image", b"no image at all"))
        assert len(ask(processor, ("video", counting(3)), num_frames=5).notes) == 1


def test_a_known_video_that_no_longer_fits_is_refused(folder: Path) -> None:
    import dataclasses

    whole = Processor.from_folder(folder, config())
    text_config = dataclasses.replace(whole.config.text_config, max_position_embeddings=100)
    settings = dataclasses.replace(whole.config, text_config=text_config)
    processor = Processor(settings, whole.image_config, whole.tokenizer, whole.template)
    clip = ("video", counting(20))
    ask(processor, clip, num_frames=12)
    with pytest.raises(ContextOverflowError, match="12 frames of a video take"):
        ask(processor, clip, turns=14, num_frames=12)


def test_the_first_image_that_fails_is_named(processor: Processor) -> None:
    """Though images are read side by side."""
    slow, broken = png(600, 800), b"neither"
    with pytest.raises(MediaError, match=r"'missing-1\.png'"):
        ask(
            processor,
            *[("image", item) for item in (slow, "missing-1.png", broken, "missing-2.png")],
        )
