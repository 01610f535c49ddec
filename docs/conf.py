"""How Sphinx makes pages of docs/ and of the docstrings; `make docs` runs it."""

import re
from typing import Any

from sphinx.application import Sphinx

from mlx_onevision import __version__
from mlx_onevision.__main__ import cli

project = "mlx-onevision"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
smartquotes = False  # "--" stays two hyphens

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 4

autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

# "name, other : what they are": one of several below each other, with its lines below it.
FIELD = re.compile(r"^(\w+(?:, +\w+|,\n +\w+)*) : (.*\n(?: {4}.*\n)*)", re.MULTILINE)
LIST = re.compile(r"^(- .*\n(?:  .*\n)*)(?=\w)", re.MULTILINE)
CODE = re.compile(r"^(\S.*\n\n)(?= {4}\S)", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def field_as_item(field: re.Match[str]) -> str:
    """An item of a list; its text goes on below the first letter."""
    text = re.sub(r"\n +", "\n  ", field[2])
    return f"- **{' '.join(field[1].split())}**: {text}"


def docstring_as_rst(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Fields become a list, and what is indented below a sentence becomes code."""
    text = CODE.sub(r"\1::\n\n", "\n".join(lines) + "\n")
    if what in ("attribute", "data", "property"):
        text = f"\n{text}"  # else napoleon takes what stands before a first colon for the type
    lines[:] = LIST.sub(r"\1\n", FIELD.sub(field_as_item, text)).splitlines()


def without_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Of links to files that have no page, the text stays."""
    if "/" not in docname:
        source[0] = OUTSIDE.sub(r"\1", source[0])


def help_as_rst(app: Sphinx, context: Any, lines: list[str]) -> None:
    """Examples below the text of a command, which arrive as lines behind bars, are code."""
    text = "\n".join(lines).replace("\n\n| ", "\n\n::\n\n| ")
    lines[:] = [*(re.sub(r"^\| ", "    ", line) for line in text.splitlines()), ""]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    for name in cli.commands:
        cli.load(name)  # they are imported when they are called; the page has them all
    app.connect("source-read", without_outside)
    app.connect("sphinx-click-process-description", help_as_rst)
    app.connect("autodoc-process-docstring", docstring_as_rst, priority=400)
