"""Which models ``llm`` knows: those that are always there, and those that a person has added.

The latter are kept in ``onevision.json`` in llm's own folder, by their names there:

    {"my-org/my-model": {"model": "my-org/my-model", "revision": null, "aliases": ["mine"]}}
"""

import atexit
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import llm

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# What a person at the ``llm`` command sees of an error: one sentence.


class Refusal(llm.ModelError, click.ClickException):
    """Programs catch it as ``llm.ModelError``. Some of llm's commands (``embed``, ``chat``) catch
    nothing; there click writes it, in place of a traceback.
    """


@contextmanager
def told() -> Iterator[None]:
    """Raises Refusal for what the plugin contract refuses."""
    try:
        yield
    except PluginError as error:
        raise Refusal(str(error)) from error


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


# The backends of this process: one for each model that was asked something, until its end.

# It is the person's own command, or program: whatever that may read, this may.
POLICY = MediaPolicy.trusting()

GOODBYE_SECONDS = 2.0  # for what is under way at the end, such as a download

_backends: dict[tuple[str, str | None], Backend] = {}
_lock = threading.Lock()


def opened(entry: Entry) -> Backend:
    """A model's backend, the same one every time; it loads when it is first asked, and frees its
    memory after some minutes without a question.
    """
    key = entry.model, entry.revision
    with _lock:
        if key not in _backends:
            _backends[key] = _open(entry)
        return _backends[key]


def _open(entry: Entry) -> Backend:
    from mlx_onevision.plugins.adapters.engine import open_engine
    from mlx_onevision.plugins.service.service import Limits

    # Nobody else has to be protected, and the first question may have to wait for a download.
    limits = Limits(waiting=100_000, timeout=None, max_tokens=1 << 20)
    backend = open_engine(entry.model, revision=entry.revision, policy=POLICY, limits=limits)
    atexit.register(_close, backend)
    return backend


def _close(backend: Backend) -> None:
    closing = threading.Thread(target=backend.close, daemon=True)
    closing.start()
    closing.join(GOODBYE_SECONDS)
