"""The ``vision_config`` of a checkpoint: a SigLIP tower."""

from dataclasses import dataclass

from mlx_onevision.config.json_fields import ACTIVATIONS, Json, Reader, report_unknown, require_type
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
