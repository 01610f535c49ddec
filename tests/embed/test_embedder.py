"""Vectors: what they are made of, and that others in their batch do not change them."""

import io
import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write
from images import noise, smooth
from PIL import Image
from videos import counting, encode_video, numbered, written

from mlx_onevision.api import Model, load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.embed.embedder import GROUP, item_blocks
from mlx_onevision.errors import ContextOverflowError, RequestError
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.video import load_video
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.packing import normalize
from mlx_onevision.prompt.processor import Medium


@pytest.fixture(scope="module")
def network(folder: Path) -> OneVision:
    return load_checkpoint(folder).model


def picture(seed: int, height: int = 60, width: int = 90) -> np.ndarray:
    return noise(height, width, 3, seed=seed)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def asked(model: Model, network: OneVision, *content: Any) -> np.ndarray:
    """The last hidden state of a prompt, by the network's own stages; float32 (hidden_size,)."""
    inputs = model.prepare([{"role": "user", "content": content}])
    rows = []
    media = list(inputs.media)
    position = 0
    ids = inputs.input_ids.tolist()
    while position < len(ids):
        if ids[position] == model.config.image_token_index:
            medium = media.pop(0)
            rows += network.encode_media([medium])
            position += medium.tokens
        else:
            rows.append(network.language_model.embed_tokens(mx.array([ids[position]])))
            position += 1
    return np.array(network.language_model(mx.concatenate(rows)[None])[0, -1])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector * vector).sum())


def test_vision_is_the_mean_of_the_base_views_tower_features(
    model: Model, network: OneVision
) -> None:
    pictures = [picture(0), picture(1, 200, 31)]
    embeddings = model.embed(pictures)
    assert embeddings.vectors.dtype == np.float32
    for image, vector in zip(pictures, embeddings.vectors, strict=True):
        medium = model.prepare([{"role": "user", "content": [{"type": "image", "image": image}]}])
        base = medium.media[0].tiles[:1]
        pixels = normalize(base, medium.media[0].normalization)
        features = np.array(network.vision_features(pixels))[0]
        np.testing.assert_allclose(vector, unit(features.mean(axis=0)), atol=1e-6)
    raw = model.embed(pictures, normalize=False)
    assert np.linalg.norm(raw.vectors, axis=1).min() > 2
    np.testing.assert_allclose(unit(raw.vectors[0]), embeddings.vectors[0], atol=1e-6)


def test_a_videos_vector_is_the_mean_of_its_frames(model: Model) -> None:
    frames = np.stack([smooth(28, 28), smooth(28, 28)[::-1], picture(3, 28, 28)])
    config = model._processor.image_config
    video = Medium("video", frames, None, None, 13, config)
    solo = model.embed(list(frames), normalize=False)
    together = model.embed([video], normalize=False)
    np.testing.assert_allclose(together.vectors[0], solo.vectors.mean(axis=0), atol=1e-6)
    assert together.names == ("item 1",)
    padded = Medium("image", frames[:1], (28, 28), None, 5, config)
    with pytest.raises(RequestError, match=r"item 2: .*padded"):
        model.embed([video, padded])


def test_a_video_is_the_frames_that_are_chosen_of_it(model: Model, tmp_path: Path) -> None:
    path = written(tmp_path / "film.mp4", counting(50))  # two seconds
    frames = load_video(path, 28, FrameOptions(num_frames=5)).tiles
    given = model.embed([path, frames, path.read_bytes()], num_frames=5)
    np.testing.assert_array_equal(given.vectors[0], given.vectors[1])
    np.testing.assert_array_equal(given.vectors[0], given.vectors[2])
    solo = model.embed(list(frames), num_frames=5, normalize=False)
    np.testing.assert_allclose(given.vectors[0], unit(solo.vectors.mean(axis=0)), atol=1e-6)
    # A part of it is another thing, seen in the same way.
    part: dict[str, Any] = {"type": "video", "path": str(path), "start": 1.0}
    late = model.embed([path, part], num_frames=5)
    np.testing.assert_allclose(late.vectors[0], given.vectors[0], atol=1e-6)
    assert np.abs(late.vectors[0] - late.vectors[1]).max() > 1e-3
    whole = model.embed([path], num_frames=5, start=1.0)
    np.testing.assert_allclose(whole.vectors[0], late.vectors[1], atol=1e-6)
    assert late.similarity(given).shape == (2, 3)
    joint = model.embed([path, part, text("a circle")], "joint", num_frames=5)
    asked_of = text("Summary above video in one word:")
    tiles = model.embed([{"type": "video", "video": frames}], "joint", num_frames=5)
    np.testing.assert_allclose(joint.vectors[0], tiles.vectors[0], atol=2e-6)
    block = {"type": "video", "video": frames}
    inputs = model.prepare([{"role": "user", "content": [block, asked_of]}])
    expected = model._engine.embed_prompts([inputs]).result()[0]
    np.testing.assert_allclose(joint.vectors[0], unit(expected), atol=2e-6)


