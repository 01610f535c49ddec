"""``mlx-onevision convert``: what a person says, and what a person is told."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.hub import HUB_ID

if TYPE_CHECKING:
    from mlx_onevision.convert.facts import Facts
    from mlx_onevision.recipes import Recipe

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
BITS = ("2", "3", "4", "5", "6", "8")


class Bytes(click.ParamType):
    """A number of bytes: ``5GB``, ``512MiB``, ``1000``.

    binary : GB means GiB, as it does of a computer's memory and not of a disk.
    """

    name = "size"

    def __init__(self, binary: bool = False) -> None:
        self._binary = binary

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
        if found is None or found[2].upper() not in UNITS:
            self.fail(f"'{value}' is not a size such as 8GB", param, ctx)
        unit = found[2].upper()
        unit = unit.replace("B", "iB").upper() if self._binary and len(unit) == 2 else unit
        number = int(float(found[1]) * UNITS[unit])
        if not 0 < number < 2**60:
            self.fail(f"'{value}' is not a possible size", param, ctx)
        return number


@click.command(short_help="Write a model in MLX's layout, smaller if you like.")
@click.argument("model", required=False)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--hf-path", "--model", "hf_path", metavar="MODEL", help="MODEL, as an option.")
@click.option(
    "--mlx-path", "--output", "mlx_path", type=click.Path(path_type=Path), help="FOLDER, likewise."
)
@click.option("--revision", metavar="REV", help="A branch, tag or commit of a Hugging Face model.")
@click.option("-q", "--quantize", is_flag=True, help="Pack the weights; 4 bits unless told.")
@click.option("--q-bits", type=click.Choice(BITS), help="Bits of the language model.")
@click.option("--q-group-size", type=click.Choice(["32", "64", "128"]), help="Values a scale.")
@click.option(
    "--q-mode",
    type=click.Choice(["affine", "mxfp4", "nvfp4", "mxfp8"]),
    help="How the language model is packed. Default: affine.",
)
@click.option(
    "--quantize-vision",
    type=click.Choice([*BITS, "none"]),
    help="Bits of the projector and the tower. Default: 8 when the language model is packed.",
)
@click.option(
    "--recipe",
    "--quant-predicate",
    metavar="NAME",
    help="mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6; or fit, for the best one that fits.",
)
@click.option(
    "--memory", type=Bytes(binary=True), metavar="SIZE", help="For fit: the memory of the Mac."
)
@click.option(
    "--context",
    type=click.IntRange(1, 10**7),
    metavar="N",
    help="For fit: tokens of the longest prompt. Default: those of one 10-tile image.",
)
@click.option(
    "--rules",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A recipe of your own, in JSON.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="The type of what is not packed. Default: the source's.",
)
@click.option("-d", "--dequantize", is_flag=True, help="Unpack what is packed.")
@click.option(
    "--shard-size",
    type=Bytes(),
    default=5 << 30,
    metavar="SIZE",
    help="The most that one file holds. Default: 5 GiB.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model that is in FOLDER.")
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded and written; do not.")
@click.option("--upload-repo", metavar="REPO", help="Upload the result to this repository.")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@click.option("--create-pr", is_flag=True, help="Upload as a pull request.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(
    model: str | None,
    folder: Path | None,
    hf_path: str | None,
    mlx_path: Path | None,
    revision: str | None,
    dtype: str | None,
    dequantize: bool,
    shard_size: int,
    overwrite: bool,
    dry_run: bool,
    upload_repo: str | None,
    private: bool,
    create_pr: bool,
    as_json: bool,
    **packing: Any,
) -> None:
    """Write MODEL into FOLDER in MLX's layout, which mlx-vlm and LM Studio read too.

    MODEL is a folder, a Hugging Face id, 0.5b, 7b, 72b or demo. FOLDER is new: it appears when it
    is whole and checked.

    \b
    mlx-onevision convert 7b -q
    mlx-onevision convert 7b --recipe fit --memory 16GB --dry-run
    mlx-onevision convert ./my-model my-model-3bit --recipe mixed_3_6
    """
    if hf_path and model and folder is None:  # then the one argument is the folder
        model, folder = None, Path(model)
    model = _either(model, hf_path, "MODEL", "--model")
    target = _either(folder, mlx_path, "FOLDER", "--mlx-path")
    if model is None:
        raise click.UsageError("Say which MODEL to convert")
    _require_usage(packing, upload_repo, private, create_pr)

    from mlx_onevision.convert import conversion, fit, sources
    from mlx_onevision.convert.staging import require_target

    # Whatever can be refused is, before anything is downloaded.
    fitting = packing["recipe"] == "fit"
    recipe = None if fitting else _recipe(**packing)
    if target is None and not fitting:
        target = _default_target(model, recipe, dequantize, dtype)
    if target is not None and not dry_run:
        require_target(target, overwrite)
    finder = sources.outline(model, revision) if dry_run else _found(sources, model, revision)
    with finder as source:
        why: str | None = None
        if fitting:
            fitted = fit.choose(source.folder, packing["memory"], packing["context"], dtype)
            recipe, why = fitted.recipe, fitted.why
        if target is None:
            target = _default_target(model, recipe, dequantize, dtype)
        planned = conversion.prepare(
            source, target, recipe, dtype, dequantize, shard_size, overwrite or dry_run
        )
        facts = planned.facts
        if why:
            click.echo(why, err=True)
        if not dry_run:
            with _progress(target.name) as progress:
                facts = conversion.write(
                    planned, overwrite, progress, command=_command(model, target)
                )
    uploaded = None
    if upload_repo and not dry_run:
        from mlx_onevision.convert.upload import upload

        uploaded = upload(facts.target, upload_repo, private=private, create_pr=create_pr)
    if as_json:
        extra = {"dry_run": dry_run, "uploaded": uploaded, "why": why}
        click.echo(json.dumps({**facts.to_dict(), **extra}))
    else:
        click.echo(report(facts, dry_run))
        if uploaded:
            click.echo(f"uploaded   {uploaded}")


def report(facts: Facts, planned: bool = False) -> str:
    """What a person reads in the end, or with ``--dry-run`` instead of it."""
    from mlx_onevision.convert.facts import size

    count = "1 file" if facts.shards == 1 else f"{facts.shards} files"
    rows = [
        ("source", facts.source + (f" at {facts.revision}" if facts.revision else "")),
        ("download", size(facts.download)) if planned else ("", ""),
        ("to write" if planned else "folder", str(facts.target)),
        ("weights", f"{size(facts.nbytes)} in {count}, {facts.bits_per_weight:.2f} bits a weight"),
        ("recipe", facts.recipe + (f", the rest {facts.dtype}" if facts.packed else "")),
        *(("", f"{number} matrices with {way}") for way, number in facts.packed.items()),
    ]
    if facts.padded:
        rows.append(("", f"the tower's MLPs padded with zeros to a width of {facts.padded}"))
    if facts.left:
        rows.append(("", f"{len(facts.left)} matrices left, whose width has no whole groups"))
    return "\n".join(f"{name:<10} {text}".rstrip() for name, text in rows if text)


def _recipe(
    quantize: bool,
    q_bits: str | None,
    q_group_size: str | None,
    q_mode: str | None,
    quantize_vision: str | None,
    recipe: str | None,
    rules: Path | None,
    **_: Any,
) -> Recipe | None:
    """The recipe that the options ask for; None where they ask for none."""
    from dataclasses import replace

    from mlx_onevision import recipes

    vision = None if quantize_vision in (None, "none") else int(quantize_vision or 0)
    group = int(q_group_size) if q_group_size else None
    if rules is not None:
        made = recipes.from_file(rules)
        if quantize_vision is not None:
            made = replace(made, vision=recipes.vision_packing(vision))
        return made
    default = recipes.VISION_BITS if quantize_vision is None else vision
    if recipe is not None:
        return recipes.mixed(recipe, group, default)
    if quantize or q_bits or q_group_size or q_mode:
        bits = int(q_bits) if q_bits else None
        return recipes.uniform(bits, group, q_mode or "affine", default)
    if vision is not None:
        return recipes.Recipe(f"vision-{vision}-bit", None, recipes.vision_packing(vision))
    return None


def _require_usage(
    packing: dict[str, Any], upload_repo: str | None, private: bool, create_pr: bool
) -> None:
    """Refuses options that say two things, or nothing."""
    recipe, rules = packing["recipe"], packing["rules"]
    if recipe and rules:
        raise click.UsageError("Give --recipe or --rules, not both")
    if (recipe or rules) and (packing["q_bits"] or packing["q_mode"] not in (None, "affine")):
        raise click.UsageError("A recipe has bits and modes of its own; drop --q-bits and --q-mode")
    if rules and packing["q_group_size"]:
        raise click.UsageError("The rules name group sizes themselves; drop --q-group-size")
    if (recipe == "fit") != (packing["memory"] is not None):
        raise click.UsageError("--recipe fit and --memory belong together")
    if packing["context"] and recipe != "fit":
        raise click.UsageError("--context is for --recipe fit")
    if recipe == "fit" and (packing["q_group_size"] or packing["quantize_vision"]):
        raise click.UsageError("fit chooses by itself; drop the other options of quantizing")
    if (private or create_pr) and not upload_repo:
        raise click.UsageError("--private and --create-pr need --upload-repo")
    if upload_repo and not HUB_ID.fullmatch(upload_repo):
        raise click.UsageError(f"'{upload_repo}' is not a repository's id, such as name/model")


def _either(given: Any, option: Any, name: str, flag: str) -> Any:
    if given is not None and option is not None:
        raise click.UsageError(f"Give {name} or {flag}, not both")
    return option if given is None else given


def _default_target(model: str, recipe: Recipe | None, dequantize: bool, dtype: str | None) -> Path:
    """A folder here, called after the model and what becomes of it."""
    from mlx_onevision.hub import repository_of

    name = repository_of(model) or Path(model).expanduser().resolve().name
    kind = dtype or ("dequantized" if dequantize else "mlx")
    kind = recipe.name if recipe is not None else kind
    return Path(f"{name.rpartition('/')[2]}-{kind}")


def _command(model: str, target: Path) -> str:
    """What was typed, for the model card, without anybody's folders."""
    words = sys.argv[1:] if "convert" in sys.argv[1:2] else ["convert", model, target.name]
    return shlex.join(["mlx-onevision", *(Path(w).name if _is_path(w) else w for w in words)])


def _is_path(word: str) -> bool:
    return word.startswith(("/", "~", ".")) or Path(word).exists()


@contextmanager
def _found(sources: Any, model: str, revision: str | None) -> Iterator[Any]:
    yield sources.find(model, revision)


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, once it takes longer than a moment."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, disable=None, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
