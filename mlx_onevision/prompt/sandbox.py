# pyright: reportUnknownMemberType=false
"""A chat template in jinja2's immutable sandbox, with what transformers offers templates
(``render_jinja_template``): trim_blocks, lstrip_blocks, ``break`` and ``continue``, the
``generation`` tag, ``raise_exception``, ``strftime_now``, and a ``tojson`` that leaves HTML and
non-ASCII characters alone.

The sandbox keeps a template from reaching Python's internals. It does not keep it from running for
ever or from filling the memory, so untrusted templates run in a process of their own, which calls
:func:`answer` (see :class:`~mlx_onevision.subprocesses.BoundedProcess`).

This module imports jinja2 as it loads, so import it only to render.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlx_onevision.errors import CheckpointError, OneVisionError, RequestError

MAX_SOURCE = 64 * 1024  # bytes of a template
MAX_TEXT = 1 << 20  # characters of a prompt


class SandboxedTemplate:
    """A compiled template. ``name`` stands for it in errors."""

    def __init__(self, source: str, name: str) -> None:
        """Raises CheckpointError for a template that is too long or not one."""
        self.name = name
        if len(source.encode(errors="replace")) > MAX_SOURCE:
            raise CheckpointError(f"{name} has more than {MAX_SOURCE} bytes")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            detail = f"line {error.lineno}: {_short(error)}"
            raise CheckpointError(f"{name} is not a usable template ({detail})") from None
        except Exception as error:  # RecursionError, MemoryError, SyntaxError: untrusted text
            raise CheckpointError(f"{name} is not a usable template ({_short(error)})") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text, of at most MAX_TEXT characters.

        Raises:
            RequestError: when the template refuses the conversation (``raise_exception``).
            CheckpointError: when it fails, or exceeds a limit.
        """
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(**variables):
                length += len(part)
                if length > MAX_TEXT:
                    raise jinja2.TemplateError(f"its output exceeds {MAX_TEXT:,} characters")
                parts.append(part)
        except _RaisedError as error:
            raise RequestError(f"the model's chat template says: {_short(error)}") from None
        except MemoryError:
            raise CheckpointError(f"{self.name} failed (it takes too much memory)") from None
        except Exception as error:  # whatever an untrusted program may raise
            raise CheckpointError(f"{self.name} failed ({_short(error)})") from None
        return "".join(parts)


_compiled = lru_cache(maxsize=1)(SandboxedTemplate)


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """Renders in a process of its own: {"source", "name", "variables"} to {"text"} or {"error",
    "kind"}, where kind is "request" for what the template refuses.
    """
    try:
        return {"text": _compiled(request["source"], request["name"]).render(request["variables"])}
    except OneVisionError as error:
        kind = "request" if isinstance(error, RequestError) else "checkpoint"
        return {"error": str(error), "kind": kind}


class _RaisedError(jinja2.TemplateError):
    """What the template itself raised, through ``raise_exception``."""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's text for training; here it only scopes them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that `self` can be an attribute, as in jinja2
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        Namespace.__setitem__(self, name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "dict": _make_dict,
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise_exception(message: Any) -> None:
    raise _RaisedError(str(message))
