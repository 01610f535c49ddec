"""The original lmms-lab config.json, translated into the keys of the Hub's layout.

It is one flat file: Qwen2's fields at the top, the vision side as ``mm_*``
settings that name a tower instead of describing it. The values that this package implements are
accepted, others are refused by name; what only mattered to training is dropped.
"""

from collections.abc import Mapping
from typing import Any

from mlx_onevision.errors import ConfigError

ARCHITECTURES = ("LlavaQwenForCausalLM",)

# The towers that the original checkpoints name. The original code deletes so400m's last layer, the
# 27th, when it loads it.
TOWERS: Mapping[str, Mapping[str, Any]] = {
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}

# What each setting must be where it is present: the only behaviour that the published checkpoints
# use.
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_newline_position": ("one_token",),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_spatial_pool_stride": (2, None),
    "mm_resampler_type": (None, "spatial_pool"),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "add_faster_video": (False,),
    "use_pos_skipping": (False,),
    "rope_scaling": (None,),
}

TEXT_KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters use_sliding_window sliding_window max_window_layers layer_types
    tie_word_embeddings attention_dropout initializer_range use_cache bos_token_id eos_token_id
    pad_token_id
    """.split()
)
TOP_KEYS = frozenset(
    "image_token_index video_token_index torch_dtype dtype quantization quantization_config".split()
)


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original repository's."""
    named = values.get("architectures") or []
    return any(name in ARCHITECTURES for name in named) or "mm_vision_tower" in values


def to_hub(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under the Hub layout's keys.

    Raises:
        ConfigError: for a tower that is not known and a setting that is not supported, by name.
    """
    for key, allowed in REQUIRED.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"config.json: {key} is {values[key]!r}; supported is {allowed[0]!r}")
    vision = values.get("vision_config")
    if vision is None:
        name = str(values.get("mm_vision_tower"))
        if name not in TOWERS:
            raise ConfigError(
                f"config.json: mm_vision_tower is {name!r}; supported is {', '.join(TOWERS)}"
            )
        vision = {"model_type": "siglip_vision_model", **TOWERS[name]}
    size = vision.get("image_size", 384)
    text = {key: values[key] for key in TEXT_KEYS & set(values)}
    hub: dict[str, Any] = {
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": vision,
        "vision_aspect_ratio": values.get("image_aspect_ratio", "anyres_max_9"),
        "image_grid_pinpoints": _pinpoints(values.get("image_grid_pinpoints"), size),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
    }
    return hub | {key: values[key] for key in TOP_KEYS & set(values)}


def _pinpoints(given: Any, size: int) -> Any:
    """Pixel pairs; the original also writes ranges of tiles, ``"(1x1),...,(6x6)"``."""
    if not isinstance(given, str):
        return given
    ends = given.replace(" ", "").split(",...,")
    try:
        (low_h, low_w), (high_h, high_w) = (
            [int(n) for n in end.strip("()").split("x")] for end in ends
        )
    except ValueError:
        raise ConfigError(
            f"config.json: image_grid_pinpoints is {given!r}; expected pairs or '(1x1),...,(6x6)'"
        ) from None
    return [
        [size * h, size * w]
        for h in range(low_h, min(high_h, 128) + 1)
        for w in range(low_w, min(high_w, 128) + 1)
    ]
