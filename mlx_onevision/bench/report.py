"""A benchmark's runs as medians and ratios, as a table and as a plot.

Drawn with Pillow, which every installation has; the converter's plots need matplotlib.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_onevision.bench.programs import OURS, Numbers
from mlx_onevision.errors import RequestError
from mlx_onevision.files import replacing

GIGABYTE = 1e9
COLUMNS = (
    "row",
    "program",
    "tokens",
    "prepare s",
    "vision s",
    "prefill s",
    "first token s",
    "of limit",
    "decode tok/s",
    "of limit",
    "memory GB",
)
SPREAD = ("first", "prepare", "vision", "prefill", "decode", "memory", "first_turn")
RATIOS = ("first", "decode", "memory")
INK, FAINT, GROUND = "#1f2328", "#d0d7de", "#ffffff"
COLOURS = ("#0969da", "#bc4c00", "#6639ba")
BAR, GAP, MARGIN, NAMES, PANEL = 18, 14, 24, 110, 420  # pixels


def summary(taken: Sequence[Numbers]) -> Numbers:
    """Every number as median, least and most of the runs; counts as they are."""
    summary: Numbers = {}
    for name, value in taken[-1].items():
        values = [run[name] for run in taken]
        if name in SPREAD and value is not None:
            middle = statistics.median(values)
            spread = {"median": middle, "min": min(values), "max": max(values)}
            summary[name] = {**spread, "runs": values}
        else:
            summary[name] = value
    return summary


def ratios(ours: Numbers, other: Numbers) -> dict[str, float]:
    """Ours over the other's, of the medians that both have."""
    made: dict[str, float] = {}
    for name in RATIOS:
        mine, theirs = ours.get(name), other.get(name)
        if mine and theirs and theirs["median"]:
            made[name] = mine["median"] / theirs["median"]
    return made


def table(report: dict[str, Any]) -> str:
    """Lines of text: a header, a line for every row and program, and ratios below a row."""
    copied = report["limits"]["copy_bytes_per_second"]
    product = report["limits"]["matrix_operations_per_second"]
    lines = [
        f"{report['model']}, {report['dtype']}, on {report['device']}",
        f"limits: {_number(copied / 1e12)} TB/s copied,"
        f" {_number(product / 1e12)} TFLOP/s multiplied",
        f"medians (least..most) of {report['runs']} runs, answers of {report['answer_tokens']}"
        " tokens",
    ]
    for name, program in report["programs"].items():
        load, ready = program["load"], program["ready"]
        lines.append(
            f"{name} ({program['version']}): loaded in {load:.2f} s,"
            f" two tokens of a short answer after {ready:.2f} s"
        )
    cells: list[Sequence[str]] = [COLUMNS]
    errors: list[str] = []
    for row in report["rows"]:
        for name, result in row["results"].items():
            if "error" in result:
                errors.append(f"{row['row']}, {name}: {result['error']}")
                cells.append((row["row"], name, "failed"))
                continue
            cells.append(_cells(row, name, result))
        for name, made in row["ratios"].items():
            if made:
                values = [f"{made[key]:.2f}" if key in made else "" for key in RATIOS]
                first, decode, memory = values
                cells.append((row["row"], f"/ {name}", *[""] * 4, first, "", decode, "", memory))
    lines += ["", *_aligned(cells), *errors]
    return "\n".join([*lines, *_notes(report)])


def _cells(row: dict[str, Any], name: str, result: dict[str, Any]) -> Sequence[str]:
    limit = row.get("limit", {})
    first, decode = result.get("first"), result.get("decode")
    slower = first["median"] / limit["first"] if first and limit else None
    share = 100 * decode["median"] / limit["decode"] if decode and limit else None
    return (
        row["row"],
        name,
        str(result.get("prompt_tokens", "")),
        *(_middle(result.get(key)) for key in ("prepare", "vision", "prefill")),
        _spread(first),
        "" if slower is None else f"{slower:.1f} x",
        _spread(decode),
        "" if share is None else f"{share:.0f} %",
        _middle(result.get("memory"), GIGABYTE),
    )


