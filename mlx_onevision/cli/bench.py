"""``mlx-onevision bench``: how fast a model answers here, beside the machine's limits and peers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import LOADING, gathered, option
from mlx_onevision.cli.values import Number, Output, listed
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.files import save
from mlx_onevision.sampling.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROWS = ("text", "image", "images", "video", "second", "batch")
PEERS = ("mlx-vlm", "transformers")


def some_of(known: Sequence[str]) -> Callable[..., tuple[str, ...]]:
    """The value of an option that takes some of ``known``, separated by commas."""

    def read(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
        given = tuple(part.strip() for part in (value or "").split(",") if part.strip())
        for name in given:
            if name not in known:
                raise click.BadParameter(f"{name!r} is none of {', '.join(known)}.")
        return tuple(dict.fromkeys(given))

    return read


@click.command()
@option("model", help="A folder, a Hugging Face id, 0.5b, 7b, 72b or demo.")
@click.option(
    "--size",
    type=click.Choice(["0.5b", "7b", "72b"]),
    help="Instead of a model: random weights of this size.",
)
@click.option(
    "--layers",
    type=Number(Range(ge=1, le=80, whole=True)),
    metavar="N",
    help="With --size, N layers of text.",
)
@click.option(
    "--runs",
    type=Number(Range(ge=1, le=1000, whole=True)),
    default=5,
    show_default=True,
    help="Of every row.",
)
@option(
    "max_tokens",
    type=Number(Range(ge=2, le=4096, whole=True)),
    default=128,
    show_default=True,
    help="The length of every answer.",
)
@click.option(
    "--rows",
    callback=some_of(ROWS),
    default=",".join(ROWS),
    metavar="LIST",
    help=f"Some of {','.join(ROWS)}. Default: all.",
)
@click.option(
    "--versus",
    callback=some_of(PEERS),
    metavar="LIST",
    help="Measure mlx-vlm, transformers or both on the same folder, in turn.",
)
@click.option(
    "--json", "as_json", type=Output(".json"), metavar="FILE.json", help="Write all numbers."
)
@option("plot", type=Output(".png"), help="Draw bars.")
@gathered("loading", *LOADING)
def bench(
    model: str | None,
    size: str | None,
    layers: int | None,
    runs: int,
    max_tokens: int,
    rows: tuple[str, ...],
    versus: tuple[str, ...],
    as_json: Path | None,
    plot: Path | None,
    loading: dict[str, Any],
) -> None:
    """Measure how fast a model answers, and how near that is to the machine's limits.

    \b
    mlx-onevision bench --size 0.5b
    mlx-onevision bench --model 7b --quantize 4 --rows image,batch
    """
    if (model is None) == (size is None):
        raise click.UsageError("Give either --size 0.5b, 7b or 72b, or --model MODEL")
    if layers and not size:
        raise click.UsageError("--layers cuts a --size; a --model has the layers that it has")
    if not rows:
        raise click.UsageError(f"--rows names no row; there are {', '.join(ROWS)}")
    revision, dtype, bits = (loading.pop(name) for name in ("revision", "dtype", "quantize"))
    if bits and "transformers" in versus:
        raise click.UsageError(
            "transformers cannot load MLX's quantized weights; drop --quantize, or it from --versus"
        )
    if versus and loading["adapter"] is not None:
        raise click.UsageError(
            f"--adapter is applied here alone, and {listed(versus, 'and')} would measure without "
            "it; merge it into the model with convert first, or leave one of the options out"
        )

    import shutil
    import tempfile

    from mlx_onevision.bench import checkpoint, measure, report
    from mlx_onevision.checkpoint import hub

    measure.require(versus)
    if loading["adapter"] is not None:  # the programs are started offline
        loading["adapter"] = str(hub.resolve_adapter(loading["adapter"]).absolute())

    def say(text: str) -> None:
        click.echo(f"bench: {text}", err=True)

    with tempfile.TemporaryDirectory(prefix="mlx-onevision-bench-") as scratch:
        place = Path(scratch)
        if size:
            name = f"{size}, random weights"
            name += f", {layers} layers" if layers else ""
            shape = checkpoint.SIZES[size]
            folder = checkpoint.make_random(
                place / "random", shape, layers=layers, dtype=dtype or "bfloat16", say=say
            )
        else:
            assert model is not None
            folder = hub.resolve(model, revision)
            name = folder.name if Path(model).is_dir() else model
        if bits or (dtype and not size):
            say("converting")
            folder = checkpoint.converted(
                place / "converted", folder, bits, None if size else dtype
            )
            name += f", {bits} bits" if bits else ""
            shutil.rmtree(place / "random", ignore_errors=True)  # as large as the model itself
        folder = checkpoint.without_end(place / "model", folder)
        numbers = measure.measure(
            folder, rows, versus, runs=runs, tokens=max_tokens, say=say, memory=loading
        )
    numbers = {"model": name, **numbers}
    if as_json:
        try:
            save(as_json, json.dumps(numbers, indent=1))
        except OSError as error:
            raise RequestError(f"{as_json.name} cannot be written: {error.strerror}") from None
    if plot:
        report.plot(numbers, plot)
    click.echo(report.table(numbers))
    if failed := measure.failed(numbers):
        raise OneVisionError(
            f"mlx-onevision did not answer {', '.join(failed)}; the table says why"
        )
