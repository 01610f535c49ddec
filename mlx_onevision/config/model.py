"""A checkpoint's config.json, as frozen dataclasses whose fields are the file's own keys.

A key that changes what the network computes is honoured, or refused by name. Keys that the
reference implementation reads but that do nothing at inference are listed in ``INERT``; keys that
it does not know at all have no effect there either, and are reported by name in the log.

Missing fields take the defaults of the reference's *classes* (not those of the published
checkpoints): a ``vision_config`` that is present but partial is completed with SigLIP-base values,
one that is absent altogether is SigLIP-so400m.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_onevision.config import original_layout
from mlx_onevision.config.json_fields import (
    ACTIVATIONS,
    Json,
    Reader,
    report_unknown,
    require_type,
    shown,
)
from mlx_onevision.config.quantization import Quantization
from mlx_onevision.config.rope import RopeConfig
from mlx_onevision.errors import ConfigError


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower. ``image_size`` and ``patch_size`` are edge lengths in pixels."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def patches_per_side(self) -> int:
        """Patches along one edge of a tile; the pixels that do not fill a patch are dropped."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Json | None) -> "VisionConfig":
        if values is None:
            return cls(1152, 4304, 26, 16, 3, 384, 14)
        require_type(values, "vision_config", "siglip_vision_model")
        report_unknown(values, cls, "vision_config")
        read = Reader(values, "vision_config")
        config = cls(
            hidden_size=read.integer("hidden_size", cls.hidden_size, 32768),
            intermediate_size=read.integer("intermediate_size", cls.intermediate_size, 262144),
            num_hidden_layers=read.integer("num_hidden_layers", cls.num_hidden_layers, 256),
            num_attention_heads=read.integer("num_attention_heads", cls.num_attention_heads, 1024),
            num_channels=read.integer("num_channels", cls.num_channels, 3),
            image_size=read.square("image_size", cls.image_size, 4096),
            patch_size=read.square("patch_size", cls.patch_size, 1024),
            hidden_act=read.choice("hidden_act", cls.hidden_act, ACTIVATIONS),
            layer_norm_eps=read.positive("layer_norm_eps", cls.layer_norm_eps),
        )
        if config.num_channels != 3:
            raise ConfigError(
                f"vision_config.num_channels is {config.num_channels}; only 3 (RGB) is supported"
            )
        if config.hidden_size % config.num_attention_heads:
            raise ConfigError(
                f"vision_config.hidden_size {config.hidden_size} does not divide into "
                f"{config.num_attention_heads} attention heads"
            )
        if config.patches_per_side < 1:
            raise ConfigError(
                f"vision_config.patch_size {config.patch_size} exceeds its image_size"
            )
        return config


# Rotary angles are computed from positions in float32, which has all whole numbers up to this one.
MOST_POSITIONS = 1 << 24


