"""The original repository's config.json, translated into the keys of the Hub's layout.

It is one flat file, which lmms-lab publishes and LLaVA-NeXT's training scripts save: Qwen2's fields
at the top, the vision side as ``mm_*`` settings that name a tower instead of describing it. The
settings that change what the original code computes are kept, under their own names where the Hub's
layout has none; values that this package does not implement are refused by name; settings of
training alone, and those that the original code does not read, are dropped.
"""

import ast
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from mlx_onevision.config.json_fields import is_array, is_object, shown
from mlx_onevision.errors import ConfigError
from mlx_onevision.files import read_json

logger = logging.getLogger("mlx_onevision")

ARCHITECTURES = ("LlavaQwenForCausalLM",)

# SigLIP-so400m at 384 pixels, the original code's one tower of this kind. It deletes the last
# layer, the 27th, when it loads it.
TOWER: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# Parts of the names of other kinds and sizes of towers. Trainers save the path on their own disk,
# whose last part may be any name; then the shapes of the weights decide.
OTHER_SIZE = re.compile(r"base|large|giant|patch(?!14)|224|256|512|980", re.IGNORECASE)
OTHER_KIND = re.compile(
    r"clip|imagebind|mlcd|\beva|dino|intern|sharegpt|convnext|aimv2", re.IGNORECASE
)

# The settings of how features become embeddings, and their values that are implemented. The first
# is the original code's where the setting is absent.
CHOICES: Mapping[str, tuple[str, ...]] = {
    "mm_patch_merge_type": ("flat", "spatial", "spatial_unpad"),
    "mm_newline_position": ("one_token", "grid", "frame", "no_token"),
    "mm_spatial_pool_mode": ("bilinear", "average", "max"),
}
FLAGS = ("add_time_instruction", "force_sample")
# Other settings, and the values that they may have where they are present.
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None, "spatial_pool"),
    "mm_use_im_start_end": (False, None),
    "add_faster_video": (False, None),
}
LONGEST_LIST = 10_000  # letters of a list that is written as text; 128 pairs take 1,800
ASPECT_RATIO = re.compile(r"square|pad|anyres|anyres_max_[0-9]+")

# Without rope_scaling, which the original code resets when it loads a checkpoint.
TEXT_KEYS = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta
    rope_parameters use_sliding_window sliding_window max_window_layers layer_types
    tie_word_embeddings attention_dropout initializer_range use_cache bos_token_id eos_token_id
    pad_token_id
    """.split()
)
TOP_KEYS = frozenset(
    "image_token_index video_token_index torch_dtype dtype quantization quantization_config".split()
)


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is the original repository's."""
    named = values.get("architectures")
    listed = is_array(named) and any(name in ARCHITECTURES for name in named)
    return listed or "mm_vision_tower" in values


