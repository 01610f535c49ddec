"""The result of a conversion in numbers, and its loss as tables for people and model cards."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_onevision.config.quantization import ModuleQuantization

if TYPE_CHECKING:
    from mlx_onevision.convert.loss.metrics import DivergenceStats, Loss

Row = tuple[str, ...]


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion makes, or would make.

    source : the Hub's id or the folder's name; ``revision`` the Hub's commit.
    nbytes : of the weights. ``values`` is how many numbers they stand for, padding left out.
    quantized : how many matrices there are of each quantization, in words.
    specs : the quantization of each quantized module, by the name that is written.
    skipped : modules that the recipe would have quantized, whose width does not divide into groups.
    padded : the width that the tower's MLPs were padded to; None if they were not.
    files : the sizes of all files that are written; of a plan, of the weights alone.
    download : bytes that are not on this machine yet; ``seconds`` : of writing and checking.
    adapter : the name of the adapter that was fused, and its settings.
    """

    source: str
    revision: str | None
    target: Path
    recipe: str
    dtype: str
    nbytes: int
    values: int
    bits_per_weight: float
    shards: int
    quantized: dict[str, int]
    specs: dict[str, ModuleQuantization]
    skipped: tuple[str, ...]
    padded: int | None
    files: dict[str, int]
    version: str
    download: int = 0
    seconds: float = 0.0
    adapter: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        values = dataclasses.asdict(self)
        return values | {"target": str(self.target), "skipped": list(self.skipped)}

    @property
    def weights(self) -> str:
        """Size and files of the weights, in words."""
        count = "1 file" if self.shards == 1 else f"{self.shards} files"
        return f"{size(self.nbytes)} in {count}"


def size(nbytes: float) -> str:
    """Bytes as a person reads them: decimal, as file browsers on a Mac count."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.{1 if factor < 1e9 else 2}f} {unit}"
    return f"{nbytes:,.0f} bytes"


def overview(summary: ConversionSummary, planned: bool = False) -> str:
    """Lines of what was converted, or would be where it is only ``planned``."""
    weights = summary.weights
    rows = [
        ("source", summary.source + (f" at {summary.revision}" if summary.revision else "")),
        ("download", size(summary.download)) if planned else ("", ""),
        ("to write" if planned else "folder", str(summary.target)),
        ("weights", f"{weights}, {summary.bits_per_weight:.2f} bits a weight"),
        ("recipe", summary.recipe + (f", the rest {summary.dtype}" if summary.quantized else "")),
        *(("", f"{number} matrices with {spec}") for spec, number in summary.quantized.items()),
    ]
    if summary.padded:
        rows.append(("", f"the tower's MLPs padded with zeros to a width of {summary.padded}"))
    if summary.skipped:
        skipped = f"{len(summary.skipped)} matrices not quantized"
        rows.append(("", f"{skipped}, whose width has no whole groups"))
    return "\n".join(f"{name:<10} {text}".rstrip() for name, text in rows if text)


def table(loss: "Loss", layers: bool = True) -> str:
    """One loss: its numbers, and the error after every layer or after the last alone."""
    stats = [f for f in (loss.all, loss.conversations, loss.texts) if f is not None]
    head = ("", "positions", "KL mean", "KL 99 %", "KL max", "same top token")
    blocks = [
        _aligned([head, *(_stats_row(f) for f in stats)]),
        "KL divergence in nats a position, of the next-token distribution from the source's.",
        _aligned(_summary(loss), right=False),
    ]
    if layers:
        layer_rows = [
            (
                layer.part + (f" {layer.number}" if layer.part != "projector" else ""),
                f"{layer.error:.2%}",
            )
            for layer in loss.layers
        ]
        blocks += [
            _aligned([("layer", "relative error"), *layer_rows]),
            "Errors accumulate: each layer is fed what the layers below it gave.",
        ]
    return "\n\n".join(blocks) + "\n"


def comparison(losses: Sequence[tuple[str, "Loss"]]) -> str:
    """Several recipes beside each other, by their names."""
    head = ("recipe", "bits a weight", "weights", "KL mean", "KL 99 %", "same top token", "memory")
    rows: list[Row] = []
    for name, loss in losses:
        bits, weights = f"{loss.bits_per_weight:.2f}", size(loss.weights_bytes)
        _, _, mean, p99, _, same = _stats_row(loss.all)
        rows.append((name, bits, weights, mean, p99, same, size(loss.memory.total)))
    return _aligned([head, *rows]) + "\n"


def _stats_row(stats: "DivergenceStats") -> Row:
    divergences = (stats.kl_mean, stats.kl_p99, stats.kl_max)
    numbers = ("0" if kl == 0 else f"{kl:.2e}" for kl in divergences)
    return (stats.name, str(stats.positions), *numbers, f"{stats.top1_agreement:.2%}")


def _summary(loss: "Loss") -> list[Row]:
    weights, source = size(loss.weights_bytes), size(loss.source_weights_bytes)
    memory = f"{size(loss.memory.total)} at {loss.memory.tokens} tokens"
    rows = [
        ("bits a weight", f"{loss.bits_per_weight:.2f}"),
        ("weights", f"{weights} (source {source})"),
        ("on disk", size(loss.disk_bytes)),
        ("memory, estimated", f"{memory}, one image of 10 tiles"),
    ]
    if loss.tower_cosine_mean is not None and loss.tower_cosine_min is not None:
        cosine = f"{loss.tower_cosine_mean:.6f} mean, {loss.tower_cosine_min:.6f} least"
        rows.append(("cosine of tower features", cosine))
    if loss.perplexity_ratio is not None:
        both = f"({loss.source_perplexity:.4g} to {loss.result_perplexity:.4g})"
        ratio = f"{loss.perplexity_ratio:.4f} times the source's {both}"
        rows.append(("perplexity of texts", ratio))
    if loss.layers:
        rows.append(("error after the last layer", f"{loss.layers[-1].error:.2%}"))
    own = loss.dtype != "float32"
    rows.append(("computed in", loss.dtype + (", whose rounding counts, too" if own else "")))
    return rows


def _aligned(rows: Sequence[Row], right: bool = True) -> str:
    """Columns two spaces apart; the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for first, *others in rows:
        padded = zip(others, widths[1:], strict=True)
        cells = [cell.rjust(width) if right else cell for cell, width in padded]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
