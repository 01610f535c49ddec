"""A stranger's jinja template, run within bounds.

jinja2's immutable sandbox keeps a template away from Python's insides. It does not keep it from
running for ever or from filling the memory, so this one also meters what the template does
(``metering``), and does not offer what cannot be priced beforehand: powers, ``%``
on text, ``center`` and the like. No chat template needs them; one that names them is refused.

The language is otherwise the reference's (transformers' ``render_jinja_template``): trim_blocks,
lstrip_blocks, ``break`` and ``continue``, the ``generation`` tag, ``raise_exception``,
``strftime_now``, and a ``tojson`` that leaves HTML and non-ASCII characters alone.

This module needs jinja2 as it loads, so import it only where a template is at hand.
"""

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace, pass_context, pass_environment

from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.prompt.metering import (
    MAX_TEXT,
    STEPS,
    LimitError,
    fits,
    made,
    metered,
    paying,
    running,
    spend,
    weigh,
)

MAX_SOURCE = 64 * 1024  # bytes of a template

FILTERS = """abs capitalize count d default dictsort e escape first float groupby int items last
length list lower map max min reject rejectattr reverse safe select selectattr sort string title
trim unique upper""".split()
# These look into nested values, so they pay for what they are given as well as for what they make.
DEEP = frozenset("dictsort groupby max min sort string tojson unique".split())
STR_METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit
    islower isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title
    upper""".split()
)


class BoundedTemplate:
    """A compiled template. ``name`` stands for it in errors."""

    def __init__(self, source: str, name: str) -> None:
        """Raises CheckpointError for a template that is too long or not one."""
        self.name = name
        if len(source.encode(errors="replace")) > MAX_SOURCE:
            raise CheckpointError(f"{name} has more than {MAX_SOURCE} bytes")
        environment = _Environment()
        try:
            self._template = environment.from_string(metered(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            detail = f"line {error.lineno}: {_short(error)}"
            raise CheckpointError(f"{name} is not a usable template ({detail})") from None
        except Exception as error:  # RecursionError, MemoryError, SyntaxError: a stranger's text
            raise CheckpointError(f"{name} is not a usable template ({_short(error)})") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text, of at most MAX_TEXT characters.

        Raises:
            RequestError: when the template refuses the conversation (``raise_exception``).
            CheckpointError: when it fails, or exceeds a limit.
        """
        pieces: list[str] = []
        length = 0
        try:
            with running():
                for piece in self._template.generate(**variables):
                    length += len(piece)
                    if length > MAX_TEXT:
                        raise LimitError(f"its output exceeds {MAX_TEXT:,} characters")
                    pieces.append(piece)
        except _Raised as error:
            raise RequestError(f"the model's chat template says: {_short(error)}") from None
        except Exception as error:  # whatever a stranger's program may raise
            raise CheckpointError(f"{self.name} failed ({_short(error)})") from None
        return "".join(pieces)


class _Raised(jinja2.TemplateError):
    """What the template itself raised, through ``raise_exception``."""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed before there is a meter
            finalize=_finalize,
            extensions=[_Generation, loopcontrols],
        )
        kept: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in FILTERS}
        kept |= {"tojson": _tojson, "replace": _replace, "join": _join}
        self.filters = {name: _priced(function, name in DEEP) for name, function in kept.items()}
        self.filters |= STEPS
        self.tests = {name: _priced(function, True) for name, function in self.tests.items()}
        self.globals.clear()
        self.globals |= {
            "range": safe_range,  # 100,000 at most
            "dict": _dict,
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def wrap_str_format(self, value: Any) -> None:
        """Leaves ``str.format`` to is_safe_attribute, which refuses it: a width has no bound."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            kind = type(left).__name__
            raise SecurityError(f"{operator!r} on a value of type {kind} is not offered")
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and isinstance(times, int):
                    fits(len(sized) * times)
            if isinstance(left, int) and isinstance(right, int):
                fits(left.bit_length() + right.bit_length())
        elif operator == "+" and isinstance(left, str | list | tuple):
            fits(len(left) + (len(right) if isinstance(right, str | list | tuple) else 0))
        return made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name == "join":
            items = list(paying(iter(*args)))
            fits(weigh(items) + len(text) * len(items))
            args = (items,)
        elif isinstance(text, str) and name == "replace":
            _fits_replaced(text, *args[:2])
        return made(super().call(context, obj, *args, **kwargs))


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's words for training; here it only scopes them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """A namespace that holds no other namespace: a chain of those prints exponentially."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that `self` can be an attribute, as in jinja2
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        todo = [value]
        while todo:
            spend(1)
            item = todo.pop()
            if isinstance(item, Namespace):
                raise SecurityError("a namespace cannot hold a namespace")
            if isinstance(item, dict | list | tuple):
                todo.extend(item.values() if isinstance(item, dict) else item)
        Namespace.__setitem__(self, name, value)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Charges for what is written. Asks for the context, so that nothing is written early."""
    fits(weigh(value))
    return value


def _priced(function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def priced(*args: Any, **kwargs: Any) -> Any:
        if deep:
            weigh(args)
        return made(function(*args, **kwargs))

    return priced


def _fits_replaced(text: str, old: str, new: str) -> None:
    fits(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    _fits_replaced(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


@pass_environment
def _join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    items = list(paying(iter(value)))
    if attribute is not None:
        items = list(map(make_attrgetter(environment, attribute), items))
    fits(weigh(items) + len(str(d)) * len(items))
    return str(d).join(map(str, items))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= int(indent) <= 16:
        raise SecurityError(f"tojson's indent {indent} is not within 0 to 16")
    if separators is not None and max(map(len, separators)) > 16:
        raise SecurityError("tojson's separators have more than 16 characters")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise _Raised(str(message))


def _strftime_now(pattern: str) -> str:
    fits(len(pattern) * 1024)
    return datetime.now().strftime(pattern)
