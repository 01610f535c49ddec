"""How a checkpoint's modules are quantized: the ``quantization`` entry of config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_onevision.config.json_fields import Json, Reader, is_object, shown
from mlx_onevision.errors import ConfigError, short


@dataclass(frozen=True)
class ModuleQuantization:
    """How one module's weight is quantized: ``bits`` a value, ``group_size`` values a scale."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class Quantization:
    """The ``quantization`` entry that MLX converters write: a default, and modules that differ from
    it.

    ``modules`` maps a module's path, in the file's own names, to how it is quantized, or to None
    where it is not.
    """

    default: ModuleQuantization
    modules: Mapping[str, ModuleQuantization | None] = field(
        default_factory=dict[str, ModuleQuantization | None]
    )

    @classmethod
    def from_dict(cls, values: Json) -> "Quantization | None":
        """From a whole config.json; None where it names no quantization.

        Raises ConfigError for one that MLX cannot read.
        """
        given = values.get("quantization")
        if given is None:
            given = values.get("quantization_config")
            if given is None:
                return None
            if not is_object(given) or "quant_method" in given or "group_size" not in given:
                method = given.get("quant_method") if is_object(given) else given
                raise ConfigError(
                    f"config.json asks for quantization by {shown(method)}, which MLX cannot read; "
                    "use the unquantized checkpoint or one in an MLX layout"
                )
        if not is_object(given):
            raise ConfigError(f"config.json's quantization is {shown(given)}, not an object")
        default = _module_quantization(given, "quantization")
        modules: dict[str, ModuleQuantization | None] = {}
        for path, entry in given.items():
            if is_object(entry):
                modules[path] = _module_quantization(entry, f"quantization of {short(path)}")
            elif entry is False:
                modules[path] = None
            elif entry is True:
                modules[path] = default
        return cls(default, modules)


def _module_quantization(entry: Json, where: str) -> ModuleQuantization:
    mode = entry.get("mode", "affine")
    if mode not in ("affine", "mxfp4", "nvfp4", "mxfp8"):
        raise ConfigError(f"config.json's {where} names mode {shown(mode)}, which is not known")
    read = Reader(entry, f"config.json's {where}")
    spec = ModuleQuantization(read.integer("group_size", 64, 128), read.integer("bits", 4, 8), mode)
    if spec.bits not in (2, 3, 4, 5, 6, 8) or spec.group_size not in (16, 32, 64, 128):
        raise ConfigError(
            f"config.json's {where} has {spec.bits} bits in groups of {spec.group_size}, "
            "which MLX cannot read"
        )
    return spec