@dataclass(frozen=True)
class TextConfig:
    """The Qwen2 decoder. ``layer_types`` names each layer's attention, full or sliding."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    layer_types: tuple[str, ...] = ("full_attention",) * 32
    sliding_window: int | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, values: Json | None) -> "TextConfig":
        values = values or {}
        require_type(values, "text_config", "qwen2")
        report_unknown(values, cls, "text_config", ("rope_parameters", "dtype", "torch_dtype"))
        read = Reader(values, "text_config")
        layers = read.integer("num_hidden_layers", cls.num_hidden_layers, 256)
        heads = read.integer("num_attention_heads", cls.num_attention_heads, 1024)
        # A null here means "as many as query heads"; an absent key means the class default.
        kv_heads = (
            heads
            if "num_key_value_heads" in values and values["num_key_value_heads"] is None
            else read.integer("num_key_value_heads", cls.num_key_value_heads, 1024)
        )
        hidden = read.integer("hidden_size", cls.hidden_size, 32768)
        if heads % kv_heads:
            raise ConfigError(
                f"text_config has {heads} attention heads, not a multiple of {kv_heads} for keys"
            )
        head_dim = read.integer("head_dim", hidden // heads, 1024)
        if head_dim % 2:
            raise ConfigError(
                f"text_config's head_dim is {head_dim}; rotary positions need an even one"
            )
        window = None
        sliding = read.flag("use_sliding_window", False)
        if sliding and values.get("sliding_window", 4096) is not None:
            window = read.integer("sliding_window", 4096, 2**31 - 1)
        first_sliding = read.integer("max_window_layers", 28, 2**31 - 1, least=0)
        kinds = values.get("layer_types")
        if kinds is None:
            full = layers if window is None else min(first_sliding, layers)
            kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if not isinstance(kinds, Sequence) or len(kinds) != layers:
            raise ConfigError(f"text_config.layer_types does not name {layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    f"text_config.layer_types names {shown(kind)}, which is not supported"
                )
            if kind == "sliding_attention" and window is None:
                raise ConfigError(
                    "text_config.layer_types asks for sliding attention without a window"
                )
        rope = RopeConfig.from_dict(values)
        context = read.integer(
            "max_position_embeddings", cls.max_position_embeddings, MOST_POSITIONS
        )
        rope.check(head_dim, context)
        return cls(
            vocab_size=read.integer("vocab_size", cls.vocab_size, 2_000_000),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size", cls.intermediate_size, 262144),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=read.choice("hidden_act", cls.hidden_act, ACTIVATIONS),
            max_position_embeddings=context,
            rms_norm_eps=read.positive("rms_norm_eps", cls.rms_norm_eps),
            rope=rope,
            layer_types=tuple(kinds),
            sliding_window=window,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
        )


# The model_type of what only this package knows: settings of the original code for which the Hub's
# layout has no place. The converter writes it, so that other programs refuse such a model instead
# of computing another one.
OWN_TYPE = "mlx_onevision"
HUB_TYPE = "llava_onevision"
# What is taken for this model, by the model_type of its config.json.
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

    vision_aspect_ratio : what becomes of an image that is alone: ``anyres`` cuts it into tiles, and
        ``anyres_max_N`` thins out the tokens of more than about N; ``pad`` makes a square of it and
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
        """Whether the network has a newline's embedding."""
        return self.mm_patch_merge_type == "spatial_unpad"

    @property
    def tokens_per_tile(self) -> int:
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
        number = aspect.removeprefix("anyres_max_") if isinstance(aspect, str) else ""
        if not (re.fullmatch("[0-9]{1,4}", number) and 1 <= int(number) <= 1024) and not (
            own and aspect in ("anyres", "pad", "square")
        ):
            raise ConfigError(
                f"vision_aspect_ratio is {shown(aspect)}; only 'anyres_max_N' is supported"
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
    """A whole config.json in the Hub's layout; what it says besides its kind is not looked at.

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
    if not isinstance(given, Sequence) or isinstance(given, str) or not 1 <= len(given) <= 128:
        raise ConfigError(f"{where}: image_grid_pinpoints is not a list of 1 to 128 pairs")
    pairs = []
    for pair in given:
        if (
            not isinstance(pair, Sequence)
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
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"config.json: {key} is not an object")
    return section


def _either(read: Reader, new: str, old: str, default: int) -> int:
    return read.integer(
        new if read.values.get(new) is not None else old, default, 2_000_000, least=0
    )


def _feature_layer(values: Json, layers: int) -> int | tuple[int, ...]:
    given = values.get("vision_feature_layer", -1)
    chosen = given if isinstance(given, list | tuple) else [given]
    for layer in chosen:
        if type(layer) is not int or not -layers <= layer <= layers or layer == 0:
            raise ConfigError(
                f"vision_feature_layer is {shown(given)}; it must name layers 1 to {layers}, "
                f"or -1 to -{layers}"
            )
    if not chosen:
        raise ConfigError("vision_feature_layer is an empty list")
    return tuple(chosen) if isinstance(given, list | tuple) else given


def _dtype(values: Json) -> str | None:
    for section in (values, values.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                name = str(section[key]).removeprefix("torch.")
                if name not in DTYPES:
                    raise ConfigError(
                        f"config.json: {key} is {shown(name)}; supported are {', '.join(DTYPES)}"
                    )
                return name
    return None
