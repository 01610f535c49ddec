# pyright: reportMissingTypeArgument=false
# (click.ParamType takes type arguments in newer versions of click only)
"""The options of ``mlx-onevision convert``: which recipe they mean, which exclude each other."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mlx_onevision.checkpoint.hub import HUB_ID
from mlx_onevision.errors import RequestError

if TYPE_CHECKING:
    from mlx_onevision.checkpoint.recipes import Recipe

DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# What --compare decides by itself, or has no use for.
WRITING = (
    *("quantize", "q_bits", "q_mode", "recipe", "rules", "method", "dequantize"),
    *("overwrite", "dry_run", "upload_repo", "adapter", "shard_size"),
)
BITS = ("2", "3", "4", "5", "6", "8")


Given = TypeVar("Given")


class Bytes(click.ParamType):
    """``5GB``, ``512MiB``, ``1000``; where ``binary``, GB means GiB, as of a computer's memory."""

    name = "size"

    def __init__(self, binary: bool = False) -> None:
        # GB means GiB then.
        memory = {name.replace("I", ""): size for name, size in BINARY.items()} if binary else {}
        self._units = {**DECIMAL, **BINARY, **memory}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        if found is None or found[2].upper() not in self._units:
            self.fail(f"'{value}' is not a size such as 8GB", param, ctx)
        number = int(float(found[1]) * self._units[found[2].upper()])
        if not 0 < number < 2**60:
            self.fail(f"'{value}' is not a possible size", param, ctx)
        return number


def recipe_of(
    quantize: bool,
    q_bits: str | None,
    q_group_size: str | None,
    q_mode: str | None,
    quantize_vision: str | None,
    recipe: str | None,
    rules: Path | None,
    method: str | None = None,
    **_: Any,
) -> Recipe | None:
    """The recipe that the options of these names ask for; None where they quantize nothing.

    Raises:
        RequestError: for a recipe that there is not, and bits that a method does not have.
    """
    from mlx_onevision.checkpoint import recipes

    vision = None if quantize_vision in (None, "none") else int(quantize_vision or 0)
    group = int(q_group_size) if q_group_size else None
    if rules is not None:
        made = recipes.from_file(rules)
        if quantize_vision is not None:
            made = replace(made, vision=recipes.vision_spec(vision))
        return made
    default = recipes.VISION_BITS if quantize_vision is None else vision
    if recipe is not None:
        if recipe not in recipes.MIXED:
            names = ", ".join(recipes.MIXED)
            raise RequestError(f"there is no recipe '{recipe}'; there are {names} and fit")
        return recipes.mixed(recipe, group, default)
    if quantize or q_bits or q_group_size or q_mode or method:
        bits = int(q_bits) if q_bits else None
        made = recipes.uniform(bits, group, q_mode or "affine", default)
        if method is None:
            return made
        from mlx_onevision.convert.calibration import require_spec

        assert made.language is not None
        require_spec(method, made.language)
        return replace(made, name=f"{method}-{made.name}")
    if vision is not None:
        return recipes.Recipe(f"vision-{vision}-bit", None, recipes.vision_spec(vision))
    return None


def require_usage(options: dict[str, Any]) -> None:
    """Raises UsageError for options that contradict each other, or need another one."""
    if reason := next(_refusals(SimpleNamespace(**options)), None):
        raise click.UsageError(reason)


def _refusals(given: SimpleNamespace) -> Iterator[str]:
    recipe, rules, upload, fit = given.recipe, given.rules, given.upload_repo, given.recipe == "fit"
    if recipe and rules:
        yield "Give --recipe or --rules, not both"
    if (recipe or rules) and (given.q_bits or given.q_mode not in (None, "affine")):
        yield "A recipe has bits and modes of its own; drop --q-bits and --q-mode"
    if rules and given.q_group_size:
        yield "The rules name group sizes themselves; drop --q-group-size"
    if given.quantize and given.folder is not None and str(given.folder) in BITS:
        yield f"--quantize takes no number here; give --q-bits {given.folder}"
    if fit != (given.memory is not None):
        yield "--recipe fit and --memory belong together"
    if given.context and not fit:
        yield "--context is for --recipe fit"
    if fit and (given.q_group_size or given.quantize_vision):
        yield "fit chooses by itself; drop the other options of quantizing"
    if (given.private or given.create_pr) and not upload:
        yield "--private and --create-pr need --upload-repo"
    if upload and not HUB_ID.fullmatch(upload):
        yield f"'{upload}' is not a repository's id, such as name/model"
    if given.method and (recipe or rules or given.dequantize):
        yield "--method quantizes all alike; drop --recipe, --rules or --dequantize"
    if given.adapter and given.method:
        yield "--method calibrates the source's weights; fuse --adapter first, into a folder"
    if given.compare and (given.folder or given.mlx_path):
        yield "--compare writes no model; leave FOLDER out"
    if given.compare:
        for name in (name for name in WRITING if getattr(given, name)):
            yield f"--compare chooses and removes by itself; drop --{name.replace('_', '-')}"
    if given.compare and given.verify is False:
        yield "--compare measures; drop --no-verify"
    if given.plot and (given.verify is False or given.dry_run):
        yield "--plot draws the measured loss; drop --no-verify or --dry-run"


def either(given: Given | None, option: Given | None, name: str, flag: str) -> Given | None:
    """What was given as an argument, or as the option that means the same.

    Raises:
        click.UsageError: where both were.
    """
    if given is not None and option is not None:
        raise click.UsageError(f"Give {name} or {flag}, not both")
    return option if given is None else given


def default_target(model: str, recipe: Recipe | None, dequantize: bool, dtype: str | None) -> Path:
    """The folder where none is named, in the current one: ``llava-onevision-...-4bit``."""
    from mlx_onevision.checkpoint.hub import repository_of

    name = repository_of(model) or Path(model).expanduser().resolve().name
    kind = dtype or ("dequantized" if dequantize else "mlx")
    kind = recipe.name if recipe is not None else kind
    return Path(f"{name.rpartition('/')[2]}-{kind}")


def command_of(model: str, target: Path, plot: Path | None = None) -> str:
    """What was typed, for the model card, without anybody's folders."""
    words = ["mlx-onevision"]
    for word in sys.argv[1:] if "convert" in sys.argv[1:2] else ["convert", model, target.name]:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        # What will be written is not there yet, and may look like a repository's id.
        is_path = value.startswith(("/", "~", ".")) or Path(value) in (target, plot)
        if value and (is_path or Path(value).exists()):
            value = Path(value).name
        words.append(f"{flag}{equals}{value}")
    return shlex.join(words)


def compared_recipes(names: str, group_size: str | None, vision: str | None) -> list[Recipe]:
    """The recipes of ``--compare``: bits of the language model, or names, between commas."""
    from mlx_onevision.checkpoint.recipes import MIXED

    found: dict[str, Recipe] = {}
    for name in (word.strip() for word in names.split(",")):
        bits = name if name in BITS else None
        if not bits and name not in MIXED:
            known = ", ".join((*BITS, *MIXED))
            raise RequestError(f"there is no recipe '{name}' to compare; there are {known}")
        recipe = None if bits else name
        made = recipe_of(False, bits, group_size, None, vision, recipe, None)
        assert made is not None  # bits, or a recipe
        found[name] = made
    return list(found.values())
