"""The models that ``llm`` knows, those that are built in and those that a person has added, and the
backends of this process that answer for them.

Added models are kept in ``onevision.json`` in llm's own folder, by their names there:

    {"my-org/my-model": {"model": "my-org/my-model", "revision": null, "aliases": ["mine"]}}

and how else they are to be loaded, as :func:`mlx_onevision.load` takes it.
"""

import atexit
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import llm

from mlx_onevision import files
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.wire import Json, is_list, is_object
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.media_policy import MediaPolicy

REGISTRY_FILE = "onevision.json"
LOAD_OPTIONS = ("dtype", "quantize", "memory_limit", "kv_bits", "visual_tokens", "adapter")
ENTRY_KEYS = {"model", "revision", "aliases", *LOAD_OPTIONS}

# It is the person's own command, or program: whatever that may read, this may.
POLICY = MediaPolicy.trusting()

CLOSE_WAIT_SECONDS = 2.0  # for what is under way when the process ends, such as a download


class CommandError(llm.ModelError, click.ClickException):
    """An error as one sentence. Programs catch it as ``llm.ModelError``; some of llm's commands
    (``embed``, ``chat``) catch nothing, and click prints it there in place of a traceback.
    """


@contextmanager
def as_command_error() -> Generator[None]:
    """Raises CommandError for what the plugin contract refuses."""
    try:
        yield
    except PluginError as error:
        raise CommandError(str(error)) from error


@dataclass(frozen=True)
class Entry:
    """id : the name for llm. The rest but ``aliases`` : as :func:`mlx_onevision.load` takes it."""

    id: str
    model: str
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    dtype: str | None = None
    quantize: int | None = None
    memory_limit: float | None = None
    kv_bits: int | None = None
    visual_tokens: float | None = None
    adapter: str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """What was given of ``LOAD_OPTIONS``."""
        values = {name: getattr(self, name) for name in LOAD_OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def names(self) -> tuple[str, ...]:
        return (self.id, *self.aliases)

    def to_dict(self) -> dict[str, Any]:
        values = {"model": self.model, "revision": self.revision, "aliases": list(self.aliases)}
        return values | self.loading


# Nothing is downloaded before one of them is asked something.
BUILT_IN = tuple(Entry(f"onevision-{name}", name) for name in ("demo", "0.5b", "7b", "72b"))


def added() -> list[Entry]:
    """What a person has added, in that order. Raises CommandError: for a file that is not
    such a list.
    """
    path = llm.user_dir() / REGISTRY_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not is_object(values):
        raise _damaged(path, "it is no object")
    return [_entry(path, name, value) for name, value in values.items()]


def save(entries: list[Entry]) -> None:
    """Writes what has been added, whole or not at all."""
    text = json.dumps({entry.id: entry.to_dict() for entry in entries}, indent=2)
    files.save(llm.user_dir() / REGISTRY_FILE, text + "\n")


def _entry(path: Path, name: str, value: Any) -> Entry:
    given: Json = value if is_object(value) else {}
    model, revision = given.get("model"), given.get("revision")
    aliases = given.get("aliases", [])
    good = name and isinstance(model, str) and model and not given.keys() - ENTRY_KEYS
    good = good and isinstance(revision, str | None) and is_list(aliases)
    loading = {name: given.get(name) for name in LOAD_OPTIONS}
    numbers = loading["memory_limit"], loading["visual_tokens"]
    good = good and all(type(number) in (int, float, type(None)) for number in numbers)
    good = good and all(loading[name] in (None, 4, 8) for name in ("kv_bits", "quantize"))
    good = good and all(isinstance(loading[name], str | None) for name in ("dtype", "adapter"))
    if not good or not all(isinstance(alias, str) and alias for alias in aliases):
        raise _damaged(path, f"the entry of {name!r} is no model")
    return Entry(name, str(model), revision, tuple(aliases), **loading)


def _damaged(path: Path, why: str) -> CommandError:
    return CommandError(
        f"{path} cannot be read ({why}); mend it, or delete it and add models again"
    )


_backends: dict[tuple[Any, ...], Backend] = {}
_lock = threading.Lock()


def open_backend(entry: Entry) -> Backend:
    """A model's backend, the same one until the process ends; it loads when it is first asked, and
    frees its memory after some minutes without a question.
    """
    from mlx_onevision.plugins.adapters.engine import open_engine
    from mlx_onevision.plugins.service.service import Limits

    key = entry.model, entry.revision, *entry.loading.items()
    with _lock:
        if key not in _backends:
            # No other clients need protection, and the first question may wait for a download.
            limits = Limits(waiting=100_000, timeout=None, max_tokens=1 << 20)
            backend = open_engine(
                entry.model,
                revision=entry.revision,
                policy=POLICY,
                limits=limits,
                **entry.loading,
            )
            atexit.register(_close, backend)
            _backends[key] = backend
        return _backends[key]


def _close(backend: Backend) -> None:
    closing = threading.Thread(target=backend.close, daemon=True)
    closing.start()
    closing.join(CLOSE_WAIT_SECONDS)
