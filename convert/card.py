"""The model card: README.md, with the metadata that the Hub and LM Studio sort models by."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mlx_onevision.config.model import HUB_TYPE
from mlx_onevision.convert.hub import Source
from mlx_onevision.convert.report import ConversionSummary

logger = logging.getLogger("mlx_onevision")
# What of a source's own card holds for the converted model too.
KEPT = ("license", "license_name", "license_link", "language", "datasets", "extra_gated_prompt")
TAGS = ("mlx", "mlx-onevision", "llava-onevision")
LONGEST = 1 << 20  # characters of a card that are looked at

LAYOUT = """\
# {name}

{origin}

{summary}

## Use it

With mlx-onevision:

    mlx-onevision generate --model {name} --image photo.jpg --prompt "What is this?"

{elsewhere}
## What it lost

{loss}

{training}## How it was made

    {command}
"""
TRAINING = """\
## How it was trained

The mean loss of a token, over the steps since the row before.

{curve}

"""
ELSEWHERE = """\
or with [mlx-vlm](https://github.com/Blaizzy/mlx-vlm):

    python -m mlx_vlm generate --model {name} --image photo.jpg --prompt "What is this?"
"""
NOWHERE_ELSE = """\
Other programs do not load it: its config.json has settings of the original LLaVA-NeXT code that
they would not follow.
"""


def card(
    source: Source,
    summary: ConversionSummary,
    loss: str | None,
    command: str,
    model_type: str = HUB_TYPE,
    curve: str | None = None,
) -> bytes:
    """README.md. ``loss`` says in Markdown what quantizing cost, ``curve`` how the loss fell while
    the adapter was trained; None where it is not known.
    """
    if loss is None and summary.quantized:
        loss = "The loss against the source was not measured."
    elif loss is None:
        loss = "Nothing was lost on purpose: the weights are the source's."
    origin, rows = _origin(source, summary), _table(summary)
    name = summary.target.name
    elsewhere = ELSEWHERE.format(name=name) if model_type == HUB_TYPE else NOWHERE_ELSE
    body = LAYOUT.format(
        name=name,
        elsewhere=elsewhere,
        origin=origin,
        summary=rows,
        loss=loss,
        training="" if curve is None else TRAINING.format(curve=curve),
        command=command,
    )
    # JSON is YAML, and needs no quoting rules of its own.
    metadata = _metadata(source, summary).items()
    head = [f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata]
    return f"---\n{''.join(head)}---\n\n{body}".encode()


def _metadata(source: Source, summary: ConversionSummary) -> dict[str, Any]:
    theirs = read_metadata(source.folder)
    given = theirs.get("tags")
    tags = [tag for tag in _items(given) if isinstance(tag, str)]
    base = source.base or theirs.get("base_model")
    relation = "finetune" if summary.adapter else "quantized" if summary.quantized else None
    found: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": base} if base else {}),
        **({"base_model_relation": relation} if base and relation else {}),
        "tags": list(dict.fromkeys((*TAGS, *tags))),
    }
    return found | {key: theirs[key] for key in KEPT if _is_plain(theirs.get(key))}


def read_metadata(folder: Path) -> Mapping[str, Any]:
    """The metadata at the head of a folder's README.md; empty where it cannot be understood."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            text = file.read(LONGEST)
    except (OSError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    import yaml  # huggingface_hub needs it for the same

    try:
        values = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (yaml.YAMLError, RecursionError):
        logger.warning("The README.md of %s has metadata that is not YAML.", folder.name)
        return {}
    return cast(Mapping[str, Any], values) if isinstance(values, dict) else {}


def _items(value: object) -> list[object]:
    """The items of a list; none of anything else."""
    return cast(list[object], value) if isinstance(value, list) else []


def _is_plain(value: object) -> bool:
    """Whether it is a text, or a list of texts, and not empty."""
    if isinstance(value, str):
        return bool(value)
    items = _items(value)
    return bool(items) and all(isinstance(item, str) for item in items)


def _origin(source: Source, summary: ConversionSummary) -> str:
    name = f"`{source.name}`"
    if source.base is not None:
        name = f"[{source.base}](https://huggingface.co/{source.base})"
        name += f" at commit `{source.commit}`" if source.commit is not None else ""
    kind = "quantized" if summary.quantized else "in MLX's layout"
    kind = f"fine-tuned, {kind}" if summary.adapter else kind
    return f"{name}, {kind} by mlx-onevision {summary.version}."


def _table(summary: ConversionSummary) -> str:
    rows: list[tuple[str, str]] = [
        ("weights", summary.weights),
        ("bits per weight", f"{summary.bits_per_weight:.2f}"),
        ("recipe", summary.recipe),
        ("type of what is not quantized", summary.dtype),
        *((f"matrices with {spec}", str(count)) for spec, count in summary.quantized.items()),
        *((f"fine-tuning: {key}", str(value)) for key, value in (summary.adapter or {}).items()),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
