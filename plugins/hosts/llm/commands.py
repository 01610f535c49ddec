"""``llm onevision``: adds models to those that are built in, lists and removes them."""

import json
from pathlib import Path
from typing import Any

import click
import llm

from mlx_onevision.cli.options import LOADING, gathered, option
from mlx_onevision.plugins.hosts.llm import registry
from mlx_onevision.plugins.hosts.llm.models import EMBEDDING_SPACES
from mlx_onevision.plugins.hosts.llm.registry import (
    BUILT_IN,
    CommandError,
    Entry,
    added,
    as_command_error,
)


@click.group()
def onevision() -> None:
    """Which LLaVA-OneVision models llm knows."""


@onevision.command()
@click.argument("model", metavar="NAME_OR_FOLDER")
@click.option(
    "--alias", "aliases", multiple=True, metavar="NAME", help="A shorter name; may be given again."
)
@option("name", help="What llm calls it. Default: its own name.")
@gathered("loading", *LOADING)
def add(
    model: str,
    aliases: tuple[str, ...],
    name: str | None,
    loading: dict[str, Any],
) -> None:
    """Make a Hugging Face model or a folder known to llm.

    Nothing is downloaded until the model is asked something.

    \b
    llm onevision add my-org/my-onevision --alias mine
    llm onevision add ./llava-onevision-7b-4bit --alias 7b4
    llm onevision add 7b --name 7b-small --memory-limit 18 --kv-bits 8
    """
    from mlx_onevision.checkpoint.hub import repository_of

    known = next((entry for entry in BUILT_IN if entry.model == model.lower()), None)
    adapter = loading["adapter"]
    if adapter is not None and Path(adapter).expanduser().is_dir():  # llm runs in any folder
        loading["adapter"] = str(Path(adapter).expanduser().resolve())
    changed = any(value is not None for value in loading.values())
    if known is not None and not changed:
        raise CommandError(f"{model} is there already; ask {known.id}")
    if known is not None or repository_of(model) is not None:
        entry = Entry(model if name is None else name, model, aliases=aliases, **loading)
    else:
        with (
            as_command_error()
        ):  # a folder that holds no such model is refused now rather than later
            registry.open_backend(Entry("", model, loading["revision"])).info()
        folder = Path(model).expanduser().resolve()
        own = f"onevision-{folder.name}" if name is None else name
        entry = Entry(own, str(folder), aliases=aliases, **loading)
    _check_names(entry)
    registry.save([*added(), entry])
    click.echo(f"llm -m {entry.names[-1]} asks {entry.model}")


@onevision.command(name="list")
@option("as_json", help="Print one JSON object a model, as a list.")
def list_models(as_json: bool) -> None:
    """Show the models, what they are, and their other names."""
    entries = [*BUILT_IN, *added()]
    if as_json:
        rows = [
            {
                "id": entry.id,
                **entry.to_dict(),
                "embedding_models": [f"{entry.id}-{space}" for space in EMBEDDING_SPACES],
            }
            for entry in entries
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    for entry in entries:
        model = entry.model if entry.revision is None else f"{entry.model} at {entry.revision}"
        others = f" (aliases: {', '.join(entry.aliases)})" if entry.aliases else ""
        click.echo(f"{entry.id}: {model}{others}")


@onevision.command()
@click.argument("name")
def remove(name: str) -> None:
    """Make llm forget a model that was added, by its name or an alias. Its files stay."""
    entries = added()
    gone = [entry for entry in entries if name in entry.names]
    if not gone:
        always = any(name == entry.id for entry in BUILT_IN)
        why = "is always there" if always else "has not been added"
        raise CommandError(f"{name} {why}; 'llm onevision list' shows what has")
    registry.save([entry for entry in entries if entry not in gone])


def _check_names(entry: Entry) -> None:
    """Raises CommandError for names that cannot be typed, or are in use."""
    taken = llm.get_model_aliases()
    for name in entry.names:
        if not name or any(character.isspace() for character in name):
            raise CommandError(f"{name!r} is no name; give one without spaces")
        if name in taken:
            message = f"llm has a model {name!r} already; choose another with --name or --alias"
            raise CommandError(message)
