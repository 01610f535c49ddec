"""A Python interpreter for work that has to be able to die: decoding a stranger's video, working
through a stranger's schema.

Usually it is the one that runs this program. A host application that embeds Python has none under
``sys.executable``: one is then looked for where this Python is installed, and
``MLX_ONEVISION_PYTHON`` names it outright. It must be the same version of Python, since it imports
libraries from the same places.
"""

import os
import sys
from pathlib import Path

INTERPRETER = "MLX_ONEVISION_PYTHON"

_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"

MISSING = f"a separate {_VERSION}, and none was found; set {INTERPRETER} to its path"
"""How the error ends that says so."""


def find_interpreter() -> str | None:
    """A Python of this version that is no host application."""
    named = os.environ.get(INTERPRETER)
    if named:
        return named
    here = Path(sys.executable or "")
    if here.name.lower().startswith("python") and not getattr(sys, "frozen", False):
        return str(here)
    for prefix in (sys.exec_prefix, sys.base_exec_prefix):
        for name in (_VERSION, "python3", "python"):
            path = Path(prefix) / "bin" / name
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def import_path() -> list[str]:
    """Where such an interpreter finds what this one has, this package first."""
    here = str(Path(__file__).parents[1])
    return [here, *map(os.path.abspath, filter(None, sys.path))]
