"""``mlx-onevision train``: rows of conversations in, an adapter out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import COUNT, FRAMES, option, options
from mlx_onevision.cli.values import Number, Plot
from mlx_onevision.files import cache_folder
from mlx_onevision.sampling.ranges import Range

if TYPE_CHECKING:
    from mlx_onevision.train.parts import Method, Part

FILE = click.Path(path_type=Path)


@click.command()
@option("model", required=True, help="As for generate.")
@click.option(
    "--data",
    required=True,
    type=FILE,
    metavar="FILE|FOLDER",
    help="One conversation a line (.jsonl), a list of them (.json), or a folder with train.jsonl.",
)
@click.option("--valid", type=FILE, metavar="FILE", help="Rows to measure the loss on only.")
@click.option(
    "--adapter", "output", required=True, type=FILE, metavar="FOLDER", help="What to write."
)
@click.option(
    "--method",
    type=click.Choice(["lora", "dora", "full"]),
    default="lora",
    show_default=True,
    help="Low-rank terms, or the weights themselves.",
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(["language", "projector", "tower"]),
    multiple=True,
    help="What to train; may be given again. Default: the language model.",
)
@click.option("--rank", type=Number(COUNT), default=16, show_default=True, metavar="N")
@click.option(
    "--scale",
    type=Number(Range(gt=0)),
    default=2.0,
    show_default=True,
    help="Of the low-rank terms.",
)
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="The share of a low-rank term's inputs that is left out at random.",
)
@click.option(
    "--layers", type=Number(COUNT), metavar="N", help="The last N of the language model alone."
)
@click.option("--steps", type=Number(COUNT), metavar="N", help="Default: what --epochs takes.")
@click.option("--epochs", type=Number(Range(gt=0)), default=1.0, show_default=True)
@click.option("--batch", type=Number(COUNT), default=1, show_default=True, help="Rows.")
@click.option(
    "--accumulate", type=Number(COUNT), default=1, show_default=True, help="Batches a step."
)
@click.option("--learning-rate", type=Number(Range(ge=0)), default=1e-4, show_default=True)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    default="cosine",
    show_default=True,
    help="Of the learning rate, after --warmup steps.",
)
@click.option(
    "--warmup", type=Number(Range(ge=0, whole=True)), default=0, show_default=True, help="Steps."
)
@click.option("--weight-decay", type=Number(Range(ge=0)), default=0.0, show_default=True)
@click.option(
    "--clip",
    type=Number(Range(ge=0)),
    default=1.0,
    show_default=True,
    help="Scale longer gradients down to this norm. 0: gradients are not scaled down.",
)
@option("seed", default=0, show_default=True, help="Of the order of rows and of new weights.")
@click.option("--valid-every", type=Number(COUNT), default=50, show_default=True, help="Steps.")
@click.option(
    "--patience",
    type=Number(COUNT),
    metavar="N",
    help="End after N measurements of --valid without a lower loss.",
)
@click.option(
    "--save-every",
    type=Number(COUNT),
    default=50,
    show_default=True,
    help="Steps after which a run that is stopped goes on; the same command does.",
)
@click.option("--report", type=Plot(), metavar="FILE.png", help="Draw the loss.")
@option("dry_run", help="Show three rows as the model sees them, and end.")
@click.option("--max-length", type=Number(COUNT), metavar="N", help="Tokens of a row, at most.")
@options("tiling", *FRAMES, "visual_tokens")
@click.option(
    "--cache", type=FILE, metavar="FOLDER", help="For encoded media. Default: the user's cache."
)
@options("revision", "dtype", "quantize", "memory_limit")
def train(
    model: str,
    data: Path,
    valid: Path | None,
    output: Path,
    method: Method,
    parts: tuple[Part, ...],
    rank: int,
    scale: float,
    dropout: float,
    layers: int | None,
    steps: int | None,
    epochs: float,
    report: Path | None,
    dry_run: bool,
    max_length: int | None,
    cache: Path | None,
    revision: str | None,
    dtype: str | None,
    quantize: int | None,
    memory_limit: float | None,
    **others: Any,
) -> None:
    """Fine-tune a model on conversations about your own images and videos.

    A row is an object with messages as generate takes them in Python, or LLaVA's conversations;
    paths are relative to the file. Loss is on what the assistant writes. The same command goes on
    where one was stopped.

    \b
    mlx-onevision train --model 0.5b --data parts.jsonl --adapter parts --dry-run
    mlx-onevision train --model ./7b-4bit --data parts/ --adapter out --epochs 3 --report loss.png
    mlx-onevision generate --model ./7b-4bit --adapter out --image part.jpg --prompt "Which part?"
    """
    from mlx_onevision.train import report as curve
    from mlx_onevision.train.loop import Settings
    from mlx_onevision.train.parts import Trained
    from mlx_onevision.train.train import Task, prepare
    from mlx_onevision.train.train import train as run

    media = {name: others.pop(name) for name in ("tiling", "num_frames", "fps", "start", "end")}
    media["visual_tokens"] = others.pop("visual_tokens")

    def say(line: str) -> None:
        click.echo(line, err=True)

    trained = Trained(method, parts or ("language",), rank, scale, dropout, layers)

    def task(count: int) -> Task:
        return Task(
            model=model,
            data=data,
            output=output,
            cache=cache or cache_folder("features"),
            valid=valid,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            memory_limit=memory_limit,
            media=media,
            longest=max_length,
            settings=Settings(trained=trained, steps=count, **others),
        )

    prepared = prepare(task(1), say)
    if dry_run:
        for row in prepared.dry_run():
            click.echo(row)
        return
    one = others["batch"] * others["accumulate"]
    count = steps or max(1, round(epochs * len(prepared.examples) / one))
    run(task(count), prepared, say, lambda line: say(progress(line, count)))
    say(f"The adapter is in {output}")  # where the curve cannot be drawn, too
    if report is not None:
        curve.draw_curve(output / curve.LOG, report)


def progress(line: Mapping[str, Any], steps: int) -> str:
    """A line of the log for people."""
    if "valid_loss" in line:
        return f"step {line['step']}/{steps}  validation loss {line['valid_loss']:.4f}"
    return (
        f"step {line['step']}/{steps}  loss {line['loss']:.4f}  {line['seconds']:.2f} s"
        f"  {line['tokens_per_second']:.0f} tok/s  {line['peak_memory_bytes'] / 1e9:.2f} GB"
    )
