# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""How the loss of a run fell, from its log: as an image, and as a table for a model card."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mlx_onevision.errors import RequestError
from mlx_onevision.files import replacing

LOG = "log.jsonl"
ROWS, WIDTH = 12, 30  # of the table; characters of its longest bar


def draw_curve(log: Path, image: Path) -> None:
    """Draws the losses of a log's lines, in training and in validation, by their steps.

    image : its name says its format.

    Raises:
        RequestError: where it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("valid_loss", "validation")):
        if points := _losses(log, key):
            axes.plot(*zip(*points, strict=True), label=label, marker="." * (key != "loss"))
    axes.set(xlabel="step", ylabel="loss of a token")
    axes.legend()
    try:
        with replacing(image) as file:
            figure.savefig(file, format=image.suffix[1:].lower(), dpi=150)
    except OSError as error:
        raise RequestError(f"{image.name} cannot be written: {error.strerror}") from None


def curve_table(log: Path) -> str | None:
    """In Markdown: mean losses over equal numbers of steps, with bars, and the last validation loss
    within them. None where there is no such log.
    """
    try:
        losses, measured = (_losses(log, key) for key in ("loss", "valid_loss"))
    except (OSError, ValueError, TypeError, KeyError):  # a file of that name of something else
        return None
    if not losses:
        return None
    rows, before = ["| step | loss | validation | |", "|---|---|---|---|"], 0
    parts = [part for part in np.array_split(np.array(losses), ROWS) if len(part)]
    means = [float(part[:, 1].mean()) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    for part, mean in zip(parts, means, strict=True):
        step = int(part[-1, 0])
        within = [f"{value:.4f}" for at, value in measured if before < at <= step]
        bar = "█" * round(WIDTH * mean / (max(finite) or 1)) if mean in finite else ""
        rows.append(f"| {step} | {mean:.4f} | {(within or [''])[-1]} | {bar} |")
        before = step
    return "\n".join(rows)


def _losses(log: Path, key: str) -> list[tuple[int, float]]:
    """Steps, and what each line has under ``key``."""
    lines: list[Any] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]
