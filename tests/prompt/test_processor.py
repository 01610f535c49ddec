"""Conversations to ids and pixels, against what transformers made of the same ones."""

import dataclasses
import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prompts import TILE, cases, checkpoint, config, tricky

from mlx_onevision.config.networks import TextConfig
from mlx_onevision.errors import ConfigError, MediaError, RequestError
from mlx_onevision.media.anyres import Packing
from mlx_onevision.media.tiles import pad_to_square_tile, tile_image
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return Processor.from_folder(checkpoint(tmp_path_factory.mktemp("checkpoint")), config())


def prepare(
    processor: Processor, messages: Any, *, images: Any = None, videos: Any = None, **options: Any
) -> Inputs:
    conversation = normalise_messages(messages=messages, images=images, videos=videos)
    return processor.prepare(conversation, **options)


def render(processor: Processor, messages: Any, order: Any = "template") -> str:
    return processor.render(normalise_messages(messages=messages, unfilled=True), order)


def black(height: int, width: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (width, height))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def with_pixels(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recorded messages, whose images are sizes, with black pictures."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": black(*block["size"])}
                if block["type"] == "image"
                else block
                for block in message["content"]
            ],
        }
        for message in messages
    ]


def ask(*blocks: Any) -> list[dict[str, Any]]:
    """One user turn: text, and pictures as whatever a block may hold."""
    content = [
        {"type": "text", "text": block}
        if isinstance(block, str)
        else {"type": "image", "image": block}
        for block in blocks
    ]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("template", ["space", "newline"])
def test_ids_and_prompts_equal_the_reference(template: str, tmp_path: Path) -> None:
    processor = Processor.from_folder(checkpoint(tmp_path, template), config())
    for case in cases(template):
        messages = with_pixels(case["messages"])
        inputs = prepare(processor, messages)
        assert inputs.input_ids.tolist() == case["ids"], case["messages"]
        assert inputs.input_ids.dtype == np.int32
        assert inputs.prompt == render(processor, messages) == case["prompt"]


def test_one_image_is_tiled_and_several_are_not(processor: Processor) -> None:
    picture = noise(100, 300)
    (alone,) = prepare(processor, ask(picture, "Q")).media
    assert isinstance(alone.packing, Packing) and alone.tokens == alone.packing.tokens
    assert len(alone.tiles) == alone.packing.tiles and alone.size == (100, 300)
    np.testing.assert_array_equal(alone.tiles, tile_image(picture, processor.image_config))
    first, second = prepare(processor, ask(picture, noise(9, 9), "Q")).media
    assert first.packing is None and first.tokens == second.tokens == 17
    np.testing.assert_array_equal(first.tiles, pad_to_square_tile(picture, processor.image_config))
    assert first.tiles.shape == (1, TILE, TILE, 3)


def test_tiling_can_be_chosen(processor: Processor) -> None:
    always = prepare(processor, ask(noise(90, 200), noise(50, 60), "Q"), tiling="always")
    assert all(medium.packing is not None for medium in always.media)
    (never,) = prepare(processor, ask(noise(90, 200), "Q"), tiling="never").media
    assert never.packing is None and never.tokens == 17
    wrong: Any = "sometimes"
    with pytest.raises(RequestError, match="sometimes"):
        prepare(processor, ask("Q"), tiling=wrong)


def test_media_stand_in_the_order_of_their_placeholders(processor: Processor) -> None:
    sizes = [(10, 20), (30, 40), (50, 60)]
    messages = ask("a", noise(*sizes[0])) + ask(noise(*sizes[1]), "b", noise(*sizes[2]))
    assert [medium.size for medium in prepare(processor, messages).media] == sizes
    held = processor.config.image_token_index
    assert (prepare(processor, messages).input_ids == held).sum() == 3 * 17


def test_images_beside_the_messages(processor: Processor) -> None:
    messages = [{"role": "user", "content": "Q"}]
    inputs = prepare(processor, messages, images=[noise(20, 20)])
    assert (
        inputs.input_ids.tolist() == prepare(processor, ask(noise(20, 20), "Q")).input_ids.tolist()
    )