@pytest.mark.parametrize("space", ["vision", "joint"])
def test_videos_that_were_looked_at_differently_do_not_mix(model: Model, space: str) -> None:
    frames = np.stack([numbered(n) for n in range(40)])
    usual = model.embed([encode_video(frames)], space)
    assert "32 frames a video" in usual.method
    same = model.embed([encode_video(frames)], space, num_frames=32)
    np.testing.assert_array_equal(usual.vectors, same.vectors)
    assert usual.similarity(same)[0, 0] == pytest.approx(1, abs=1e-6)
    ways: list[dict[str, Any]] = [{"num_frames": 8}, {"fps": 2}]
    for options in ways:
        other = model.embed([encode_video(frames)], space, **options)
        with pytest.raises(RequestError, match=r"method .* (8 frames a video|2 frames a second)"):
            usual.similarity(other)
    with pytest.raises(RequestError, match=r"item 1: .*give num_frames to embed"):
        model.embed([{"type": "video", "video": frames, "num_frames": 3}], space)
    with pytest.raises(RequestError, match="not both"):
        model.embed([frames], space, num_frames=3, fps=1)


def test_more_frames_than_a_prompt_could_hold(model: Model) -> None:
    """The vision space has no prompt; the joint one says so."""
    frames = np.zeros((200, 28, 28, 3), np.uint8)
    limit = model.config.text_config.max_position_embeddings
    number = limit + 1
    long = np.broadcast_to(frames[:1], (number, 28, 28, 3))
    with pytest.raises(ContextOverflowError, match=f"item 1: .*{limit}"):
        model.embed([long], "joint")
    assert len(model.embed([frames])) == 1


def test_a_file_is_what_it_begins_as(tmp_path: Path) -> None:
    picture_file, video_file = tmp_path / "clip.dat", tmp_path / "photo.jpg"
    Image.fromarray(picture(0)).save(picture_file, "PNG")
    for kind in ("mp4", "mov", "mkv", "webm", "avi"):
        video_file.write_bytes(counting(2, kind))
        assert item_blocks(video_file)[0]["type"] == "video", kind
        assert item_blocks(video_file.read_bytes())[0]["type"] == "video", kind
    assert item_blocks(str(picture_file))[0]["type"] == "image"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0"
    for data in (heic, b"\0\0\0\x1cftypavif", b"RIFF\0\0\0\0WEBP", b"GIF89a", b""):
        assert item_blocks(data)[0]["type"] == "image"
    assert item_blocks("https://example.com/a.MP4?size=2")[0]["type"] == "video"
    assert item_blocks("https://example.com/a.png#.mp4")[0]["type"] == "image"
    assert item_blocks("no/such/film.mkv")[0]["type"] == "video"
    assert item_blocks("data:video/mp4;base64,AAAA")[0]["type"] == "video"
    assert item_blocks(np.zeros((2, 3, 3, 3), np.uint8))[0]["type"] == "video"
    assert item_blocks(np.zeros((3, 3, 3), np.uint8))[0]["type"] == "image"
    os.mkfifo(tmp_path / "pipe.mp4")
    assert item_blocks(tmp_path / "pipe.mp4")[0]["type"] == "video"  # and it does not wait


def test_joint_is_the_last_hidden_state_under_the_prompt(model: Model, network: OneVision) -> None:
    one, other = picture(0), picture(1, 31, 200)
    images = [{"type": "image", "image": image} for image in (one, other)]
    embeddings = model.embed([one, text("a red circle"), [one, other]], "joint")
    expected = [
        asked(model, network, images[0], text("Summary above image in one word:")),
        asked(model, network, text("a red circle\nSummary above sentence in one word:")),
        asked(model, network, *images, text("Summary above image in one word:")),
    ]
    for vector, state in zip(embeddings.vectors, expected, strict=True):
        np.testing.assert_allclose(vector, unit(state), atol=2e-6)
    assert embeddings.names == ("item 1", "a red circle", "item 3")


