"""A plugin of the ``llm`` command and library.

    llm -m onevision-demo "What is this?" -a image.png
    llm embed -m onevision-demo-vision --binary -i image.png

``llm`` imports this whatever it is asked to do: a model is only loaded, and its libraries only
imported, when it is asked something.
"""

from collections.abc import Callable, Iterator
from typing import Any

import click
import llm

from mlx_onevision.plugins.hosts.llm import models
from mlx_onevision.plugins.hosts.llm.commands import onevision
from mlx_onevision.plugins.hosts.llm.registry import BUILT_IN, CommandError, Entry, added


@llm.hookimpl
def register_models(register: Callable[..., Any]) -> None:
    """Makes the models that answer known to llm."""
    for entry in _entries():
        register(models.OneVision(entry), models.AsyncOneVision(entry), aliases=entry.aliases)


@llm.hookimpl
def register_embedding_models(register: Callable[..., Any]) -> None:
    """Makes the models that embed known to llm, one for each space."""
    for entry in _entries():
        for space in models.EMBEDDING_SPACES:
            aliases = tuple(f"{alias}-{space}" for alias in entry.aliases)
            register(models.OneVisionEmbedding(entry, space), aliases=aliases)


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Adds ``llm onevision``."""
    cli.add_command(onevision)


def _entries() -> Iterator[Entry]:
    """A damaged list must not make llm's other models unusable."""
    yield from BUILT_IN
    try:
        yield from added()
    except CommandError as refusal:
        click.echo(f"Warning: {refusal}", err=True)
