"""The ``text_config`` of a checkpoint: a Qwen2 decoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_onevision.config.json_fields import ACTIVATIONS, Json, Reader, report_unknown, require_type
from mlx_onevision.config.rope import RopeConfig
from mlx_onevision.errors import ConfigError


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
        if (
            read.flag("use_sliding_window", False)
            and values.get("sliding_window", 4096) is not None
        ):
            window = read.integer("sliding_window", 4096, 2**31 - 1)
        first_sliding = read.integer("max_window_layers", 28, 2**31 - 1, least=0)
        kinds = values.get("layer_types")
        if kinds is None:
            kinds = [
                "sliding_attention"
                if window is not None and i >= first_sliding
                else "full_attention"
                for i in range(layers)
            ]
        if not isinstance(kinds, Sequence) or len(kinds) != layers:
            raise ConfigError(f"text_config.layer_types does not name {layers} layers")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(f"text_config.layer_types names {kind!r}, which is not supported")
            if kind == "sliding_attention" and window is None:
                raise ConfigError(
                    "text_config.layer_types asks for sliding attention without a window"
                )
        return cls(
            vocab_size=read.integer("vocab_size", cls.vocab_size, 2_000_000),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size", cls.intermediate_size, 262144),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=read.choice("hidden_act", cls.hidden_act, ACTIVATIONS),
            max_position_embeddings=read.integer(
                "max_position_embeddings", cls.max_position_embeddings, 2**31 - 1
            ),
            rms_norm_eps=read.positive("rms_norm_eps", cls.rms_norm_eps),
            rope=RopeConfig.from_dict(values),
            layer_types=tuple(kinds),
            sliding_window=window,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
        )
