"""The loss of a run as a curve."""

import json
from importlib.util import find_spec
from pathlib import Path

from mlx_onevision.errors import RequestError


def check_plots() -> None:
    """RequestError where there is nothing that draws curves."""
    if find_spec("matplotlib") is None:
        raise RequestError("--report needs the extra plot; pip install 'mlx-onevision[plot]'")


def draw_curve(log: Path, image: Path) -> None:
    """Draws the losses of a log's lines, in training and in validation, by their steps."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("valid_loss", "validation")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." * (key != "loss"))
    axes.set(xlabel="step", ylabel="loss of a token")
    axes.legend()
    figure.savefig(image, dpi=150)
