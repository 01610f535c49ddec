"""Videos in a conversation: placeholders, settings, and a context that holds only so much."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompts import TILE, checkpoint, config
from videos import counting, number_of, numbered

from mlx_onevision.errors import ConfigError, ContextOverflowError, RequestError
from mlx_onevision.media.resize import resize
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Medium, Processor

SIDE = 2  # tokens along a side of a pooled frame: the tiles have four


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(checkpoint(tmp_path_factory.mktemp("checkpoint")), config())


def prepare(
    processor: Processor, messages: Any, *, images: Any = None, videos: Any = None, **options: Any
) -> Inputs:
    conversation = normalise_messages(messages=messages, images=images, videos=videos)
    return processor.prepare(conversation, **options)


def small(processor: Processor, limit: int) -> Processor:
    """The same with a context of ``limit`` tokens."""
    text = dataclasses.replace(processor.config.text_config, max_position_embeddings=limit)
    settings = dataclasses.replace(processor.config, text_config=text)
    return Processor(settings, processor.image_config, processor.tokenizer, processor.template)


def frames(count: int) -> np.ndarray:
    return np.stack([numbered(n) for n in range(count)])


def asking(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "Q"}]}]


def video(source: Any, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **options}


def numbers(medium: Medium) -> list[int]:
    return [number_of(tile) for tile in medium.tiles]


def test_a_video_is_its_pooled_frames_and_one_newline(processor: Processor) -> None:
    inputs = prepare(processor, asking(video(frames(5))))
    (medium,) = inputs.media
    assert medium.kind == "video" and medium.tokens == 5 * SIDE**2 + 1
    assert (inputs.input_ids == processor.config.video_token_index).sum() == medium.tokens
    expected = np.stack([resize(frame, (TILE, TILE)) for frame in frames(5)])
    np.testing.assert_array_equal(medium.tiles, expected)
    assert inputs.prompt == processor.render(
        normalise_messages(messages=asking({"type": "video"}), unfilled=True)
    )
    assert medium.pixel_values.shape == (5, 3, TILE, TILE)
    assert inputs.notes == ()


def test_videos_of_different_lengths_and_images_stand_in_their_order(processor: Processor) -> None:
    picture = np.zeros((30, 40, 3), np.uint8)
    messages = asking(video(frames(3)), {"type": "image", "image": picture}, video(counting(50)))
    messages += [{"role": "assistant", "content": "A"}, *asking(video(frames(1)))]
    inputs = prepare(processor, messages)
    assert [medium.kind for medium in inputs.media] == ["image", "video", "video", "video"]
    assert inputs.media[0].packing is not None  # alone among images, so tiled as ever
    assert [len(medium.tiles) for medium in inputs.media[1:]] == [3, 32, 1]
    held = processor.config.video_token_index
    assert (inputs.input_ids == held).sum() == sum(n * SIDE**2 + 1 for n in (3, 32, 1))


def test_videos_beside_the_messages(processor: Processor) -> None:
    messages = [{"role": "user", "content": "Q"}]
    beside = prepare(
        processor, messages, videos=[frames(2)], images=[np.zeros((9, 9, 3), np.uint8)]
    )
    assert [medium.kind for medium in beside.media] == ["image", "video"]
    waiting = asking({"type": "video", "num_frames": 2})
    (medium,) = prepare(processor, waiting, videos=[counting(10)]).media
    assert numbers(medium) == [0, 5]


def test_options_of_a_block_win_over_those_of_the_call(processor: Processor) -> None:
    data = counting(50)
    messages = asking(
        video(data), video(data, fps=5), video(data, num_frames=2, start=1), video(data, end=0.2)
    )
    media = prepare(processor, messages, num_frames=4).media
    assert list(map(numbers, media)) == [
        [0, 12, 25, 37],
        list(range(0, 50, 5)),
        [25, 37],
        [0, 1, 2, 3],
    ]
    assert media[0].video is not None and media[0].video.times == (0.0, 0.48, 1.0, 1.48)


@pytest.mark.parametrize(
    ("block", "part"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"fps": 1, "num_frames": 1}, "not both"),
        ({"frames": 3}, "'frames'"),
        ({"path": "a.mp4"}, "two sources"),
    ],
)
def test_a_block_that_cannot_be_is_refused(
    processor: Processor, block: dict[str, Any], part: str
) -> None:
    with pytest.raises(RequestError, match=part):
        prepare(processor, asking(video("b.mp4", **block)))


def test_keys_are_equal_for_equal_rows_only(processor: Processor) -> None:
    data = counting(20)

    def key(source: Any, **options: Any) -> str:
        return prepare(processor, asking(video(source)), **options).media[0].key

    assert key(data, num_frames=4) == key(data, num_frames=4)
    still = np.repeat(numbered(0)[None], 8, axis=0)
    found = [key(data, num_frames=4), key(data, num_frames=5), key(still[:1]), key(still[:2])]
    found.append(prepare(processor, asking({"type": "image", "image": numbered(0)})).media[0].key)
    assert len(set(found)) == len(found)


# The context.


def test_fewer_frames_where_the_usual_number_does_not_fit(
    processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = small(processor, 120)
    with caplog.at_level(logging.WARNING, "mlx_onevision"):
        inputs = prepare(narrow, asking(video(counting(50))), answer=20)
    (medium,) = inputs.media
    length = len(inputs.input_ids)
    assert 120 - 20 - 1 - SIDE**2 < length <= 120 - 20 - 1
    assert medium.video is not None and len(medium.tiles) == len(medium.video.indices) < 32
    (note,) = inputs.notes
    assert f"{len(medium.tiles)} frames" in note and "instead of 32" in note and "120" in note
    assert note in caplog.text


def test_what_is_left_is_shared(processor: Processor) -> None:
    blocks = [video(counting(50)), video(counting(3)), video(counting(50))]
    inputs = prepare(small(processor, 160), asking(*blocks), answer=20)
    first, short, last = (len(medium.tiles) for medium in inputs.media)
    assert short == 3 and first >= 8 and last >= first  # what the short one leaves is used
    assert len(inputs.input_ids) <= 160 - 20 - 1


def test_a_number_that_does_not_fit_is_refused_with_both_numbers(processor: Processor) -> None:
    narrow = small(processor, 120)
    for source, options in [
        (counting(50), {"num_frames": 40}),
        (counting(50), {"fps": 25, "end": 1.6}),
        (frames(40), {}),
    ]:
        with pytest.raises(ContextOverflowError) as error:
            prepare(narrow, asking(video(source)), **options)
        for part in ("40 frames", str(40 * SIDE**2 + 1), "120", "at most"):
            assert part in str(error.value), error.value
    most = int(str(error.value).split("at most ")[1].split()[0])
    inputs = prepare(narrow, asking(video(frames(40))), num_frames=most)
    assert 120 - SIDE**2 <= len(inputs.input_ids) < 120


def test_no_room_for_a_frame_is_refused(processor: Processor) -> None:
    with pytest.raises(ContextOverflowError, match="one frame of a video takes 5 tokens"):
        prepare(small(processor, 20), asking(video(counting(50))))


# Settings.


def write(folder: Path, name: str, **values: Any) -> Path:
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}))
    return folder


def settings(**more: Any) -> dict[str, Any]:
    pixels = {"size": {"height": TILE, "width": TILE}, "image_mean": [0.1] * 3}
    return {**pixels, "image_std": [0.2] * 3, **more}


def test_a_video_may_have_a_mean_of_its_own(tmp_path: Path) -> None:
    """In the reference's order: processor_config.json, a file of its own, the image's file."""

    def mean() -> float:
        processor = Processor.from_folder(tmp_path, config())
        media = prepare(
            processor, asking(video(frames(1)), {"type": "image", "image": numbered(1)})
        ).media
        assert media[0].config.image_mean[0] == 0.5
        return media[1].config.image_mean[0]

    checkpoint(tmp_path)
    assert mean() == 0.5
    write(tmp_path, "video_preprocessor_config.json", **settings())
    assert mean() == 0.1
    write(tmp_path, "processor_config.json", video_processor=settings(image_mean=[0.3] * 3))
    assert mean() == 0.3


def test_a_checkpoint_may_say_how_many_frames(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    name = "video_preprocessor_config.json"
    write(tmp_path, name, **settings(do_sample_frames=True, num_frames=5))
    processor = Processor.from_folder(tmp_path, config())
    assert numbers(prepare(processor, asking(video(counting(20)))).media[0]) == [0, 4, 8, 12, 16]
    assert len(prepare(processor, asking(video(counting(20), fps=5))).media[0].tiles) == 4
    write(tmp_path, name, do_sample_frames=False)
    processor = Processor.from_folder(tmp_path, config())
    assert len(prepare(processor, asking(video(counting(20)))).media[0].tiles) == 20


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"size": {"shortest_edge": TILE}}, "height"),
        ({"size": {"height": 28, "width": 28}}, "28"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"resample": 2}, "resample"),
        ({"image_std": [0, 1, 1]}, "image_std"),
        ({"do_sample_frames": True, "num_frames": -3}, "num_frames"),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(
    values: dict[str, Any], part: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path)
    write(tmp_path, "video_preprocessor_config.json", **settings(**values))
    with pytest.raises(ConfigError, match=part) as error:
        Processor.from_folder(tmp_path, config())
    assert "video_preprocessor_config.json" in str(error.value)
