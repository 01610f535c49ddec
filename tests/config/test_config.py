"""Every form of config.json: what is honoured, which default fills in, what is refused by name."""

import logging
from typing import Any

import pytest

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.networks import TextConfig, VisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import ConfigError

LMMS_LAB: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def test_missing_fields_take_the_class_defaults() -> None:
    config = OneVisionConfig.from_dict({"model_type": "llava_onevision"})
    assert config.text_config.hidden_size == 4096
    assert config.text_config.head_dim == 128
    assert config.text_config.rope.rope_theta == 10000.0
    assert config.vision_config == VisionConfig(1152, 4304, 26, 16, 3, 384, 14)
    assert (config.image_token_index, config.video_token_index) == (151646, 151647)
    assert len(config.image_grid_pinpoints) == 36
    assert config.image_grid_pinpoints[1] == (384, 768)
    assert config.max_tiles == 9
    assert config.feature_layers == (26,)


def test_a_partial_vision_config_takes_siglip_base_values() -> None:
    vision = VisionConfig.from_dict({"hidden_size": 768})
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers) == (224, 16, 12)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_either_flag_ties_the_embeddings(top: bool, text: bool) -> None:
    config = OneVisionConfig.from_dict(
        {"tie_word_embeddings": top, "text_config": {"tie_word_embeddings": text}}
    )
    assert config.tie_word_embeddings is (top or text)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5.0},
    ],
)
def test_old_and_new_rope_fields(rope: dict[str, Any]) -> None:
    assert TextConfig.from_dict(rope).rope.rope_theta == 1e6


def test_rope_scaling_in_both_spellings() -> None:
    old = TextConfig.from_dict({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}})
    new = TextConfig.from_dict(
        {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6}}
    )
    assert old.rope == new.rope
    assert old.rope.rope_type == "linear"


def test_head_dim_is_given_or_follows() -> None:
    assert TextConfig.from_dict({"hidden_size": 96, "num_attention_heads": 4,
                                 "num_key_value_heads": 2}).head_dim == 24  # fmt: skip
    assert TextConfig.from_dict({"head_dim": 64}).head_dim == 64


def test_sliding_windows() -> None:
    base = {"num_hidden_layers": 4, "sliding_window": 8, "max_window_layers": 2}
    assert TextConfig.from_dict(base).sliding_window is None
    assert set(TextConfig.from_dict(base).layer_types) == {"full_attention"}
    sliding = TextConfig.from_dict(base | {"use_sliding_window": True})
    assert sliding.sliding_window == 8
    assert sliding.layer_types == ("full_attention",) * 2 + ("sliding_attention",) * 2
    named = ["sliding_attention", "full_attention"] * 2
    chosen = TextConfig.from_dict(base | {"use_sliding_window": True, "layer_types": named})
    assert chosen.layer_types == tuple(named)


def test_feature_layers_count_from_the_embeddings() -> None:
    vision = {"num_hidden_layers": 5, "image_size": 56, "patch_size": 14}
    pinpoints = [[56, 56]]
    for given, expected in ((-1, (5,)), (-2, (4,)), (3, (3,)), ([-2, 5], (4, 5))):
        config = OneVisionConfig.from_dict(
            {
                "vision_config": vision,
                "image_grid_pinpoints": pinpoints,
                "vision_feature_layer": given,
            }
        )
        assert config.feature_layers == expected


def test_new_token_names_and_dtype_spellings() -> None:
    config = OneVisionConfig.from_dict({"image_token_id": 7, "torch_dtype": "float16"})
    assert config.image_token_index == 7
    assert config.dtype == "float16"
    nested = OneVisionConfig.from_dict({"text_config": {"dtype": "bfloat16"}})
    assert nested.dtype == "bfloat16"


def test_the_original_layout() -> None:
    config = OneVisionConfig.from_dict(LMMS_LAB)
    assert config.vision_config.num_hidden_layers == 26
    assert config.text_config.hidden_size == 896
    assert config.text_config.rope.rope_theta == 1e6
    assert config.tie_word_embeddings
    assert config.image_grid_pinpoints == OneVisionConfig().image_grid_pinpoints


