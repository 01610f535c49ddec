"""What commands do until there is a model: its name, a bar while it is loaded, and what else is
said of its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import DRAFT_TOKENS

if TYPE_CHECKING:
    from mlx_onevision.api import Model


def model_or_demo(model: str | None) -> str:
    """The model that ``--model`` names, or the demo model, with a notice on stderr."""
    if model is not None:
        return model
    click.echo(
        "No --model: the embedded demo model answers; it knows coloured shapes only.", err=True
    )
    return "demo"


def load(model: str, **settings: Any) -> Model:
    """As :func:`mlx_onevision.load`, with a bar where weights are quantized."""
    from mlx_onevision import api

    if settings.get("quantize") is None:
        return api.load(model, **settings)
    with progress_bar(f"quantizing {model}") as progress:
        return api.load(model, progress=progress, **settings)


@contextmanager
def progress_bar(name: str, unit: str = "B") -> Generator[Callable[[int, int], None]]:
    """A function for what is done and all there is, which a bar shows on stderr if that is a
    terminal.
    """
    from tqdm import tqdm

    scale = unit == "B"
    with tqdm(desc=name, unit=unit, unit_scale=scale, disable=None, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def draft_tokens(draft_model: str | None, given: int | None) -> int:
    """How many tokens a draft model proposes at once; 0 without one.

    Raises:
        click.UsageError: for a number without one.
    """
    if given is not None and draft_model is None:
        raise click.UsageError("--draft-tokens needs --draft-model; add it")
    return (0 if draft_model is None else DRAFT_TOKENS) if given is None else given


def unused(prompt_cache: Path) -> str:
    """What to say where a prompt had nothing of the cache that was read."""
    return f"{prompt_cache} was not used: the prompt does not begin with the conversation in it"
