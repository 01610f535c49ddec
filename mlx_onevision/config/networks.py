"""The sections of config.json for the two networks: ``vision_config`` and ``text_config``.

Their defaults and checks are those of transformers' ``SiglipVisionConfig`` and ``Qwen2Config``.
"""

from dataclasses import dataclass, field

from mlx_onevision.config.json_fields import (
    ACTIVATIONS,
    Json,
    Reader,
    is_array,
    report_unknown,
    require_type,
    shown,
)
from mlx_onevision.config.rope import RopeConfig
from mlx_onevision.errors import ConfigError

# Rotary angles are computed from positions in float32, which has all whole numbers up to this one.
MOST_POSITIONS = 1 << 24


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP tower. ``image_size`` and ``patch_size`` are the sides of a tile and of a patch in
    pixels.
    """

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
        """Patches along one side of a tile; the pixels that do not fill a patch are dropped."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, values: Json | None) -> "VisionConfig":
        """From the section, or SigLIP-so400m at 384 pixels where there is none.

        Raises ConfigError, naming the field, for a value that is invalid or not supported.
        """
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
        """From the section, or the defaults where there is none.

        Raises ConfigError, naming the field, for a value that is invalid or not supported.
        """
        values = values or {}
        require_type(values, "text_config", "qwen2")
        report_unknown(values, cls, "text_config", ("rope_parameters", "dtype", "torch_dtype"))
        read = Reader(values, "text_config")
        layers = read.integer("num_hidden_layers", cls.num_hidden_layers, 256)
        heads = read.integer("num_attention_heads", cls.num_attention_heads, 1024)
        # Null stands for as many as query heads, an absent key for the default of the class.
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
        kinds: object = values.get("layer_types")
        if kinds is None:
            full = layers if window is None else min(first_sliding, layers)
            kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if not is_array(kinds) or len(kinds) != layers:
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
