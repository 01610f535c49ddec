"""Rotary positions (RoPE): the settings of a configuration, and the frequencies by them.

The formulas are those of transformers' modeling_rope_utils.py, in float32 as there. Frequencies
that depend on the length of the prompt (``dynamic``, ``longrope``) are refused: the keys in a cache
would have to be rotated again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.json_fields import Json, Reader, is_number, is_object, shown
from mlx_onevision.errors import ConfigError, short

Frequencies = NDArray[np.float32]  # (dims / 2,)

# The numbers that each kind reads.
ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(
        "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
    ),
    "yarn": tuple(
        """factor beta_fast beta_slow attention_factor mscale mscale_all_dim truncate
        original_max_position_embeddings""".split()
    ),
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: ``rope_type`` and the numbers that its formula takes."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    parameters: Mapping[str, float | bool] = field(default_factory=dict[str, float | bool])

    @classmethod
    def from_dict(cls, text: Json) -> "RopeConfig":
        """From ``rope_parameters``, or in older files ``rope_theta`` and ``rope_scaling``."""
        given: object = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if not is_object(given):
            raise ConfigError(f"text_config's rope settings are {shown(given)}, not an object")
        rope: dict[str, Any] = {"rope_type": given.get("type", "default"), **given}
        rope.pop("type", None)
        kind = rope.pop("rope_type")
        if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
            raise ConfigError(
                f"text_config asks for rope_type {shown(kind)}; "
                f"supported are {', '.join(ROPE_PARAMETERS)}"
            )
        theta = Reader(
            {"rope_theta": rope.pop("rope_theta", text.get("rope_theta"))}, "text_config"
        )
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("text_config asks for partial_rotary_factor, which is not supported")
        known = ROPE_PARAMETERS[kind]
        parameters: dict[str, float | bool] = {}
        for key, value in rope.items():
            if value is None:
                continue
            if not is_number(value):
                raise ConfigError(
                    f"text_config's rope setting {short(key)} is {shown(value)}, not a number"
                )
            if key in known:
                parameters[key] = value
            elif kind != "default":
                raise ConfigError(
                    f"text_config's rope setting {short(key)} is not known for {shown(kind)}"
                )
        if "factor" in known and parameters.get("factor", 0) <= 0:
            raise ConfigError(f"rope_type {shown(kind)} needs a positive factor in text_config")
        if kind == "llama3":
            for key in ("low_freq_factor", "high_freq_factor"):
                if parameters.get(key, 0) <= 0:
                    raise ConfigError(f"rope_type 'llama3' needs a positive {key} in text_config")
        return cls(theta.positive("rope_theta", cls.rope_theta), kind, parameters)

    def check(self, dims: int, max_position: int) -> None:
        """Raises ConfigError where the numbers give no finite frequencies."""
        try:
            inverse, length = self.frequencies(dims, max_position)
            finite = bool(np.isfinite(inverse).all()) and math.isfinite(length)
        except (ArithmeticError, ValueError):
            finite = False
        if not finite:
            asked = {"rope_theta": self.rope_theta, "rope_type": self.rope_type, **self.parameters}
            raise ConfigError(
                f"text_config's rope settings {shown(asked)} give no finite frequencies"
            )

    @np.errstate(all="ignore")
    def frequencies(self, dims: int, max_position: int) -> tuple[Frequencies, float]:
        """Frequencies in radians a position, the reference's ``inv_freq``, float32 (dims / 2,); and
        the factor by which ``yarn`` scales rotated queries and keys, 1.0 for other kinds.

        dims : the width of a head. max_position : ``max_position_embeddings``.
        """
        numbers = self.parameters
        factor = float(numbers.get("factor", 1.0))
        context = float(numbers.get("original_max_position_embeddings", max_position))
        exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
        periods = np.float32(self.rope_theta) ** exponents
        inverse = np.float32(1.0) / periods
        if self.rope_type == "linear":
            return inverse / np.float32(factor), 1.0
        if self.rope_type == "llama3":
            return self._llama3(inverse, factor, context), 1.0
        if self.rope_type == "yarn":
            return self._yarn(periods, dims, factor, context), self._yarn_length(factor)
        return inverse, 1.0

    def _llama3(self, inverse: Frequencies, factor: float, context: float) -> Frequencies:
        low, high = self.parameters["low_freq_factor"], self.parameters["high_freq_factor"]
        wavelength = 2 * np.pi / inverse
        slowed = np.where(wavelength > context / low, inverse / np.float32(factor), inverse)
        smooth = (context / wavelength - low) / (high - low)
        blended = (1 - smooth) * slowed / factor + smooth * slowed
        between = (wavelength >= context / high) & (wavelength <= context / low)
        return np.where(between, blended, slowed).astype(np.float32)

    def _yarn(self, periods: Frequencies, dims: int, factor: float, context: float) -> Frequencies:
        def dimension(rotations: float) -> float:
            return (dims * math.log(context / (rotations * 2 * math.pi))) / (
                2 * math.log(self.rope_theta)
            )

        low = dimension(self.parameters.get("beta_fast") or 32)
        high = dimension(self.parameters.get("beta_slow") or 1)
        if self.parameters.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        kept = np.float32(1) - ramp.astype(np.float32)
        blended = 1 / (np.float32(factor) * periods) * (1 - kept) + 1 / periods * kept
        return blended.astype(np.float32)

    def _yarn_length(self, factor: float) -> float:
        def length(scale: float, weight: float = 1.0) -> float:
            return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

        given = self.parameters.get("attention_factor")
        if given is not None:
            return float(given)
        weight, all_dims = self.parameters.get("mscale"), self.parameters.get("mscale_all_dim")
        if weight and all_dims:
            return length(factor, weight) / length(factor, all_dims)
        return length(factor)
