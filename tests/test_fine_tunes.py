"""Checkpoints as the original repository's training scripts save them: they answer as its code
defines it, and do so after they have been converted.

tests/reference/record_packing.py says what the recorded arrays are, and states the rules.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import edit
from checkpoints import Sizes, arrays, dump, layout_name, write, write_weights
from videos import counting, number_of

from mlx_onevision import load
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.convert.conversion import convert
from mlx_onevision.errors import MediaError, RequestError
from mlx_onevision.media.tiles import pad_to_square_tile, tile_image
from mlx_onevision.media.video import VideoConfig
from mlx_onevision.network.memory_sizes import Budget
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.chat_template import ChatTemplate
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor
from mlx_onevision.prompt.tokenizer import Tokenizer

with np.load(Path(__file__).parent / "reference" / "packing.npz") as file:
    RECORDED = dict(file)
NAMES = [key.removesuffix("/packed") for key in RECORDED if key.endswith("/packed")]

SIZES = Sizes(image_size=70, hidden=8, heads=2, kv_heads=1, intermediate=16, vision_hidden=8)
PICTURE = np.random.default_rng(5).integers(0, 256, (60, 150, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fine-tune"), "lmms-lab", SIZES)


def processor(folder: Path, **settings: Any) -> Processor:
    """Of a model that was saved with these settings."""
    values = json.loads((folder / "config.json").read_text())
    config = OneVisionConfig.from_dict(values | settings)
    images = ImageConfig.from_dict(None, config)
    videos = VideoConfig.from_folder(folder, {}, images, config)
    tokenizer, template = Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder)
    return Processor(config, images, tokenizer, template, videos)


def prepare(made: Processor, *media: tuple[str, Any], **options: Any) -> Inputs:
    content = [{"type": kind, kind: source} for kind, source in media]
    content.append({"type": "text", "text": "Where?"})
    conversation = normalise_messages(messages=[{"role": "user", "content": content}])
    return made.prepare(conversation, **options)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_placed_as_the_original_code_places_them(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = processor(folder, **json.loads(str(RECORDED[f"{name}/settings"])))
    kind, size = name.partition(" ")[0], RECORDED[f"{name}/size"].tolist()
    shape = (*size, 3) if kind == "image" else (*size, 20, 30, 3)
    inputs = prepare(made, (kind, np.zeros(shape, np.uint8)))
    network = OneVision(made.config)
    network.budget = Budget(tile_group=100, tower_interval=1, chunk=100, interval=1)
    if made.config.has_newline:
        network.image_newline = mx.array(RECORDED["newline"])

    def features(tiles: mx.array) -> mx.array:
        values = np.random.default_rng(len(tiles)).normal(size=(len(tiles), 25, 8))
        return mx.array(values.astype(np.float32))

    monkeypatch.setattr(network, "_encode_tiles", features)
    (packed,) = network.encode_media(inputs.media)
    expected = RECORDED[f"{name}/packed"]
    assert packed.shape == expected.shape
    averaged = "spatial_unpad anyres_max" in name or (kind == "video" and " max " not in name)
    # Else every value is a copy.
    np.testing.assert_allclose(np.array(packed), expected, atol=2e-6 if averaged else 0, rtol=0)
    placeholders = {"image": made.config.image_token_index, "video": made.config.video_token_index}
    assert (inputs.input_ids == placeholders[kind]).sum() == len(expected)


def test_an_image_alone_is_squeezed_or_padded_and_several_are_padded(folder: Path) -> None:
    squeezed = processor(folder, image_aspect_ratio="square")
    padded = processor(folder, image_aspect_ratio="pad")
    whole = tile_image(PICTURE, processor(folder).image_config)[:1]
    square = pad_to_square_tile(PICTURE, padded.image_config)
    for made, expected in ((squeezed, whole), (padded, square)):
        (alone,) = prepare(made, ("image", PICTURE)).media
        np.testing.assert_array_equal(alone.tiles, expected)
        for medium in prepare(made, ("image", PICTURE), ("image", PICTURE)).media:
            np.testing.assert_array_equal(medium.tiles, square)
        with pytest.raises(RequestError, match=r"one tile \(image_aspect_ratio '(square|pad)'\)"):
            prepare(made, ("image", PICTURE), tiling="always")


def test_a_share_of_flat_tiles_is_of_each(folder: Path) -> None:
    made = processor(folder, mm_patch_merge_type="flat")
    (medium,) = prepare(made, ("image", PICTURE), visual_tokens=0.36).media
    assert medium.tokens == 25 + (len(medium.tiles) - 1) * 9
    (packed,) = OneVision(made.config).encode_media([medium])
    assert packed.shape == (medium.tokens, 8)


def test_the_times_of_frames_follow_the_video(folder: Path) -> None:
    made = processor(folder, add_time_instruction=True, force_sample=True)
    inputs = prepare(made, ("video", counting(51)), num_frames=3)
    assert inputs.prompt.endswith(
        "<|im_start|>user\n<video>\nThe video lasts for 2.04 seconds, and 3 frames are uniformly "
        "sampled from it. These frames are located at 0.00s,1.00s,2.00s.Please answer the "
        "following questions related to this video.\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    (medium,) = inputs.media
    assert [number_of(tile) for tile in medium.tiles] == [0, 25, 50]  # from end to end
    tail = made.tokenizer.encode(inputs.prompt.partition("<video>")[2].partition("<|im_end|>")[0])
    end = int(np.flatnonzero(inputs.input_ids == made.config.video_token_index)[-1]) + 1
    assert inputs.input_ids[end : end + len(tail)].tolist() == tail
    two = prepare(made, ("video", counting(9)), ("video", np.zeros((2, 9, 9, 3), np.uint8)))
    assert two.prompt.count("The video lasts for 0.36 seconds, and 32 frames are") == 1
    assert two.prompt.count("The video lasts") == 1  # an array has no clock
    assert len(prepare(made, ("video", counting(51)), fps=1.0).media[0].tiles) == 2


def test_videos_and_their_times_stay_within_the_context(folder: Path) -> None:
    made = processor(folder, add_time_instruction=True, max_position_embeddings=700)
    inputs = prepare(made, ("video", counting(60)))
    assert 300 < len(inputs.input_ids) <= 700
    assert inputs.notes and 1 <= len(inputs.media[0].tiles) < 32


def test_videos_need_a_newline_where_the_settings_place_one(folder: Path) -> None:
    made = processor(folder, mm_patch_merge_type="spatial", mm_newline_position="grid")
    assert len(prepare(made, ("image", PICTURE)).media) == 1
    with pytest.raises(MediaError, match="takes no videos: its mm_newline_position is 'grid'"):
        prepare(made, ("video", np.zeros((2, 9, 9, 3), np.uint8)))


def saved(
    folder: Path,
    rows: int = 384,
    tokens: tuple[str, ...] = (),
    newline: bool = True,
    **settings: Any,
) -> Path:
    """A checkpoint with so many rows of embeddings, and a tokenizer with further tokens."""
    sizes = Sizes(image_size=28, vocab=rows)
    write(folder, "lmms-lab", sizes)
    weights = {
        layout_name(name, "lmms-lab"): value
        for name, value in arrays(sizes).items()
        if newline or name != "image_newline"
    }
    write_weights(folder, weights)
    edit(folder, **{"image_token_index": None, "video_token_index": None, **settings})
    text = (folder / "tokenizer.json").read_text()
    for placeholder in ("image", "video"):  # as the original tokenizers, it knows neither
        text = text.replace(f"<{placeholder}>", f"<unused {placeholder}>")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    more = [{"id": 320 + n, "content": token} for n, token in enumerate(tokens)]
    tokenizer = json.loads(text)
    tokenizer["added_tokens"] += [token | flags | {"special": True} for token in more]
    dump(folder / "tokenizer.json", tokenizer)
    return folder


ANSWERED: dict[str, dict[str, Any]] = {
    "LLaVA-Video": {
        "mm_newline_position": "grid",
        "add_time_instruction": True,
        "force_sample": True,
    },
    "average": {"mm_newline_position": "frame", "mm_spatial_pool_mode": "average"},
    "max": {"mm_newline_position": "no_token", "mm_spatial_pool_mode": "max"},
    "anyres": {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56], [56, 28]]},
    "spatial": {"mm_patch_merge_type": "spatial", "mm_newline_position": "one_token"},
    "flat": {"mm_patch_merge_type": "flat", "mm_newline_position": "grid"},
    "pad": {"image_aspect_ratio": "pad", "image_grid_pinpoints": None},
    "square": {
        "image_aspect_ratio": "square",
        "mm_patch_merge_type": "flat",
        "newline": False,
        "mm_vision_tower": "/mnt/models/siglip",
    },
    "rows of the tokenizer": {"rows": 321, "tokens": ("<im_patch>",)},
    "fewer rows than tokens": {"rows": 320, "tokens": ("<im_patch>", "<loc>")},
}


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_converted_answers_alike(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path / "source", **ANSWERED[name])
    target = convert(source, tmp_path / "made").target
    written = json.loads((target / "config.json").read_text())
    assert written["model_type"] == "mlx_onevision"
    assert "Other programs do not load it" in (target / "README.md").read_text()
    found = []
    for made in (source, target):
        with closing(load(made)) as model:
            options: dict[str, Any] = {"max_tokens": 6, "repetition_penalty": 1.1}
            image = model.generate("Where?", images=[PICTURE], **options)
            video = model.generate("Where?", videos=[counting(9)], num_frames=3, **options)
            found.append((image.tokens, image.usage, video.tokens, video.usage))
    for one, other in zip(*found, strict=True):
        assert getattr(one, "prompt_tokens", one) == getattr(other, "prompt_tokens", other)


def test_a_token_without_an_embedding_is_refused_where_it_is_used(tmp_path: Path) -> None:
    folder = saved(tmp_path / "source", rows=320, tokens=("<loc>",))
    template = "{% for message in messages %}{{ '<image><loc>Where?' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    refusal = pytest.raises(RequestError, match=r"'<loc>' with the id 320, but")
    with closing(load(folder)) as model, refusal:
        model.generate("Where?", images=[PICTURE], max_tokens=2)


def test_a_draft_without_newlines_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    draft = saved(tmp_path / "draft", mm_patch_merge_type="flat")
    with pytest.raises(RequestError, match="or has no newlines where that has"):
        load(model, draft_model=draft).close()


def test_a_published_checkpoint_is_converted_for_other_programs(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", image_token_index=382, video_token_index=383)
    written = json.loads((convert(source, tmp_path / "made").target / "config.json").read_text())
    assert written["model_type"] == "llava_onevision"
    assert "mm_newline_position" not in written
