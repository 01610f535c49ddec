"""Recipes: which of a network's matrices are quantized, and how.

A module is named as in the folders that the converter writes, which are mlx-vlm's names:
``language_model.model.layers.0.mlp.down_proj``. Nothing here knows arrays.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import RequestError
from mlx_onevision.files import read_json

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

# MLX's quantization modes, each with its own group size and bits; only affine takes others.
MODES: Mapping[str, tuple[int, int]] = {
    "affine": (64, 4),
    "mxfp4": (32, 4),
    "nvfp4": (16, 4),
    "mxfp8": (32, 8),
}

# mlx-lm's mixed recipes: bits for most of the language model, and for what suffers most from them.
MIXED: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}

VISION_BITS = 8
LOADING_BITS = (4, 8)
VISION = ("vision_tower.", "multi_modal_projector.")
LAYER = re.compile(r"language_model\.model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """How the modules whose names match a pattern (``*`` and ``?``) are quantized; None: not."""

    pattern: str
    spec: ModuleQuantization | None

    def matches(self, module: str) -> bool:
        return fnmatchcase(module, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """How each matrix is quantized. None leaves a part as it is.

    language : the language model, with its embedding and head.
    vision : the tower and the projector.
    more : what a mixed recipe gives to the matrices of the language model that need it most.
    rules : come before all of these; the first that matches counts.
    """

    name: str
    language: ModuleQuantization | None
    vision: ModuleQuantization | None
    more: ModuleQuantization | None = None
    rules: tuple[Rule, ...] = ()

    def spec(self, module: str, layers: int) -> ModuleQuantization | None:
        """How ``module`` is quantized, in a language model of so many layers."""
        for rule in self.rules:
            if rule.matches(module):
                return rule.spec
        if module.startswith(VISION):
            return self.vision
        if self.more is not None and _needs_more(module, layers):
            return self.more
        return self.language


def uniform(
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    vision_bits: int | None = VISION_BITS,
) -> Recipe:
    """The language model quantized uniformly, the tower and the projector in ``vision_bits`` bits
    and groups of 64 (None: not at all).

    Raises:
        RequestError: for numbers that the mode does not have.
    """
    language = quantization_spec(bits, group_size, mode)
    name = f"{language.bits}-bit" if mode == "affine" else mode
    return Recipe(name, language, vision_spec(vision_bits))


def while_loading(bits: int | None) -> Recipe | None:
    """The recipe for a model that is quantized as it is loaded; None for None.

    Raises:
        RequestError: for bits other than 4 and 8.
    """
    if bits is not None and (isinstance(bits, bool) or bits not in LOADING_BITS):
        raise RequestError(f"quantize is {bits!r}; while loading it is 4 or 8 bits")
    return None if bits is None else uniform(bits)


def mixed(
    name: str, group_size: int | None = None, vision_bits: int | None = VISION_BITS
) -> Recipe:
    """One of mlx-lm's mixed recipes, by its name.

    Raises:
        RequestError: for a name that none has.
    """
    if name not in MIXED:
        raise RequestError(f"there is no recipe '{name}'; there are {', '.join(MIXED)}")
    low, high = MIXED[name]
    return Recipe(
        name,
        quantization_spec(low, group_size, "affine"),
        vision_spec(vision_bits),
        quantization_spec(high, group_size, "affine"),
    )


def from_file(path: Path) -> Recipe:
    """A recipe from a JSON file, such as this one.

    ::

        {"language": {"bits": 4}, "vision": {"bits": 8},
         "rules": [{"modules": "*.lm_head", "bits": 6}, {"modules": "*.layers.0.*", "bits": 16}]}

    Every entry takes ``bits``, ``group_size`` and ``mode``; ``false`` or 16 bits leave a part, or
    the modules that a rule names, as they are. Parts that are not named take the defaults.

    Raises:
        RequestError: naming the entry that is not understood.
        CheckpointError: for a file that is not JSON.
    """
    values = read_json(path)
    if values is None:
        raise RequestError(f"there is no rules file {path}")
    unknown = sorted(values.keys() - {"language", "vision", "rules"})
    if unknown:
        raise RequestError(f"{path.name} has '{unknown[0]}'; it takes language, vision and rules")
    rules = values.get("rules", [])
    if not isinstance(rules, list):
        raise RequestError(f"the rules of {path.name} are not a list")
    made = [
        _rule(rule, f"rule {number} of {path.name}")
        for number, rule in enumerate(cast(list[Any], rules), 1)
    ]
    language = _entry(values.get("language", {}), f"language of {path.name}")
    vision = _entry(values.get("vision", {"bits": VISION_BITS}), f"vision of {path.name}")
    return Recipe(path.stem, language, vision, rules=tuple(made))


def quantization_spec(
    bits: int | None = None, group_size: int | None = None, mode: str = "affine"
) -> ModuleQuantization:
    """How to quantize a module, completed with its mode's own numbers.

    Raises:
        RequestError: for a mode that is not known, and numbers that it does not have.
    """
    if mode not in MODES:
        raise RequestError(f"there is no mode '{mode}'; there are {', '.join(MODES)}")
    its_group, its_bits = MODES[mode]
    spec = ModuleQuantization(group_size or its_group, bits or its_bits, mode)
    if mode != "affine" and (spec.group_size, spec.bits) != MODES[mode]:
        raise RequestError(
            f"{mode} always has {its_bits} bits in groups of {its_group}; leave the numbers out"
        )
    if mode == "affine" and (spec.bits not in BITS or spec.group_size not in GROUP_SIZES):
        raise RequestError(
            f"{spec.bits} bits in groups of {spec.group_size} are not possible; bits are "
            f"{', '.join(map(str, BITS))} and groups {', '.join(map(str, GROUP_SIZES))}"
        )
    return spec


def vision_spec(bits: int | None) -> ModuleQuantization | None:
    """The tower's and the projector's: affine, groups of 64; None leaves them as they are."""
    return None if bits is None else quantization_spec(bits)


def _rule(given: Any, where: str) -> Rule:
    entry = cast(dict[str, Any], given).copy() if isinstance(given, dict) else {}
    pattern = entry.pop("modules", None)
    if not isinstance(pattern, str):
        raise RequestError(f"{where} does not say which modules it is about; give modules")
    if not entry:
        raise RequestError(f"{where} does not say how; give bits, or 16 to leave them")
    return Rule(pattern, _entry(entry, where))


def _entry(given: Any, where: str) -> ModuleQuantization | None:
    if given is False or given == {"bits": 16}:
        return None
    if not isinstance(given, dict) or given.keys() - {"bits", "group_size", "mode"}:
        raise RequestError(f"{where} is not false or an object with bits, group_size and mode")
    entry = cast(dict[str, Any], given)
    bits, group_size = entry.get("bits"), entry.get("group_size")
    if not all(number is None or type(number) is int for number in (bits, group_size)):
        raise RequestError(f"{where} has bits or a group_size that is no whole number")
    try:
        return quantization_spec(bits, group_size, str(entry.get("mode", "affine")))
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def _needs_more(module: str, layers: int) -> bool:
    """mlx-lm's choice (``mixed_quant_predicate_builder``), which is llama.cpp's for Q4_K_M: the
    head; values and MLP outputs of the first and last eighth of the layers and of every third.
    """
    if "lm_head" in module:
        return True
    if "v_proj" not in module and "down_proj" not in module:
        return False
    found = LAYER.match(module)
    layer = int(found[1]) if found else 0
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
