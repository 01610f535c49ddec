"""A checkpoint's config.json, as frozen dataclasses whose fields are the file's own keys
(``LlavaOnevisionConfig`` of transformers).

A key that changes what the network computes is read, or refused by name. Keys that the reference
reads but that have no effect at inference are listed in ``INERT``; keys that it does not know have
no effect there either, and are logged by name.

Missing fields take the defaults of the reference's *classes* (not those of the published
checkpoints): a ``vision_config`` that is present but partial is completed with SigLIP-base values,
one that is absent altogether is SigLIP-so400m.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_onevision.config import original_layout
from mlx_onevision.config.json_fields import (
    ACTIVATIONS,
    Json,
    Reader,
    is_array,
    is_object,
    report_unknown,
    require_type,
    shown,
)
from mlx_onevision.config.networks import TextConfig, VisionConfig
from mlx_onevision.config.quantization import Quantization
from mlx_onevision.errors import ConfigError

# The model_type of models with settings of the original code for which the Hub's layout has no
# place. The converter writes it, so that other programs refuse such a model instead of computing
# another one.
OWN_TYPE = "mlx_onevision"
HUB_TYPE = "llava_onevision"
# Models that are mistaken for this one, by their model_type.
OTHERS: Mapping[str, str] = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_next_video": "LLaVA-NeXT-Video",
    "llava_onevision1_5": "LLaVA-OneVision-1.5, another network",
    "llavaonevision1_5": "LLaVA-OneVision-1.5, another network",
    "llava_qwen": "an older LLaVA with Qwen",
    "qwen2": "the language model alone",
    "siglip": "the vision tower alone",
}

DTYPES = ("float16", "bfloat16", "float32")

DEFAULT_PINPOINTS = tuple(
    (height, width)
    for height in (384, 768, 1152, 1536, 1920, 2304)
    for width in (384, 768, 1152, 1536, 1920, 2304)
)


@dataclass(frozen=True)
class OneVisionConfig:
    """A checkpoint's config.json. ``image_grid_pinpoints`` are (height, width) pairs in pixels.

    vision_aspect_ratio : how an image that is alone is prepared: ``anyres`` cuts it into tiles, and
        ``anyres_max_N`` thins out the tokens of more than about N; ``pad`` pads it to a square and
        ``square`` squeezes it into one.
    mm_patch_merge_type : how the tiles are packed: stitched, cut to the image, with a newline a row
        (``spatial_unpad``); stitched (``spatial``); one after another (``flat``).
    mm_newline_position : where a video has newlines: one at the end (``one_token``), after every
        frame, after every row of a frame (``grid``), nowhere (``no_token``).
    mm_spatial_pool_mode : how its frames are pooled: ``bilinear``, ``average`` or ``max``.
    add_time_instruction : whether a sentence on length and times of the frames follows a video.
    force_sample : whether the frames of a video are taken from its first to its last.

    The last six are of the original code; Hub checkpoints have their defaults.
    """

    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=lambda: VisionConfig.from_dict(None))
    image_token_index: int = 151646
    video_token_index: int = 151647
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int | tuple[int, ...] = -1
    vision_aspect_ratio: str = "anyres_max_9"
    image_grid_pinpoints: tuple[tuple[int, int], ...] = DEFAULT_PINPOINTS
    multimodal_projector_bias: bool = True
    tie_word_embeddings: bool = False
    dtype: str | None = None
    quantization: Quantization | None = None
    mm_patch_merge_type: str = "spatial_unpad"
    mm_newline_position: str = "one_token"
    mm_spatial_pool_mode: str = "bilinear"
    add_time_instruction: bool = False
    force_sample: bool = False

    @property
    def model_type(self) -> str:
        """What a config.json in the Hub's layout calls this model."""
        keys = (*original_layout.CHOICES, *original_layout.FLAGS)
        plain = all(getattr(self, key) == getattr(OneVisionConfig, key) for key in keys)
        indices = max(self.image_token_index, self.video_token_index)
        plain = plain and self.max_tiles is not None and indices < self.text_config.vocab_size
        return HUB_TYPE if plain else OWN_TYPE

    @property
    def is_tiled(self) -> bool:
        """Whether an image that is alone is cut into tiles."""
        return self.vision_aspect_ratio.startswith("anyres")

    @property
    def max_tiles(self) -> int | None:
        """The 9 of ``anyres_max_9``: about the most tiles whose tokens an image keeps."""
        number = self.vision_aspect_ratio.removeprefix("anyres_max_")
        return int(number) if number.isdigit() else None

    @property
    def has_newline(self) -> bool:
        """Whether the network has an embedding for newlines."""
        return self.mm_patch_merge_type == "spatial_unpad"

    @property
    def tokens_per_tile(self) -> int:
        """Features of one tile, one a patch."""
        return self.vision_config.patches_per_side**2

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The selected hidden states: 0 is the embeddings, 1 the output of the first layer."""
        given = self.vision_feature_layer
        total = self.vision_config.num_hidden_layers + 1
        return tuple(layer % total for layer in (given if isinstance(given, tuple) else (given,)))

    @classmethod
    def from_dict(cls, values: Json) -> "OneVisionConfig":
        """From a whole config.json, of the Hub's layout or of the original lmms-lab one.

        Raises:
            ConfigError: naming the field, when it asks for something that is not supported.
        """
        values = of_this_model(values)
        own = values.get("model_type") == OWN_TYPE
        report_unknown(
            values,
            cls,
            "config.json",
            """image_token_id video_token_id vision_feature_select_strategy torch_dtype
            quantization_config mlx_onevision""".split(),
            less=() if own else (*original_layout.CHOICES, *original_layout.FLAGS),
        )
        text = TextConfig.from_dict(_section(values, "text_config"))
        vision = VisionConfig.from_dict(_section(values, "vision_config"))
        read = Reader(values, "config.json")
        strategy = values.get("vision_feature_select_strategy", "full")
        if strategy != "full":
            raise ConfigError(
                f"vision_feature_select_strategy is {shown(strategy)}; it would drop a patch of "
                "every tile (SigLIP has no class token), so only 'full' is supported"
            )
        aspect = values.get("vision_aspect_ratio", cls.vision_aspect_ratio)
        tiles = re.fullmatch("anyres_max_([0-9]{1,4})", aspect) if isinstance(aspect, str) else None
        if not (tiles and 1 <= int(tiles[1]) <= 1024) and not (
            own and aspect in ("anyres", "pad", "square")
        ):
            raise ConfigError(
                f"vision_aspect_ratio is {shown(aspect)}; only 'anyres_max_N' is supported, with N "
                "from 1 to 1024"
            )
        config = cls(
            text_config=text,
            vision_config=vision,
            image_token_index=_either(read, "image_token_id", "image_token_index", 151646),
            video_token_index=_either(read, "video_token_id", "video_token_index", 151647),
            projector_hidden_act=read.choice("projector_hidden_act", "gelu", ACTIVATIONS),
            vision_feature_layer=_feature_layer(values, vision.num_hidden_layers),
            vision_aspect_ratio=aspect,
            image_grid_pinpoints=read_pinpoints(
                values.get("image_grid_pinpoints"), vision.image_size, "config.json"
            ),
            multimodal_projector_bias=read.flag("multimodal_projector_bias", True),
            tie_word_embeddings=read.flag("tie_word_embeddings", False) or text.tie_word_embeddings,
            dtype=_dtype(values),
            quantization=Quantization.from_dict(values),
        )
        if own:
            config = _with_original_settings(config, read)
        for name in ("image_token_index", "video_token_index"):
            if not own and getattr(config, name) >= text.vocab_size:
                raise ConfigError(
                    f"{name} {getattr(config, name)} is outside a vocabulary of {text.vocab_size}"
                )
        return config


def of_this_model(values: Json) -> Json:
    """A whole config.json in the Hub's layout, whichever it came in. Only the kind of the model and
    its quantization are checked.

    Raises:
        ConfigError: for a model of another kind, and for a quantization that MLX cannot read.
    """
    if original_layout.is_original(values):
        values = original_layout.to_hub(values, OWN_TYPE)
    kind = values.get("model_type", HUB_TYPE)
    if kind not in (HUB_TYPE, OWN_TYPE):
        name = f" ({OTHERS[kind]})" if isinstance(kind, str) and kind in OTHERS else ""
        raise ConfigError(
            f"config.json has model_type {shown(kind)}{name}; only {HUB_TYPE!r} is supported: "
            "0.5b, 7b, 72b, and what was trained from them"
        )
    for section, expected in (("text_config", "qwen2"), ("vision_config", "siglip_vision_model")):
        require_type(_section(values, section) or {}, section, expected)
    Quantization.from_dict(values)
    return values


def _with_original_settings(config: OneVisionConfig, read: Reader) -> OneVisionConfig:
    """With the settings that only the original code has."""
    chosen = {
        key: read.choice(key, getattr(OneVisionConfig, key), frozenset(choices))
        for key, choices in original_layout.CHOICES.items()
    }
    flags = {key: read.flag(key, False) for key in original_layout.FLAGS}
    config = replace(config, **chosen, **flags)
    if config.mm_spatial_pool_mode != "bilinear" and config.vision_config.patches_per_side < 2:
        raise ConfigError(
            f"mm_spatial_pool_mode is {config.mm_spatial_pool_mode!r}, which needs tiles of at "
            "least two patches a side"
        )
    return config


def read_pinpoints(given: Any, tile: int, where: str) -> tuple[tuple[int, int], ...]:
    """Grid resolutions as (height, width) pairs in pixels; None is the reference's list of 36.

    Raises:
        ConfigError: if it is not a list of at most 128 pairs of whole multiples of ``tile``.
    """
    if given is None:
        given = DEFAULT_PINPOINTS
    if not is_array(given) or not 1 <= len(given) <= 128:
        raise ConfigError(f"{where}: image_grid_pinpoints is not a list of 1 to 128 pairs")
    pairs: list[tuple[int, int]] = []
    for pair in given:
        if (
            not is_array(pair)
            or len(pair) != 2
            or not all(type(edge) is int and 0 < edge <= 128 * tile for edge in pair)
            or any(edge % tile for edge in pair)
        ):
            raise ConfigError(
                f"{where}: image_grid_pinpoints entry {shown(pair)} is not a (height, width) pair "
                f"of multiples of {tile}"
            )
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _section(values: Json, key: str) -> Json | None:
    section = values.get(key)
    if section is None or is_object(section):
        return section
    raise ConfigError(f"config.json: {key} is not an object")


def _either(read: Reader, new: str, old: str, default: int) -> int:
    """A token id under its new key, or under the old one."""
    return read.integer(
        new if read.values.get(new) is not None else old, default, 2_000_000, least=0
    )


def _feature_layer(values: Json, layers: int) -> int | tuple[int, ...]:
    given: Any = values.get("vision_feature_layer", -1)
    chosen = given if is_array(given) else [given]
    for layer in chosen:
        if type(layer) is not int or not -layers <= layer <= layers or layer == 0:
            raise ConfigError(
                f"vision_feature_layer is {shown(given)}; it must name layers 1 to {layers}, "
                f"or -1 to -{layers}"
            )
    if not chosen:
        raise ConfigError("vision_feature_layer is an empty list")
    return tuple(chosen) if is_array(given) else chosen[0]


def _dtype(values: Json) -> str | None:
    for section in (values, _section(values, "text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                name = str(section[key]).removeprefix("torch.")
                if name not in DTYPES:
                    raise ConfigError(
                        f"config.json: {key} is {shown(name)}; supported are {', '.join(DTYPES)}"
                    )
                return name
    return None