def test_tiling_is_the_joint_spaces_own(model: Model) -> None:
    whole = model.embed([picture(0)], "joint")
    single = model.embed([picture(0)], "joint", tiling="never")
    assert np.abs(whole.vectors - single.vectors).max() > 1e-3
    with pytest.raises(RequestError, match="method"):
        whole.similarity(single)


def test_each_medium_is_normalised_by_its_own_settings(tmp_path: Path) -> None:
    """Images and videos that are encoded together, where these have another mean and deviation."""
    folder = write(tmp_path / "own", tied=False)
    config = folder / "video_preprocessor_config.json"
    values = json.loads(config.read_text())
    settings = {"image_mean": [0.1, 0.3, 0.7], "image_std": [0.2, 0.9, 0.4]}
    config.write_text(json.dumps({**values, **settings}))
    model = load(folder)
    image, video = picture(0), np.stack([numbered(n) for n in range(4)])
    solo = model.embed([video]), model.embed([image])
    together = model.embed([image, video, image, video])
    back = model.embed([video, image])
    model.close()
    for mixed, alone in ((1, 0), (3, 0), (0, 1), (2, 1)):
        np.testing.assert_allclose(together.vectors[mixed], solo[alone].vectors[0], atol=2e-6)
    np.testing.assert_allclose(back.vectors, [one.vectors[0] for one in solo], atol=2e-6)


@pytest.mark.parametrize("space", ["vision", "joint"])
def test_a_batch_is_its_rows(model: Model, space: str) -> None:
    items: list[Any] = [picture(n, 40 + 9 * n, 60) for n in range(2 * GROUP + 3)]
    if space == "joint":
        items[3] = text("short")
        items[4] = text("a much longer sentence about a red circle " * 8)
        items[5] = [items[5], items[6]]
    together = model.embed(items, space)
    for item, vector in zip(items, together.vectors, strict=True):
        np.testing.assert_allclose(model.embed([item], space).vectors[0], vector, atol=2e-6)


def test_a_prompt_longer_than_a_chunk_is_read_in_steps(model: Model) -> None:
    item = text("a red circle and a blue star " * 20)
    expected = model.embed([item], "joint").vectors

    def shorten(chunk: int) -> int:
        def change(runner: Any) -> int:
            budget = runner.model.budget
            runner.model.budget = type(budget)(**{**vars(budget), "chunk": chunk})
            return budget.chunk

        return model._engine._worker.call(change)

    before = shorten(100)
    try:
        items = [text("short"), item, text("short")]
        stepwise = model.embed(items, "joint").vectors
    finally:
        shorten(before)
    np.testing.assert_allclose(stepwise[1:2], expected, atol=2e-6)
    np.testing.assert_array_equal(stepwise[0], stepwise[2])


def test_the_container_does_not_matter(model: Model, tmp_path: Path) -> None:
    image = smooth(70, 50)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "TIFF")
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True)
    items = [tmp_path / "a.png", str(tmp_path / "a.webp"), buffer.getvalue(), image]
    embeddings = model.embed([*items, {"type": "image", "path": str(tmp_path / "a.png")}])
    for vector in embeddings.vectors[1:]:
        np.testing.assert_array_equal(vector, embeddings.vectors[0])
    assert embeddings.names[:2] == (str(tmp_path / "a.png"), str(tmp_path / "a.webp"))
    assert embeddings.names[2:4] == ("item 3", "item 4")


def test_half_precision_is_close_and_sums_in_float32(folder: Path, model: Model) -> None:
    half = load(folder, dtype="bfloat16")
    for space in ("vision", "joint"):
        one, other = model.embed([picture(0)], space), half.embed([picture(0)], space)
        assert other.vectors.dtype == np.float32
        assert np.linalg.norm(other.vectors) == pytest.approx(1, abs=1e-6)
        assert one.similarity(other)[0, 0] > 0.999
    half.close()


@pytest.mark.parametrize("one", ["a.png", {"type": "text"}, Image.new("RGB", (9, 9)), 3, None])
def test_one_item_is_no_list_of_items(model: Model, one: Any) -> None:
    with pytest.raises(RequestError, match=f"items is one {type(one).__name__}; give a list of"):
        model.embed(one)


def test_a_check_that_times_out_ends_the_call(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes back what it waits for."""
    waiting: Future[Any] = Future()
    monkeypatch.setattr(model._engine, "embed_tiles", lambda *_: waiting)
    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) > 50:
            raise KeyboardInterrupt  # what else would end a loop that swallows a TimeoutError
        if len(calls) > 3:
            raise TimeoutError("the deadline")

    with pytest.raises(TimeoutError, match="the deadline"):
        model.embed([picture(0)], check=check)
    assert waiting.cancelled()