def test_pixel_values_are_the_references(processor: Processor) -> None:
    (medium,) = prepare(processor, ask(noise(60, 60), "Q")).media
    values = medium.pixel_values
    assert values.shape == (len(medium.tiles), 3, TILE, TILE) and values.dtype == np.float32
    expected = (medium.tiles.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(medium.normalization[medium.tiles[..., 0], 0], values[:, 0])


def test_rendering_needs_no_sources(processor: Processor) -> None:
    content = [{"type": "text", "text": "<image>?"}, {"type": "video"}, {"type": "image"}]
    assert render(processor, [{"role": "user", "content": content}]) == (
        "<|im_start|>user\n<image>\n<video>\n<image>?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_keys_are_equal_for_equal_rows_only(processor: Processor) -> None:
    def keys(*pictures: Any, tiling: Any = "auto") -> list[str]:
        return [
            medium.key for medium in prepare(processor, ask(*pictures, "Q"), tiling=tiling).media
        ]

    one = noise(64, 64)
    other = one.copy()
    other[5, 5, 0] ^= 1
    assert keys(one) == keys(one.copy())
    assert keys(one, one) == [keys(one, tiling="never")[0]] * 2
    different = [keys(one), keys(other), keys(one, tiling="never"), keys(one[:32])]
    different += [keys(np.zeros((n, n, 3), np.uint8)) for n in (1, 56, 200)]
    assert len({key for (key,) in different}) == len(different)


def test_the_key_knows_the_normalisation(processor: Processor) -> None:
    (medium,) = prepare(processor, ask(noise(20, 20), "Q")).media
    settings = dataclasses.replace(medium.config, image_mean=(0.4, 0.5, 0.5))
    assert dataclasses.replace(medium, config=settings).key != medium.key


@pytest.mark.parametrize("template", ["space", "newline"])
def test_media_can_stay_where_they_stand(template: str, tmp_path: Path) -> None:
    processor = Processor.from_folder(checkpoint(tmp_path, template), config())
    first = ask(noise(9, 9), "Q")
    assert render(processor, first, "given") == render(processor, first)
    both = [prepare(processor, first, order=order).input_ids.tolist() for order in ORDERS]
    assert both[0] == both[1]

    between = ask(noise(9, 9), "a <image> ", noise(8, 7), "b", noise(6, 5))
    text = render(processor, between, "given")
    lead = "<|im_start|>user\n<image>\n" if template == "newline" else "<|im_start|>user <image>\n"
    assert text.startswith(f"{lead}a <image> <image>\nb<image>")
    inputs = prepare(processor, between, order="given")
    assert inputs.prompt == text
    assert [medium.size for medium in inputs.media] == [(9, 9), (8, 7), (6, 5)]
    held = inputs.input_ids == processor.config.image_token_index
    assert held.sum() == 3 * 17  # not the user's own <image>
    assert (np.diff(held.astype(int)) == 1).sum() == 3
    wrong: Any = "mine"
    with pytest.raises(RequestError, match="mine"):
        prepare(processor, between, order=wrong)


ORDERS: tuple[Any, ...] = ("template", "given")


def about(draw: random.Random, text: Callable[[], str]) -> list[dict[str, Any]]:
    """A conversation of a chance shape: who speaks, texts as strings or blocks, images between."""
    roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(0, 2) + ["user"]
    pictures = draw.choice((0, 0, 0, 1, 3))
    messages: list[dict[str, Any]] = []
    for role in roles:
        if draw.random() < 0.3:
            messages.append({"role": role, "content": text()})
            continue
        blocks = [{"type": "text", "text": text()} for _ in range(draw.randint(1, 3))]
        if role == "user" and pictures:
            image = {"type": "image", "image": black(8, 8)}
            blocks.insert(draw.randint(0, len(blocks)), image)
            pictures -= 1
        messages.append({"role": role, "content": blocks})
    messages[-1]["content"] = [*blocks_of(messages[-1]), {"type": "text", "text": "?"}]
    return messages


def blocks_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def read_back(processor: Processor, inputs: Inputs) -> str:
    """The prompt that ids spell, the rows of an image being one placeholder."""
    media, ids, text = iter(inputs.media), inputs.input_ids.tolist(), ""
    held = processor.config.image_token_index
    while held in ids:
        place = ids.index(held)
        text += processor.tokenizer.decode(ids[:place], skip_special_tokens=False) + "<image>"
        del ids[: place + next(media).tokens]
    assert next(media, None) is None
    return text + processor.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("template", ["space", "newline", "original"])
def test_control_ids_are_the_templates_own(template: str, order: Any, tmp_path: Path) -> None:
    """6,000 texts of special strings, pieces of them and lookalikes, wherever a text can
    stand: control ids are those of the same conversation about nothing, and all the rest is text.
    """
    folder = original(tmp_path) if template == "original" else checkpoint(tmp_path, template)
    processor = Processor.from_folder(folder, config())
    control = {*processor.tokenizer.specials.values(), processor.config.image_token_index}
    draw, texts = random.Random(f"{template} {order}"), 0
    while texts < 1000:
        shape = draw.getrandbits(32)
        messages = about(random.Random(shape), lambda: tricky(draw))
        written = [b["text"] for m in messages for b in blocks_of(m) if b["type"] == "text"]
        inputs = prepare(processor, messages, order=order)
        harmless = prepare(processor, about(random.Random(shape), lambda: "x"), order=order)
        ids, expected = inputs.input_ids.tolist(), harmless.input_ids.tolist()
        assert [i for i in ids if i in control] == [i for i in expected if i in control], written
        assert len(inputs.media) == len(harmless.media)
        assert all(text in inputs.prompt for text in written)
        assert read_back(processor, inputs) == unicodedata.normalize("NFC", inputs.prompt)
        texts += len(written)


def test_a_text_without_media_has_none(processor: Processor) -> None:
    assert prepare(processor, ask("<image> is a word")).media == ()


def original(folder: Path) -> Path:
    """The files of an original checkpoint: no template, no placeholders, no image settings."""
    checkpoint(folder)
    for name in ("chat_template.jinja", "processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"] = whole["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


def test_original_checkpoints_take_their_placeholders_from_the_config(
    processor: Processor, tmp_path: Path
) -> None:
    plain = Processor.from_folder(original(tmp_path), config())
    assert plain.image_config == processor.image_config
    question = ask(noise(60, 60), "Is <image> here?")
    inputs = prepare(plain, question)
    assert inputs.prompt.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert (inputs.input_ids == config().image_token_index).sum() == inputs.media[0].tokens
    system = {"role": "system", "content": "You are a helpful assistant."}
    np.testing.assert_array_equal(
        inputs.input_ids, prepare(processor, [system, *question]).input_ids
    )


def rewrite(folder: Path, name: str, **settings: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **settings}))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_image_tokens": 729}, "729.*16"),
        ({"vision_feature_select_strategy": "default"}, "'default'.*'full'"),
        ({"vision_aspect_ratio": "anyres_max_4"}, "anyres_max_4.*anyres_max_9"),
        ({"image_token": "<img>"}, "'<img>'.*'<image>'"),
        ({"image_processor": [1]}, "image_processor"),
    ],
)
def test_a_processor_that_contradicts_the_model_is_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    checkpoint(tmp_path)
    rewrite(tmp_path, "processor_config.json", **settings)
    with pytest.raises(ConfigError, match=named):
        Processor.from_folder(tmp_path, config())


