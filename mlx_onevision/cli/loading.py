"""What commands do until there is a model: its name, the ranks that share it, a bar meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_onevision.cli.options import DRAFT_TOKENS
from mlx_onevision.distributed import launched, rank

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
def progress_bar(name: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
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


def share(
    model: str | None,
    settings: dict[str, Any],
    refused: Mapping[str, object] | None = None,
    split: str | tuple[float, ...] | None = None,
) -> None:
    """Has the ranks of mlx.launch, where it has started this process, share the model: adds that to
    ``settings``, which ``load`` is given. The others compute what rank 0 does from here on, print
    nothing, and end when it has closed the model.

    refused : options that do not go with ranks, and what was given for them.

    Raises:
        click.UsageError: for one that was given.
    """
    if not launched():
        return
    for name, given in (refused or {}).items():
        if given not in (None, False, 0):
            raise click.UsageError(f"mlx.launch does not go with {name}; leave it out")
    settings |= {"sharded": True, "split": split}
    if rank():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and rank 0 decides

        load(model or "demo", **settings)


def unused(prompt_cache: Path) -> str:
    """What to say where a prompt had nothing of the cache that was read."""
    return f"{prompt_cache} was not used: the prompt does not begin with the conversation in it"
