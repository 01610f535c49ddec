# pyright: reportUnknownMemberType=false
"""Plots of losses: over the layers of one model, and over the sizes of several.

matplotlib is an extra. Nothing of its global state is touched: no window, no current figure.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mlx_onevision.convert.loss.metrics import PARTS, Loss
from mlx_onevision.errors import RequestError
from mlx_onevision.files import replacing

Theme = Literal["light", "dark"]
THEMES: dict[str, dict[str, str]] = {
    "light": {"ground": "#ffffff", "ink": "#1f2328", "faint": "#d0d7de"},
    "dark": {"ground": "#0d1117", "ink": "#e6edf3", "faint": "#30363d"},
}
# Different in grey, too, and for people who do not see red or green.
COLOURS = {
    "light": {"tower": "#0969da", "projector": "#bc4c00", "language": "#6639ba"},
    "dark": {"tower": "#58a6ff", "projector": "#f0883e", "language": "#bc8cff"},
}
MARKS = {"tower": "o", "projector": "D", "language": "s"}
SUFFIXES = (".png", ".svg", ".pdf")
INCHES, DOTS = (7.2, 4.4), 150


def plot(loss: Loss, path: Path, theme: Theme = "light") -> None:
    """Draws the relative error after every layer into a .png, .svg or .pdf file.

    Raises:
        RequestError: when matplotlib is not installed, or for another kind of file.
    """
    figure, axes = _figure(path, theme)
    position, count = 0, len(loss.layers)
    ticks: list[int] = []
    names: list[str] = []
    step = next(n for n in (1, 2, 5, 10, 20, 50, count) if n * 14 >= count)
    for part in PARTS:
        layers = [layer for layer in loss.layers if layer.part == part]
        if not layers:
            continue
        places = range(position, position + len(layers))
        # An error of nothing at all has no place on a logarithmic axis.
        errors = [100 * layer.error or float("nan") for layer in layers]
        axes.plot(
            places, errors, color=COLOURS[theme][part], marker=MARKS[part], markersize=4, label=part
        )
        for place, layer in zip(places, layers, strict=True):
            if part == "projector" or layer.number % step == 0:
                ticks.append(place)
                names.append("P" if part == "projector" else str(layer.number))
        position += len(layers) + 1
    axes.set_xticks(ticks, names)
    axes.set(xlabel="layer (P: the projector)", ylabel="relative error of hidden states, %")
    axes.set_title(f"Loss per layer at {loss.bits_per_weight:.2f} bits a weight", fontsize=11)
    if any(layer.error for layer in loss.layers):
        _logarithmic(axes)
    else:
        axes.set_ylim(-1, 1)
        axes.text(0.5, 0.6, "no error at any layer", ha="center", transform=axes.transAxes)
    _finish(figure, axes, path, theme)


def plot_compare(losses: Sequence[tuple[str, Loss]], path: Path, theme: Theme = "light") -> None:
    """Draws mean KL divergence over the size of the weights, a point for each named recipe, all
    measured against one source, into a .png, .svg or .pdf file.

    Raises:
        RequestError: when matplotlib is not installed, for another kind of file, or for no losses.
    """
    if not losses:
        raise RequestError("there are no losses to compare; measure at least one recipe")
    figure, axes = _figure(path, theme)
    colours = COLOURS[theme]
    ordered = sorted(losses, key=lambda entry: (entry[1].weights_bytes, entry[1].all.kl_mean))
    largest = ordered[-1][1].weights_bytes
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    sizes = [loss.weights_bytes / scale for _, loss in ordered]
    # A loss of nothing at all has no place on a logarithmic axis; it is left to the table.
    found = [loss.all.kl_mean or float("nan") for _, loss in ordered]
    best: list[int] = []
    least = float("inf")
    for number, kl in enumerate(found):
        if kl < least:
            best.append(number)
            least = kl
    others = [number for number in range(len(found)) if number not in best]
    worse = "a smaller one is better"
    for numbers, style, label in (
        (best, {"color": colours["tower"], "marker": "o"}, "the best of its size"),
        (others, {"color": colours["projector"], "marker": "D", "linestyle": "none"}, worse),
    ):
        if numbers or style["marker"] == "o":
            at = [sizes[n] for n in numbers], [found[n] for n in numbers]
            axes.plot(*at, **style, label=label)
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel=f"weights, {unit}", ylabel="mean KL divergence, nats a position")
    axes.set_title("Size and quality of recipes", fontsize=11)
    if any(loss.all.kl_mean for _, loss in ordered):
        _logarithmic(axes)
    _name(figure, axes, [name for name, _ in ordered], list(zip(sizes, found, strict=True)))
    _finish(figure, axes, path, theme)


# Where a name may stand, in points from its own: the first of them that is free.
PLACES = ((7, 7), (-7, -7), (7, -7), (-7, 7), (14, 20), (-14, -20), (14, 34), (-14, -34), (0, 48))


def _name(figure: Any, axes: Any, names: Sequence[str], at: Sequence[tuple[float, float]]) -> None:
    """Names beside their points, where no other name or point is, within the axes."""
    figure.draw_without_rendering()  # which says where everything is
    taken: list[Any] = []
    marks = [axes.transData.transform(point) for point in at]
    for name, point in zip(names, at, strict=True):
        if point[1] != point[1]:
            continue  # it has no place on the axis
        for place in PLACES:
            label = _label(axes, name, point, *place)
            box = label.get_window_extent()
            free = not any(map(box.overlaps, taken)) and not box.count_contains(marks)
            if free and axes.bbox.count_contains([box.min, box.max]) == 2:
                taken.append(box)
                break
            label.remove()
        else:
            _label(axes, name, point, *PLACES[0])


def _label(axes: Any, name: str, point: tuple[float, float], across: int, up: int) -> Any:
    sides = {"ha": "left" if across > 0 else "right", "va": "bottom" if up > 0 else "top"}
    offset = {"xytext": (across, up), "textcoords": "offset points"}
    return axes.annotate(name, point, **offset, **sides, fontsize=9)


def _figure(path: Path, theme: Theme) -> tuple[Any, Any]:
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path.name} is no name for a plot; it ends in .png, .svg or .pdf")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError(
            "plots need matplotlib, which is not installed; pip install 'mlx-onevision[plot]'"
        ) from None
    ink, ground, faint = (THEMES[theme][name] for name in ("ink", "ground", "faint"))
    figure = Figure(figsize=INCHES, layout="constrained", facecolor=ground)
    axes = figure.subplots()
    axes.set_facecolor(ground)
    axes.grid(True, color=faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    return figure, axes


def _logarithmic(axes: Any) -> None:
    """Powers of ten over a wide range; 1, 2 and 5 of each over a narrow one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axis = axes.yaxis
    low, high = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=20))
    axis.set_minor_formatter(NullFormatter())
    if low >= 1e-3 and high < 1e4:
        axis.set_major_formatter(_plain)


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _finish(figure: Any, axes: Any, path: Path, theme: Theme) -> None:
    legend = axes.legend(frameon=False, fontsize=9)
    labels = axes.title, axes.xaxis.label, axes.yaxis.label
    for text in (*legend.get_texts(), *axes.texts, *labels):
        text.set_color(THEMES[theme]["ink"])
    kind = path.suffix[1:].lower()
    try:
        with replacing(path) as file:  # the old one stays until then
            figure.savefig(file, format=kind, dpi=DOTS, facecolor=figure.get_facecolor())
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None
