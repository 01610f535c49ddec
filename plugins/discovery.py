"""Backends by name: this package's own, and those that other packages bring.

A package brings one by an entry point of the group ``mlx_onevision.backends``: a function or class
that takes keyword arguments and returns a :class:`~mlx_onevision.plugins.interface.Backend`.

    [project.entry-points."mlx_onevision.backends"]
    mine = "my_package.backend:MyBackend"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from mlx_onevision.plugins.contract.errors import PluginError, bad_request

if TYPE_CHECKING:
    from mlx_onevision.plugins.interface import Backend

GROUP = "mlx_onevision.backends"

# As in this package's own metadata, but there without it, too: in a checkout that is not installed.
BUILT_IN = {
    "engine": "mlx_onevision.plugins.adapters.engine:open_engine",
    "fake": "mlx_onevision.plugins.adapters.fake:FakeBackend",
    "http": "mlx_onevision.plugins.adapters.http:HttpBackend",
}


def backends() -> dict[str, str]:
    """The names that :func:`open_backend` takes, and where each backend is: "module:name".

    Nothing is imported. Nobody can take the place of this package's own.
    """
    return {name: found.value for name, found in sorted(_found().items())}


def open_backend(name: str = "engine", **settings: Any) -> Backend:
    """A backend by its name; ``settings`` are the keyword arguments of what opens it.

    "engine" runs a model in this process (:func:`~.adapters.engine.open_engine`), "http" asks a
    server (:class:`~.adapters.http.HttpBackend`), "fake" needs no weights
    (:class:`~.adapters.fake.FakeBackend`). Raises PluginError: ``bad_request``, for a name that
    nobody has brought, for one that cannot be imported, for settings that do not exist; and what
    opening it raises.
    """
    from mlx_onevision.plugins.interface import Backend  # every --help imports this module

    found = _found()
    if name not in found:
        raise bad_request(f"there is no backend {name!r}", f"there are {', '.join(sorted(found))}")
    try:
        opening: Any = found[name].load()
    except Exception as error:  # whatever an import of somebody's module may raise
        raise bad_request(
            f"the backend {name!r} cannot be imported from {found[name].value} "
            f"({type(error).__name__}: {error})",
            "install or remove the package that brings it",
        ) from error
    try:
        backend = opening(**settings)
    except TypeError as error:
        raise bad_request(f"the backend {name!r} does not take these settings ({error})") from error
    if not isinstance(backend, Backend):
        message = f"what {found[name].value} returned is no backend"
        hint = "ask whoever wrote it to run mlx_onevision.plugins.conformance on it"
        raise PluginError("internal", message, hint)
    return backend


def _found() -> dict[str, EntryPoint]:
    brought = {entry.name: entry for entry in entry_points(group=GROUP)}
    own = {name: EntryPoint(name, location, GROUP) for name, location in BUILT_IN.items()}
    return {**brought, **own}