def test_nested_image_settings_come_first(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    nested = json.loads((tmp_path / "preprocessor_config.json").read_text())
    nested["image_mean"] = [0.1, 0.2, 0.3]
    rewrite(tmp_path, "processor_config.json", image_processor=nested)
    assert Processor.from_folder(tmp_path, config()).image_config.image_mean == (0.1, 0.2, 0.3)


def test_ids_that_disagree_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    wrong = dataclasses.replace(config(), image_token_index=7)
    with pytest.raises(ConfigError, match=r"id 7 for <image>"):
        Processor.from_folder(tmp_path, wrong)
    beyond = dataclasses.replace(config(), text_config=TextConfig(), image_token_index=900)
    with pytest.raises(ConfigError, match="900"):
        Processor.from_folder(tmp_path, beyond)


def test_a_template_that_drops_an_image_is_an_error(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(RequestError, match="0 <image> for 1"):
        prepare(Processor.from_folder(tmp_path, config()), ask(noise(9, 9), "Q"))


def test_an_image_that_is_none_is_a_media_error(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for source in (tmp_path / "a.png", tmp_path / "none.png", 3):
        with pytest.raises(MediaError):
            prepare(processor, ask(source, "Q"))


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = "tokenizers jinja2 PIL mlx mlx_lm transformers torch av huggingface_hub".split()
    program = (
        "import mlx_onevision.prompt.processor, sys\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert shown.stdout.split() == [b"[]"]
