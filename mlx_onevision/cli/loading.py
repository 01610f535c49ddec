"""What commands do until there is a model: its name, a bar while it is loaded, and notices of
settings without an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import DRAFT_TOKENS, TABLE
from mlx_onevision.cli.values import listed

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


def report_unused_filters(sampling: Mapping[str, Any], model: Model | None = None) -> None:
    """A notice on stderr where filters of sampling were given that have no effect, because answers
    are greedy; without a ``model``, where that depends on the one that will be loaded.

    sampling : the options of ``SAMPLING``, None where they were not given.
    """
    from mlx_onevision.sampling.sampler import GREEDY, Sampling

    filters = ("top_p", "top_k", "min_p")
    given = [name for name in filters if sampling[name] not in (None, getattr(Sampling, name))]
    temperature = sampling["temperature"]
    if not given or (temperature or 0) >= GREEDY:
        return
    effect = "no effect on a greedy answer"
    if temperature is None and model is None:
        effect = "of effect on sampled answers only"
    elif temperature is None and model is not None and model.samples:
        return
    names = listed([TABLE[name].names[0] for name in given], "and")
    click.echo(f"{names}: {effect}; add --temperature 0.7", err=True)


def unused(prompt_cache: Path) -> str:
    """What to say where a prompt had nothing of the cache that was read."""
    return f"{prompt_cache} was not used: the prompt does not begin with the conversation in it"
