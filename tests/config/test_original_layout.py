"""The config.json that LLaVA-NeXT's training scripts save: what is read, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from mlx_onevision.config import original_layout
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import ConfigError

# What scripts/video/train saves, as far as it matters here.
SAVED: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava_qwen",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "add_faster_video": False,
    "add_time_instruction": True,
    "force_sample": True,
    "faster_token_stride": 10,
    "use_pos_skipping": True,  # in training alone
    "rope_scaling": {"factor": 4.0, "type": "linear"},  # which the original code resets
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
}


def read(**settings: Any) -> OneVisionConfig:
    return OneVisionConfig.from_dict(SAVED | settings)


def test_llava_video_is_read() -> None:
    config = read()
    assert (config.mm_newline_position, config.mm_spatial_pool_mode) == ("grid", "bilinear")
    assert config.add_time_instruction and config.force_sample
    assert config.max_tiles == 9 and config.has_newline
    assert config.text_config.rope.rope_type == "default"
    assert config.vision_config.num_hidden_layers == 26
    assert config.model_type == "mlx_onevision"


def test_what_is_absent_is_what_the_original_code_takes_then() -> None:
    names = (*original_layout.CHOICES, *original_layout.FLAGS, "image_aspect_ratio")
    config = OneVisionConfig.from_dict({k: v for k, v in SAVED.items() if k not in names})
    assert config.vision_aspect_ratio == "square" and not config.is_tiled
    assert (config.mm_patch_merge_type, config.mm_newline_position) == ("flat", "one_token")
    assert (config.mm_spatial_pool_mode, config.force_sample) == ("bilinear", False)


@pytest.mark.parametrize(
    "tower",
    [
        "/mnt/disk/models/siglip-so400m-patch14-384/",
        "./siglip",
        r"D:\towers\siglip2-so400m-patch14-384",
        "/home/someone/.cache/models--google--siglip-so400m-patch14-384/snapshots/9fdffc58a512",
        "/data/clip_and_others/tower",
    ],
)
def test_a_tower_may_be_named_by_a_path(tower: str) -> None:
    assert read(mm_vision_tower=tower) == read()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "mm_vision_tower is 'openai/cl"),
        ({"mm_vision_tower": "/x/siglip-base-patch16-224"}, "mm_vision_tower is '/x/siglip-base"),
        ({"mm_vision_tower": "hf:google/vit"}, "mm_vision_tower is 'hf:google/vit'; supported is"),
        ({"mm_vision_tower": None}, "mm_vision_tower is None; supported is google/siglip-so400m"),
        ({"mm_newline_position": "row"}, "mm_newline_position is 'row'; supported are frame, grid"),
        ({"mm_spatial_pool_mode": "conv"}, "mm_spatial_pool_mode is 'conv'; supported are average"),
        (
            {"mm_patch_merge_type": "spatial_nobase"},
            "mm_patch_merge_type is 'spatial_nobase'; supp",
        ),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio is 'highres'; supported are squar"),
        ({"image_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio is 'anyres_max_0'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; supported is 'mlp2x_ge"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'; supported is None"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; supported is False"),
        ({"add_faster_video": True}, "add_faster_video is True; supported is False"),
        ({"add_time_instruction": "yes"}, "add_time_instruction is 'yes', not true or false"),
        ({"image_grid_pinpoints": "(1,"}, r"image_grid_pinpoints is '\(1,'; expected pairs or"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        read(**settings)
    assert "\n" not in str(refused.value)


def test_pinpoints_are_width_and_height() -> None:
    uneven = [[384, 768], [768, 384], [768, 768], [384, 1152]]
    turned = ((768, 384), (384, 768), (768, 768), (1152, 384))
    assert read(image_grid_pinpoints=uneven).image_grid_pinpoints == turned
    assert read(image_grid_pinpoints=str(uneven)).image_grid_pinpoints == turned
    wide = read(image_grid_pinpoints="(1x1),...,(3x1)").image_grid_pinpoints
    assert wide == ((384, 384), (384, 768), (384, 1152))
    # All pairs of some edges are left in the order in which the Hub's checkpoints have them.
    assert read().image_grid_pinpoints == OneVisionConfig().image_grid_pinpoints
    assert read(image_aspect_ratio="pad", image_grid_pinpoints=[[336, 672]]).max_tiles is None


def test_another_stride_is_not_what_the_original_code_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert read(mm_spatial_pool_stride=4) == read()
    assert "mm_spatial_pool_stride is 4; video frames are pooled by 2" in caplog.text


def test_the_hub_layout_does_not_have_these_settings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlx_onevision"):
        hub = {"model_type": "llava_onevision", "mm_newline_position": "grid"}
        assert OneVisionConfig.from_dict(hub) == OneVisionConfig()
    assert "mm_newline_position" in caplog.text
    with pytest.raises(ConfigError, match="vision_aspect_ratio"):
        OneVisionConfig.from_dict({"vision_aspect_ratio": "pad"})


def test_average_pooling_needs_two_patches() -> None:
    vision = {"model_type": "siglip_vision_model", "image_size": 14, "patch_size": 14}
    settings = {"vision_config": vision, "image_aspect_ratio": "pad"}
    assert read(**settings).mm_spatial_pool_mode == "bilinear"
    with pytest.raises(ConfigError, match="at least two patches"):
        read(**settings, mm_spatial_pool_mode="max")


@pytest.mark.parametrize(
    ("rows", "added", "found"),
    [
        (152064, {}, (151646, 151647)),
        (151936, {151643: "<|endoftext|>", 151645: "<|im_end|>"}, (151646, 151647)),
        # mm_use_im_patch_token, the trainer's default: the rows end with the token that it adds.
        (151647, {151645: "<|im_end|>", 151646: "<im_patch>"}, (151647, 151648)),
        # A vocabulary cut to Qwen2's tokenizer, and one of Qwen2.5's, which has tokens there.
        (151646, {151645: "<|im_end|>"}, (151646, 151647)),
        (151665, {151646: "<|object_ref_start|>", 151664: "<|file_sep|>"}, (151665, 151647)),
        # More tokens than rows, and placeholders that the tokenizer has itself.
        (151646, {151646: "<loc>", 151647: "<loc2>"}, (151648, 151649)),
        (152064, {151646: "<loc>", 151700: "<image>"}, (151700, 151647)),
    ],
)
def test_placeholders_get_ids_that_no_token_has(
    tmp_path: Path, rows: int, added: dict[int, str], found: tuple[int, int]
) -> None:
    decoder = {str(index): {"content": content} for index, content in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    values = original_layout.with_placeholders(SAVED | {"vocab_size": rows}, tmp_path)
    config = OneVisionConfig.from_dict(values)
    assert (config.image_token_index, config.video_token_index) == found


def test_placeholders_that_are_named_stay(tmp_path: Path) -> None:
    named = SAVED | {"image_token_index": 7}
    assert original_layout.with_placeholders(named, tmp_path) is named
    hub = {"model_type": "llava_onevision"}
    assert original_layout.with_placeholders(hub, tmp_path) is hub
