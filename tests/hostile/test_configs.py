"""Configurations that anybody may have written: each is read, or refused as a ConfigError."""

import json
import logging
import resource
import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hostile.sizes import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.original_layout import with_placeholders
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import ConfigError
from mlx_onevision.media.anyres import plan_packing
from mlx_onevision.media.video import VideoConfig

Json = dict[str, Any]

OWN = {"model_type": "mlx_onevision", "vision_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
ORIGINAL: Json = {
    "architectures": ["LlavaQwenForCausalLM"],
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(6x6)",
    "mm_spatial_pool_stride": 2,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "one_token",
    "mm_projector_type": "mlp2x_gelu",
    "add_time_instruction": False,
    "vocab_size": 152000,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
}
ROPES: list[Json] = [
    {"rope_type": "linear", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32},
]


def read(name: str) -> Json:
    return json.loads((EMBEDDED / f"{name}.json").read_text())


def bases() -> list[Json]:
    config = read("config")
    ropes = [
        config | {"text_config": config["text_config"] | {"rope_parameters": rope}}
        for rope in ROPES
    ]
    quantized = config | {"quantization": {"bits": 4, "group_size": 64, "a.b": {"bits": 8}}}
    return [config, config | OWN, quantized, ORIGINAL, *ropes]


numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 128, 2**31, 2**63, 10**400, 1e308, 5e-324, -0.0, 0.5]),
    st.floats(),
    st.integers(-10, 4000),
)
words = st.one_of(
    st.sampled_from(["", "anyres_max_9", "anyres_max_²", "default", "yarn", "float32", "gelu"]),
    st.sampled_from(["[" * 300, "(1x1),(999x999)", "(0x0),(0x0)", "[(384,384)]", "1" * 5000]),
    st.text(max_size=5),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything in a document but the members of long lists."""
    found = [at] if at else []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            found += places(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:2]):
            found += places(inner, (*at, number))
    return found


KEYS = sorted(
    {key for base in bases() for at in places(base) for key in at if isinstance(key, str)}
)


@st.composite
def spoilt(draw: st.DrawFn, base: Json) -> Json:
    """A document of which some values are others."""
    values = deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(places(values)))
        inner: Any = values
        for key in way[:-1]:
            inner = inner[key]
        if draw(st.booleans()) and isinstance(inner, dict):
            inner[draw(st.sampled_from(KEYS))] = draw(anything)
        else:
            inner[way[-1]] = draw(anything)
    return values


@st.composite
def documents(draw: st.DrawFn) -> tuple[Json, Json, Json, Json]:
    """A config.json, and the files of images, videos and generation beside it."""
    changed = draw(st.integers(0, 7))
    config = draw(st.sampled_from(bases()))
    config = draw(spoilt(config)) if changed < 5 else read("config")
    others = (read("preprocessor_config"), read("video_preprocessor_config"))
    generation = read("generation_config") | {"temperature": 0.5, "top_p": 1.0, "top_k": 20}
    images, videos, generation = (
        draw(spoilt(values)) if changed >= 5 else values for values in (*others, generation)
    )
    videos |= draw(st.sampled_from([{}, {"do_sample_frames": True, "num_frames": 8, "fps": None}]))
    return config, images, videos, generation


def build(config: Json, images: Json, videos: Json, generation: Json) -> None:
    """Everything that a model's configuration is used for before its weights are read."""
    made = OneVisionConfig.from_dict(with_placeholders(config, EMBEDDED))
    text, vision = made.text_config, made.vision_config
    inverse, _ = text.rope.frequencies(text.head_dim, text.max_position_embeddings)
    assert inverse.shape == (text.head_dim // 2,) and inverse.dtype == np.float32
    assert np.isfinite(inverse).all()
    assert all(0 <= layer <= vision.num_hidden_layers for layer in made.feature_layers)
    assert made.model_type and made.max_tiles != 0
    plan_packing(
        (480, 640),
        made.image_grid_pinpoints,
        vision.image_size,
        vision.patches_per_side,
        made.max_tiles,
        made.mm_patch_merge_type,
    )
    GenerationDefaults.from_dict(generation, config)
    GenerationDefaults.from_dict(None, config)
    ImageConfig.from_dict(images, made)
    VideoConfig.from_dict(videos, made)


def rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.filterwarnings("error")
def test_generated_configurations_are_read_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "mlx_onevision")  # else every case's warnings are kept
    outcomes, risen = {"read": 0, "refused": 0}, [0]

    @settings(max_examples=cases(500, 5000))
    @given(documents())
    def check(values: tuple[Json, Json, Json, Json]) -> None:
        before = rss()
        try:
            build(*values)
        except ConfigError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1000 and not message.endswith(".")
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
        risen[0] += rss() - before

    check()
    assert min(outcomes.values()) > 20
    assert risen[0] < 100 << 20


LONG = "1" * 5000


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("value", [LONG, {LONG: None}, {LONG: "a"}, {LONG: {}}, [LONG]])
def test_long_names_and_values_are_shortened(number: int, value: object) -> None:
    """In any place of any of the four files, and beside what stands there."""
    whole = [read("config"), read("preprocessor_config"), read("video_preprocessor_config"), {}]
    refused = 0
    for base in bases() if number == 0 else [whole[number]]:
        for way in places(base):
            files = [*whole[:number], deepcopy(base), *whole[number + 1 :]]
            inner: Any = files[number]
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = value
            if isinstance(inner, dict) and isinstance(value, dict):
                inner |= value
            try:
                build(*files)
            except ConfigError as error:
                assert len(str(error)) < 1000 and "\n" not in str(error)
                refused += 1
    assert refused or number == 3


@pytest.mark.parametrize("base", bases())
def test_what_they_are_made_from_is_read(base: Json) -> None:
    build(base, {}, {}, {}) if "mm_vision_tower" in base else build(
        base, read("preprocessor_config"), read("video_preprocessor_config"), {}
    )
