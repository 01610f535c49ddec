"""What config.json can ask for: each variation is computed as the reference computes it."""

from typing import Any

import pytest
from parity.cases import CORE, ask, picture
from parity.checkpoints import ABSENT, Tiny
from parity.compare import assert_same
from parity.oracle import Oracle
from parity.pairs import Checkpoints

from mlx_onevision import load
from mlx_onevision.errors import ConfigError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 24}
OTHER_GRIDS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def rope(kind: str, **numbers: Any) -> Tiny:
    """Rotary settings as transformers 5 writes them."""
    settings = {"rope_type": kind, "rope_theta": 1000.0, **numbers}
    return Tiny(text={"rope_theta": ABSENT, "rope_parameters": settings})


def old_rope(kind: str, key: str = "rope_type", **numbers: Any) -> Tiny:
    """Rotary settings as transformers 4 wrote them."""
    return Tiny(text={"rope_theta": 1000.0, "rope_scaling": {key: kind, **numbers}})


def absent(keys: str) -> dict[str, Any]:
    """Overrides that leave keys out of a file."""
    return dict.fromkeys(keys.split(), ABSENT)


VARIATIONS = {
    "second to last layer": Tiny(top={"vision_feature_layer": -2}),
    "layer counted from the front": Tiny(top={"vision_feature_layer": 1}),
    "two layers": Tiny(top={"vision_feature_layer": [-2, -1]}),
    "three layers, out of order": Tiny(top={"vision_feature_layer": [3, -3, 2]}),
    "projector relu": Tiny(top={"projector_hidden_act": "relu"}),
    "projector gelu_pytorch_tanh": Tiny(top={"projector_hidden_act": "gelu_pytorch_tanh"}),
    "projector silu": Tiny(top={"projector_hidden_act": "silu"}),
    "projector without bias": Tiny(top={"multimodal_projector_bias": False}),
    "tower gelu": Tiny(vision={"hidden_act": "gelu"}),
    "tower quick_gelu": Tiny(vision={"hidden_act": "quick_gelu"}),
    "tower relu": Tiny(vision={"hidden_act": "relu"}),
    "tower eps": Tiny(vision={"layer_norm_eps": 1e-2}),
    "text gelu": Tiny(text={"hidden_act": "gelu"}),
    "text eps": Tiny(text={"rms_norm_eps": 1e-2}),
    "window in every layer": Tiny(text=WINDOW | {"max_window_layers": 0}),
    "window in the second layer": Tiny(text=WINDOW | {"max_window_layers": 1}),
    "window past the last layer": Tiny(text=WINDOW | {"max_window_layers": 28}),
    "window named per layer": Tiny(
        text=WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
    ),
    "window switched off": Tiny(text={"sliding_window": 8, "max_window_layers": 0}),
    "theta": Tiny(text={"rope_theta": 1000.0}),
    "theta, new": rope("default"),
    "linear": old_rope("linear", factor=4.0),
    "linear, older key": old_rope("linear", key="type", factor=4.0),
    "linear, new": rope("linear", factor=4.0),
    "llama3": old_rope("llama3", **LLAMA3),
    "llama3, new": rope("llama3", **LLAMA3),
    "yarn": old_rope("yarn", **YARN),
    "yarn, new": rope("yarn", **YARN),
    "yarn, every number": rope(
        "yarn", **YARN, beta_fast=16, beta_slow=2, mscale=1.0, mscale_all_dim=0.7, truncate=False
    ),
    "yarn, attention factor": rope("yarn", **YARN, attention_factor=1.3),
    "wider heads": Tiny(text={"head_dim": 24}),
    "as many keys as queries": Tiny(kv_heads=4),
    "one key head": Tiny(kv_heads=1),
    "anyres_max_4": Tiny(top={"vision_aspect_ratio": "anyres_max_4"}),
    "anyres_max_4 of 4 x 4": Tiny(sides=4, top={"vision_aspect_ratio": "anyres_max_4"}),
    "anyres_max_1": Tiny(top={"vision_aspect_ratio": "anyres_max_1"}),
    "other grids": Tiny(top={"image_grid_pinpoints": OTHER_GRIDS}),
    "odd patches, rest dropped": Tiny(tile=48, patch=9),
    "tied at the top only": Tiny(
        text={"tie_word_embeddings": False}, top={"tie_word_embeddings": True}
    ),
    "new id keys": Tiny(
        top={
            "image_token_index": ABSENT,
            "video_token_index": ABSENT,
            "image_token_id": 575,
            "video_token_id": 576,
        }
    ),
    # From the reference's classes come 32 heads for queries and keys, 22016 wide layers, a theta of
    # 10000, a vocabulary of 151936.
    "fields left out": Tiny(
        text=absent(
            "num_attention_heads num_key_value_heads intermediate_size vocab_size rope_theta "
            "rms_norm_eps max_position_embeddings hidden_act sliding_window use_sliding_window "
            "max_window_layers"
        ),
        top=absent(
            "projector_hidden_act vision_feature_layer vision_aspect_ratio "
            "vision_feature_select_strategy tie_word_embeddings"
        ),
    ),
    # SigLIP base fills the rest in: 12 heads, 3072 wide layers, tiles of 224 in patches of 16.
    "partial vision_config": Tiny(
        v_hidden=48,
        v_layers=2,
        vision=absent(
            "num_attention_heads intermediate_size image_size patch_size hidden_act "
            "layer_norm_eps num_channels"
        ),
        top={"image_grid_pinpoints": [[224, 224], [224, 448], [448, 224], [448, 448]]},
    ),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_variation(checkpoints: Checkpoints, name: str) -> None:
    ours, oracle = checkpoints.pair(VARIATIONS[name])
    for size in ((337, 511), (30, 900), (205, 328), (56, 56)):
        assert_same(ours, oracle, ask(picture(size)), tokens=16)


SAME_AS_PLAIN = {"window past the last layer", "window switched off", "tied at the top only"}
SAME_AS_PLAIN |= {"new id keys"}


@pytest.mark.parametrize("name", sorted(VARIATIONS.keys() - SAME_AS_PLAIN))
def test_variation_matters(checkpoints: Checkpoints, name: str) -> None:
    """Ignoring the setting would not pass unnoticed: in the reference it moves the logits."""
    tiny = VARIATIONS[name]
    messages = ask(picture((337, 511)))
    plain = checkpoints.oracle(checkpoints.hub(Tiny())).run(messages).logits
    varied = checkpoints.oracle(checkpoints.hub(tiny)).run(messages).logits
    assert plain.shape != varied.shape or abs(plain - varied).max() > 5e-4


def test_select_strategy_default(checkpoints: Checkpoints) -> None:
    """The reference cannot run it on a tiled image; here it is refused by name."""
    folder = checkpoints.hub(Tiny(top={"vision_feature_select_strategy": "default"}))
    with pytest.raises(ValueError, match=r"match|consistent"):
        Oracle(folder).run(ask(picture(CORE[0])))
    with pytest.raises(ConfigError, match="vision_feature_select_strategy"):
        load(folder)