def _notes(report: dict[str, Any]) -> list[str]:
    """What follows from several cells: the second turn, and how batches scale."""
    notes: list[str] = []
    results = {row["row"]: row["results"] for row in report["rows"]}
    second = results.get("second", {}).get(OURS, {})
    if "first_turn" in second:
        part = second["first"]["median"] / second["first_turn"]["median"]
        notes.append(f"first token of a second turn over that of the first: {part:.2f}")
    for name, alone in results.get("batch-1", {}).items():
        for count in (8, 16):
            several = results.get(f"batch-{count}", {}).get(name, {})
            if alone.get("decode") and several.get("decode"):
                times = several["decode"]["median"] / alone["decode"]["median"]
                notes.append(f"{name}: a batch of {count} makes {times:.1f} times the tokens of 1")
    return ["", *notes] if notes else []


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    whole = [(*line, *[""] * (len(COLUMNS) - len(line))) for line in cells]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in whole
    ]


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def _middle(value: dict[str, float] | None, unit: float = 1.0) -> str:
    return "" if value is None else _number(value["median"] / unit)


def _spread(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    middle, least, most = (_number(value[key]) for key in ("median", "min", "max"))
    return f"{middle} ({least}..{most})"


def plot(report: dict[str, Any], path: Path) -> None:
    """A PNG: bars of the first token's seconds and of tokens a second, with the limit of each as a
    line.

    Raises:
        RequestError: where the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    names, rows = list(report["programs"]), report["rows"]
    group = len(names) * BAR + GAP
    size = 3 * MARGIN + NAMES + 2 * PANEL, 5 * MARGIN + group * len(rows)
    image = Image.new("RGB", size, GROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((MARGIN, MARGIN // 2), f"{report['model']}, {report['device']}", INK, font)
    for n, name in enumerate(names):
        left = MARGIN + n * 170
        draw.rectangle((left, 2 * MARGIN, left + 12, 2 * MARGIN + 12), COLOURS[n])
        draw.text((left + 18, 2 * MARGIN - 2), name, INK, font)
    for panel, (key, title) in enumerate(
        (("first", "first token, seconds"), ("decode", "tokens a second"))
    ):
        left = MARGIN + NAMES + panel * (PANEL + MARGIN)
        draw.text((left, 3 * MARGIN), title + " (line: limit)", INK, font)
        found = [
            (n, k, row["results"][name][key]["median"])
            for n, row in enumerate(rows)
            for k, name in enumerate(names)
            if row["results"].get(name, {}).get(key)
        ]
        # The rows differ by more than a hundredfold: each is drawn to a scale of its own.
        for n, row in enumerate(rows):
            top = 4 * MARGIN + n * group
            limit = row.get("limit", {}).get(key)
            values = [value for at, _, value in found if at == n]
            most = max([*values, limit or 0.0]) or 1.0
            if panel == 0:
                draw.text((MARGIN, top), row["row"], INK, font)
            for k, value in [(k, value) for at, k, value in found if at == n]:
                right, at = left + (PANEL - 70) * value / most, top + k * BAR
                draw.rectangle((left, at, right, at + BAR - 4), COLOURS[k])
                draw.text((right + 6, at - 2), _number(value), INK, font)
            if limit and values:
                across = left + (PANEL - 70) * limit / most
                draw.line((across, top - 3, across, top + len(names) * BAR), INK, 2)
            bottom = top + group - GAP // 2
            draw.line((MARGIN, bottom, size[0] - MARGIN, bottom), FAINT)
    try:
        with replacing(path) as file:
            image.save(file, "PNG")
    except OSError as error:
        raise RequestError(f"{path.name} cannot be written: {error.strerror}") from None
