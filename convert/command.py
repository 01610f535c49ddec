"""``mlx-onevision convert``: options in, a report out."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.loading import progress_bar
from mlx_onevision.cli.options import option
from mlx_onevision.cli.values import Number
from mlx_onevision.convert import options
from mlx_onevision.sampling.ranges import Range

if TYPE_CHECKING:
    from mlx_onevision.checkpoint.recipes import Recipe
    from mlx_onevision.convert.conversion import Conversion
    from mlx_onevision.convert.hub import Source
    from mlx_onevision.convert.loss.metrics import Loss
    from mlx_onevision.convert.report import ConversionSummary


FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("model", required=False)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--hf-path", "--model", "hf_path", metavar="MODEL", help="MODEL, as an option.")
@click.option(
    "--mlx-path", "--output", "mlx_path", type=click.Path(path_type=Path), help="FOLDER, likewise."
)
@option("revision")
@click.option("-q", "--quantize", is_flag=True, help="Quantize the weights; to 4 bits by default.")
@click.option("--q-bits", type=click.Choice(options.BITS), help="Bits of the language model.")
@click.option("--q-group-size", type=click.Choice(["32", "64", "128"]), help="Values a scale.")
@click.option(
    "--q-mode",
    type=click.Choice(["affine", "mxfp4", "nvfp4", "mxfp8"]),
    help="How the language model is quantized. Default: affine.",
)
@click.option(
    "--quantize-vision",
    type=click.Choice([*options.BITS, "none"]),
    help="Bits of the projector and the tower. Default: 8 when the language model is quantized.",
)
@click.option(
    "--recipe",
    "--quant-predicate",
    metavar="NAME",
    help="mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6; or fit, for the best one that fits.",
)
@click.option(
    "--memory",
    type=options.Bytes(binary=True),
    metavar="SIZE",
    help="For fit: the memory of the Mac.",
)
@click.option(
    "--context",
    type=Number(Range(ge=1, le=10**7, whole=True)),
    metavar="N",
    help="For fit: tokens of the longest prompt. Default: those of one 10-tile image.",
)
@click.option("--rules", type=FILE, metavar="FILE", help="A recipe of your own, in JSON.")
@click.option(
    "--method",
    type=click.Choice(["gptq", "awq"]),
    help="Calibrate the language model's quantization on drawn images, by mlx-lm. Holds the "
    "whole unquantized model in memory, and takes long.",
)
@option("dtype", help="The type of what is not quantized. Default: the source's.")
@click.option("-d", "--dequantize", is_flag=True, help="Dequantize what is quantized.")
@click.option(
    "--shard-size",
    type=options.Bytes(),
    metavar="SIZE",
    help="The most that one file holds. Default: 5 GiB.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Measure what was lost against the source. Default: where the source fits into memory.",
)
@option(
    "plot", help="Draw the loss per layer; of --compare, quality over size. Needs the extra plot."
)
@click.option(
    "--compare",
    metavar="LIST",
    help="Measure recipes beside each other (2,3,4,6,8 or names); no model is kept.",
)
@option(
    "adapter",
    help="Fuse an adapter: a folder or a Hub id. The reported loss compares with source plus "
    "adapter, so it shows the effect of quantizing only.",
)
@click.option("--overwrite", is_flag=True, help="Replace the model that is in FOLDER.")
@option(
    "dry_run",
    help="Only say what would be downloaded and written. An adapter is downloaded all the same.",
)
@click.option("--upload-repo", metavar="REPO", help="Upload the result to this repository.")
@click.option("--private", is_flag=True, help="Make a new repository a private one.")
@click.option("--create-pr", is_flag=True, help="Upload as a pull request.")
@option("as_json")
def convert(
    model: str | None,
    folder: Path | None,
    hf_path: str | None,
    mlx_path: Path | None,
    revision: str | None,
    dtype: str | None,
    dequantize: bool,
    shard_size: int | None,
    verify: bool | None,
    plot: Path | None,
    compare: str | None,
    adapter: str | None,
    overwrite: bool,
    dry_run: bool,
    upload_repo: str | None,
    private: bool,
    create_pr: bool,
    as_json: bool,
    **quantization: Any,
) -> None:
    """Write MODEL into FOLDER in MLX's layout, which mlx-vlm and LM Studio read too.

    MODEL is a folder, a Hugging Face id, 0.5b, 7b, 72b or demo. FOLDER is new: it appears when it
    is whole and checked.

    \b
    mlx-onevision convert 7b -q
    mlx-onevision convert 7b --recipe fit --memory 16GB --dry-run
    mlx-onevision convert ./my-model my-model-3bit --recipe mixed_3_6
    mlx-onevision convert 0.5b --compare 2,3,4,6,8 --plot curve.png
    """
    if hf_path and model and folder is None:  # then the one argument is the folder
        model, folder = None, Path(model)
    model = options.either(model, hf_path, "MODEL", "--model")
    target = options.either(folder, mlx_path, "FOLDER", "--mlx-path")
    if model is None:
        raise click.UsageError("Say which MODEL to convert")
    options.require_usage(click.get_current_context().params | {"folder": target})

    from mlx_onevision.checkpoint.hub import resolve_adapter
    from mlx_onevision.convert import conversion, fit, hub
    from mlx_onevision.convert import report as reports
    from mlx_onevision.convert.loss import plot as plots
    from mlx_onevision.convert.staging import require_target

    # A folder is refused, and a model for which no recipe fits, before weights are downloaded.
    if compare:
        group_size, vision = quantization["q_group_size"], quantization["quantize_vision"]
        compared = options.compared_recipes(compare, group_size, vision)
        _compare(hub.find(model, revision), compared, dtype, plot, as_json)
        return
    fitting = quantization["recipe"] == "fit"
    recipe = None if fitting else options.recipe_of(**quantization)
    if target is None and not fitting:
        target = options.default_target(model, recipe, dequantize, dtype)
    if target is not None and not dry_run:
        require_target(target, overwrite)
    loss = warning = why = uploaded = None
    with ExitStack() as stack:
        outline = None
        if dry_run or fitting:
            outline = stack.enter_context(hub.outline(model, revision))
        if fitting and outline:
            memory, context = quantization["memory"], quantization["context"]
            fitted = fit.choose(outline.folder, memory, context, dtype, dequantize)
            recipe, why = fitted.recipe, fitted.why
        if target is None:
            target = options.default_target(model, recipe, dequantize, dtype)
            if not dry_run:
                require_target(target, overwrite)
        fused = None if adapter is None else resolve_adapter(adapter)
        source = outline if outline and dry_run else hub.find(model, revision)
        shards = shard_size or conversion.SHARD_BYTES
        planned = conversion.prepare(
            source, target, recipe, dtype, dequantize, shards, overwrite or dry_run, fused
        )
        summary = planned.summary
        if why:
            click.echo(why, err=True)
        if not dry_run:
            command = options.command_of(model, target, plot)
            if quantization["method"]:
                from mlx_onevision.convert.calibration import calibrated

                planned = calibrated(planned, quantization["method"])
            asked = verify if plot is None else True
            summary, loss, warning = _write(planned, asked, overwrite, command, fused)
    if warning:
        click.echo(f"warning: {warning}", err=True)
    if plot and loss:
        plots.plot(loss, plot)
    if upload_repo and not dry_run:
        uploaded = hub.upload(summary.target, upload_repo, private=private, create_pr=create_pr)
    if as_json:
        click.echo(
            json.dumps(
                {
                    **summary.to_dict(),
                    "dry_run": dry_run,
                    "uploaded": uploaded,
                    "why": why,
                    "warning": warning,
                    "loss": loss.to_dict() if loss else None,
                }
            )
        )
    else:
        click.echo(reports.overview(summary, dry_run))
        if loss:
            click.echo("\n" + reports.table(loss, layers=False), nl=False)
        if uploaded:
            click.echo(f"uploaded   {uploaded}")


def _write(
    planned: Conversion,
    verify: bool | None,
    overwrite: bool,
    command: str,
    adapter: Path | None,
) -> tuple[ConversionSummary, Loss | None, str | None]:
    """Writes what is planned, and measures its loss.

    verify : None measures where the source fits into memory.

    Returns the summary, the loss, and a warning: of a loss that is too high, or was not measured.
    """
    from mlx_onevision.convert import conversion
    from mlx_onevision.convert import verify as verification

    source, name = planned.source.folder, planned.target.name
    refused = verification.too_large(source) if verify is None else None
    if verify is False or refused:
        with progress_bar(name) as progress:
            return conversion.write(planned, overwrite, progress, None, command), None, refused
    with progress_bar(name) as progress, progress_bar(f"measuring {name}", "steps") as steps:
        unchanged = verification.is_unchanged(planned)
        measure = verification.Verification(planned.summary, unchanged, steps, adapter)
        summary = conversion.write(planned, overwrite, progress, measure, command)
    return summary, measure.loss, measure.warning


def _compare(
    source: Source, asked: list[Recipe], dtype: str | None, plot: Path | None, as_json: bool
) -> None:
    from mlx_onevision.convert.loss.plot import plot_compare
    from mlx_onevision.convert.report import comparison
    from mlx_onevision.convert.verify import compare

    with progress_bar("comparing", "steps") as progress:
        losses = compare(source, asked, dtype, progress)
    if plot:
        plot_compare(losses, plot)
    if as_json:
        found = [{"recipe": name, **loss.to_dict()} for name, loss in losses]
        click.echo(json.dumps({"source": source.base or source.name, "compared": found}))
    else:
        click.echo(comparison(losses), nl=False)
