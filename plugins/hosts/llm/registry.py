"""Which models ``llm`` knows: those that are always there, and those that a person has added.

The latter are kept in ``onevision.json`` in llm's own folder, by their names there:

    {"my-org/my-model": {"model": "my-org/my-model", "revision": null, "aliases": ["mine"]}}
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llm

from mlx_onevision.plugins.hosts.llm.refusals import Refusal

FILE = "onevision.json"
KEYS = {"model", "revision", "aliases"}


@dataclass(frozen=True)
class Entry:
    """id : the name for llm. model, revision : as :func:`mlx_onevision.load` takes them."""

    id: str
    model: str
    revision: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)


# Nothing is downloaded before one of them is asked something.
BUILT_IN = tuple(Entry(f"onevision-{name}", name) for name in ("demo", "0.5b", "7b", "72b"))


def file() -> Path:
    return llm.user_dir() / FILE


def added() -> list[Entry]:
    """What a person has added, in that order.

    Raises:
        Refusal: for a file that is no such list.
    """
    path = file()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise _spoilt(path, str(error)) from None
    if not isinstance(values, Mapping):
        raise _spoilt(path, "it is no object")
    return [_entry(path, name, value) for name, value in values.items()]


def keep(entries: list[Entry]) -> None:
    """Writes what has been added, whole or not at all."""
    path = file()
    values = {
        entry.id: {
            "model": entry.model,
            "revision": entry.revision,
            "aliases": list(entry.aliases),
        }
        for entry in entries
    }
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{FILE}.", delete=False
    ) as fresh:
        json.dump(values, fresh, indent=2)
        fresh.write("\n")
    os.replace(fresh.name, path)


def _entry(path: Path, name: str, value: Any) -> Entry:
    given = value if isinstance(value, Mapping) else {}
    model, revision = given.get("model"), given.get("revision")
    aliases = given.get("aliases", [])
    good = name and isinstance(model, str) and model and not given.keys() - KEYS
    good = good and isinstance(revision, str | None) and isinstance(aliases, list)
    if not good or not all(isinstance(alias, str) and alias for alias in aliases):
        raise _spoilt(path, f"what it says of {name!r} is no model")
    return Entry(name, str(model), revision, tuple(aliases))


def _spoilt(path: Path, why: str) -> Refusal:
    return Refusal(f"{path} cannot be read ({why}); mend it, or delete it and add models again")