def to_hub(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The same settings under the Hub layout's keys, and those that only the original code has.

    Raises:
        ConfigError: for a tower that is not known and a setting that is not supported, by name.
    """
    for key, allowed in REQUIRED.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(
                f"config.json: {key} is {shown(values[key])}; supported is {allowed[0]!r}"
            )
    aspect = values.get("image_aspect_ratio") or "square"
    if not (isinstance(aspect, str) and ASPECT_RATIO.fullmatch(aspect)):
        raise ConfigError(
            f"config.json: image_aspect_ratio is {shown(aspect)}; supported are square, pad, "
            "anyres and anyres_max_N"
        )
    if values.get("mm_spatial_pool_stride") not in (None, 2):
        logger.warning(
            "config.json: mm_spatial_pool_stride is %r; video frames are pooled by 2, as the "
            "original code does whatever it says.",
            values["mm_spatial_pool_stride"],
        )
    vision = values.get("vision_config")
    if vision is None:
        name = values.get("mm_vision_tower")
        if not isinstance(name, str) or _is_other_tower(name):
            raise ConfigError(
                f"config.json: mm_vision_tower is {shown(name)}; supported is "
                "google/siglip-so400m-patch14-384, also as a local path"
            )
        vision = TOWER
    if not is_object(vision):
        raise ConfigError("config.json: vision_config is not an object")
    size = vision.get("image_size", 384)
    if type(size) is not int:
        raise ConfigError(f"config.json: image_size is {shown(size)}, not a whole number")
    pinpoints = [[size, size]]
    if aspect.startswith("anyres"):
        pinpoints = _pinpoints(values.get("image_grid_pinpoints"), size)
    text = {key: values[key] for key in TEXT_KEYS & set(values)}
    hub: dict[str, Any] = {
        "model_type": model_type,
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": vision,
        "vision_aspect_ratio": aspect,
        "image_grid_pinpoints": pinpoints,
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        **{key: values.get(key) or choices[0] for key, choices in CHOICES.items()},
        **{key: values.get(key) or False for key in FLAGS},
    }
    return hub | {key: values[key] for key in TOP_KEYS & set(values)}


def with_placeholders(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A config.json with ids for ``<image>`` and ``<video>``, which the original code has none for:
    those of the Hub's checkpoints, unless the vocabulary is too small for them or the tokenizer in
    ``folder`` has other tokens there; then the next two beyond both. They are never looked up.
    """
    keys = {"image_token_index": ("<image>", 151646), "video_token_index": ("<video>", 151647)}
    if not is_original(values) or any(values.get(key) is not None for key in keys):
        return values
    taken = _added_tokens(folder)
    known = {content: index for index, content in taken.items()}
    rows = values.get("vocab_size")
    rows = rows if type(rows) is int else 0
    first = max(rows, max(taken, default=0) + 1)
    found: dict[str, int] = {}
    for place, (key, (content, usual)) in enumerate(keys.items()):
        free = usual < rows and usual not in taken
        found[key] = known.get(content, usual if free else first + place)
    return {**values, **found}


def _added_tokens(folder: Path) -> dict[int, str]:
    """The tokens that a tokenizer's files add to its vocabulary, by id."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    added = read_json(folder / "added_tokens.json") or {}
    try:
        found: dict[Any, str] = {int(index): content for content, index in added.items()}
        decoder: dict[str, Any] = settings.get("added_tokens_decoder") or {}
        for index, token in decoder.items():
            found[int(index)] = token["content"]
        if not found:
            tokenizer = read_json(folder / "tokenizer.json") or {}
            listed: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
            found = {token["id"]: token["content"] for token in listed}
        return {index: content for index, content in found.items() if type(index) is int}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}  # reading the tokenizer reports what is wrong


def _is_other_tower(name: str) -> bool:
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    other = OTHER_SIZE if "siglip" in last.lower() else OTHER_KIND
    return name.startswith("hf:") or other.search(last) is not None


def _pinpoints(given: Any, size: int) -> Any:
    """(height, width) pairs in pixels. The original's are (width, height), and it also writes
    ranges of tiles, ``"(1x1),...,(6x6)"``, and lists as text.
    """
    if isinstance(given, str):
        if len(given) > LONGEST_LIST:
            raise ConfigError(f"config.json: image_grid_pinpoints is {shown(given)}, a long text")
        ends = [(int(w), int(h)) for w, h in re.findall(r"\((\d{1,3})x(\d{1,3})\)", given)]
        if ends:
            (low_w, low_h), (high_w, high_h) = ends[0], ends[-1]
            pairs = product(range(low_w, high_w + 1), range(low_h, high_h + 1))
            # One more than is allowed at most, so that longer lists are refused as any other is.
            given = [[size * w, size * h] for w, h in islice(pairs, 129)]
        else:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # Python warns of invalid escapes, for example
                    given = ast.literal_eval(given)
            except (ValueError, TypeError, SyntaxError, Warning, MemoryError, RecursionError):
                raise ConfigError(
                    f"config.json: image_grid_pinpoints is {shown(given)}; expected pairs or "
                    "'(1x1),...,(6x6)'"
                ) from None
    if not is_array(given) or not all(_is_pair(pair) for pair in given):
        return given
    swapped = [[height, width] for width, height in given]
    # The order decides only between pinpoints that are equally good. All pairs of some edges are
    # the same set when swapped, and stay in the order of the file.
    return given if _is_square(swapped) else swapped


def _is_pair(pair: Any) -> bool:
    return is_array(pair) and len(pair) == 2 and all(type(edge) is int for edge in pair)


def _is_square(pairs: Sequence[Sequence[int]]) -> bool:
    """Whether these are all pairs of some edges."""
    edges = {edge for pair in pairs for edge in pair}
    return {tuple(pair) for pair in pairs} == set(product(edges, edges))