def test_quantization_per_module() -> None:
    config = OneVisionConfig.from_dict(
        {
            "quantization": {
                "group_size": 64,
                "bits": 4,
                "language_model.lm_head": {"group_size": 32, "bits": 8},
                "vision_tower": False,
            }
        }
    )
    assert config.quantization is not None
    assert config.quantization.default == ModuleQuantization(64, 4)
    assert config.quantization.modules == {
        "language_model.lm_head": ModuleQuantization(32, 8),
        "vision_tower": None,
    }


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llava_next"}, "llava_next"),
        ({"text_config": {"model_type": "llama"}}, "llama"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip_vision_model"),
        ({"text_config": {"rope_scaling": {"type": "dynamic", "factor": 2}}}, "dynamic"),
        ({"text_config": {"rope_parameters": {"rope_type": "linear"}}}, "factor"),
        ({"text_config": {"hidden_act": "xielu"}}, "xielu"),
        ({"projector_hidden_act": "prelu"}, "prelu"),
        ({"vision_config": {"hidden_act": "laplace"}}, "laplace"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio"),
        ({"vision_aspect_ratio": "9"}, "'9'; only 'anyres_max_N' is supported, with N from 1 to"),
        ({"vision_aspect_ratio": "anyres_max_9\n"}, "vision_aspect_ratio"),
        ({"vision_aspect_ratio": "anyres_max_1025"}, "vision_aspect_ratio"),
        ({"vision_aspect_ratio": 9}, "vision_aspect_ratio"),
        ({"vision_feature_layer": 0}, "vision_feature_layer"),
        ({"vision_feature_layer": 27}, "vision_feature_layer"),
        ({"image_grid_pinpoints": [[384, 400]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_token_index": 999999}, "image_token_index"),
        ({"text_config": {"num_attention_heads": 5, "num_key_value_heads": 2}}, "5"),
        ({"text_config": {"num_hidden_layers": -1}}, "num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"text_config": {"num_hidden_layers": True}}, "num_hidden_layers"),
        ({"text_config": {"rms_norm_eps": float("nan")}}, "rms_norm_eps"),
        ({"text_config": {"layer_types": ["full_attention"]}}, "layer_types"),
        ({"text_config": []}, "text_config"),
        ({"vision_config": {"num_channels": 1}}, "num_channels"),
        ({"vision_config": {"image_size": [384, 400]}}, "image_size"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization": {"group_size": 7, "bits": 4}}, "7"),
        ({"dtype": "float64"}, "float64"),
        (LMMS_LAB | {"mm_vision_tower": "openai/clip"}, "openai/clip"),
        (LMMS_LAB | {"mm_projector_type": "linear"}, "mm_projector_type"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        OneVisionConfig.from_dict(values)


def test_unknown_keys_are_reported_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mlx_onevision"):
        OneVisionConfig.from_dict({"text_config": {"frobnicate": 1, "use_cache": True}})
    assert "frobnicate" in caplog.text
    assert "use_cache" not in caplog.text


def test_pixel_settings_come_from_the_file_or_from_the_reference_class() -> None:
    config = OneVisionConfig()
    assert ImageConfig.from_dict(None, config).image_mean == (0.5, 0.5, 0.5)
    # A file that lacks them gets the class's values, which are CLIP's.
    assert ImageConfig.from_dict({}, config).image_mean[0] == 0.48145466
    given = ImageConfig.from_dict({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}, config)
    assert given.image_mean == (0.1, 0.2, 0.3)
    assert given.image_std == (1.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"resample": 2}, "resample"),
        ({"size": {"height": 224, "width": 224}}, "224"),
        ({"image_grid_pinpoints": [[384, 384]]}, "image_grid_pinpoints"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"rescale_factor": 0}, "rescale_factor"),
    ],
)
def test_pixel_steps_that_are_not_done_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ImageConfig.from_dict(values, OneVisionConfig())
