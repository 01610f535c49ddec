"""What a checkpoint's JSON files say, as frozen dataclasses whose fields are the files' own keys.

A key that changes what the network computes is honoured, or refused by name. Keys that the
reference implementation reads but that do nothing at inference are listed in ``INERT``; keys that
it does not know at all have no effect there either, and are reported by name in the log.

Missing fields take the defaults of the reference's *classes* (not those of the published
checkpoints): a ``vision_config`` that is present but partial is completed with SigLIP-base values,
one that is absent altogether is SigLIP-so400m.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_onevision.config import original_layout as lmms_lab
from mlx_onevision.config.json_fields import ACTIVATIONS, Json, Reader, report_unknown, require_type
from mlx_onevision.config.quantization import Quantization
from mlx_onevision.config.text_config import TextConfig
from mlx_onevision.config.vision_config import VisionConfig
from mlx_onevision.errors import ConfigError

DTYPES = ("float16", "bfloat16", "float32")

DEFAULT_PINPOINTS = tuple(
    (height, width)
    for height in (384, 768, 1152, 1536, 1920, 2304)
    for width in (384, 768, 1152, 1536, 1920, 2304)
)


@dataclass(frozen=True)
class OneVisionConfig:
    """A checkpoint's config.json. ``image_grid_pinpoints`` are (height, width) pairs in pixels."""

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

    @property
    def max_tiles(self) -> int:
        """The 9 of ``anyres_max_9``: a tiled image keeps at most about this many tiles' worth of
        tokens.
        """
        return int(self.vision_aspect_ratio.removeprefix("anyres_max_"))

    @property
    def tokens_per_tile(self) -> int:
        return self.vision_config.patches_per_side**2

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The selected hidden states, counted from the embeddings: 1 is the output of the first
        layer.
        """
        chosen = self.vision_feature_layer
        total = self.vision_config.num_hidden_layers + 1
        return tuple(
            layer % total for layer in (chosen if isinstance(chosen, tuple) else (chosen,))
        )

    @classmethod
    def from_dict(cls, values: Json) -> "OneVisionConfig":
        """From a whole config.json, of the Hub's layout or of the original lmms-lab one.

        Raises:
            ConfigError: naming the field, when it asks for something that is not supported.
        """
        if lmms_lab.is_original(values):
            values = lmms_lab.to_hub(values)
        require_type(values, "config.json", "llava_onevision")
        report_unknown(
            values,
            cls,
            "config.json",
            """image_token_id video_token_id vision_feature_select_strategy torch_dtype
            quantization_config mlx_onevision""".split(),
        )
        text = TextConfig.from_dict(_section(values, "text_config"))
        vision = VisionConfig.from_dict(_section(values, "vision_config"))
        read = Reader(values, "config.json")
        strategy = values.get("vision_feature_select_strategy", "full")
        if strategy != "full":
            raise ConfigError(
                f"vision_feature_select_strategy is {strategy!r}; it would drop a patch of every "
                "tile (SigLIP has no class token), so only 'full' is supported"
            )
        aspect = values.get("vision_aspect_ratio", cls.vision_aspect_ratio)
        number = aspect.removeprefix("anyres_max_") if isinstance(aspect, str) else ""
        if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 1024):
            raise ConfigError(
                f"vision_aspect_ratio is {aspect!r}; only 'anyres_max_N' is supported"
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
        for name in ("image_token_index", "video_token_index"):
            if getattr(config, name) >= text.vocab_size:
                raise ConfigError(
                    f"{name} {getattr(config, name)} is outside a vocabulary of {text.vocab_size}"
                )
        return config


@dataclass(frozen=True)
class ImageConfig:
    """How pictures become pixel values (preprocessor_config.json). ``size`` is a tile's edge in
    pixels.
    """

    size: int = 384
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    image_grid_pinpoints: tuple[tuple[int, int], ...] = DEFAULT_PINPOINTS

    @classmethod
    def from_dict(
        cls, values: Json | None, config: OneVisionConfig, where: str = "preprocessor_config.json"
    ) -> "ImageConfig":
        """From preprocessor_config.json (None: a checkpoint without one, as the lmms-lab originals
        are). ``where`` names it in errors.

        Raises:
            ConfigError: for a step that the file switches off or changes, and for a tile size or
            grid list
                that differs from the model's, because token counts and features would then
                disagree.
        """
        size = config.vision_config.image_size
        if values is None:
            return cls(size=size, image_grid_pinpoints=config.image_grid_pinpoints)
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad"):
            if values.get(step) is False and step != "do_pad":
                raise ConfigError(f"{where} switches {step} off, which is not supported")
        if values.get("do_center_crop"):
            raise ConfigError(f"{where} asks for do_center_crop, which is not supported")
        if values.get("resample", 3) != 3:
            raise ConfigError(
                f"{where} asks for resample {values['resample']}; only 3 (bicubic) is supported"
            )
        given = values.get("size", size)
        edges = list(given.values()) if isinstance(given, Mapping) else [given]
        if any(edge != size for edge in edges):
            raise ConfigError(
                f"{where} has tiles of {given}, config.json of {size} pixels; they must agree"
            )
        pinpoints = config.image_grid_pinpoints
        if values.get("image_grid_pinpoints") is not None:
            pinpoints = read_pinpoints(values["image_grid_pinpoints"], size, where)
            if pinpoints != config.image_grid_pinpoints:
                raise ConfigError(f"{where} and config.json list different image_grid_pinpoints")
        # A file without mean and std gets the reference class's values, which are CLIP's.
        mean = values.get("image_mean") or (0.48145466, 0.4578275, 0.40821073)
        std = values.get("image_std") or (0.26862954, 0.26130258, 0.27577711)
        return cls(
            size=size,
            image_mean=_three(mean, f"{where} image_mean", positive=False),
            image_std=_three(std, f"{where} image_std", positive=True),
            rescale_factor=Reader(values, where).positive("rescale_factor", 1 / 255),
            image_grid_pinpoints=pinpoints,
        )


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
                f"{where}: image_grid_pinpoints entry {pair!r} is not a (height, width) pair "
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
                f"vision_feature_layer is {given!r}; it must name layers 1 to {layers}, "
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
                        f"config.json: {key} is {name!r}; supported are {', '.join(DTYPES)}"
                    )
                return name
    return None


def _three(given: Any, where: str, *, positive: bool) -> tuple[float, float, float]:
    numbers = given if isinstance(given, Sequence) and not isinstance(given, str) else [given] * 3
    if len(numbers) != 3 or not all(
        isinstance(n, int | float) and math.isfinite(n) and (n > 0 or not positive) for n in numbers
    ):
        raise ConfigError(f"{where} is {given!r}, not three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
