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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import GeneratorType
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
from jinja2.visitor import NodeTransformer

from mlx_onevision.errors import CheckpointError, RequestError

# A meter for jinja templates: what they do costs work, and work runs out.
#
# :func:`metered` puts the meter into a parsed template: every pass of a loop, every macro, and
# every list or text that is built pays. No single step is large (:func:`fits`), and the clock is
# looked at between any two, so neither time nor memory can run away. The functions here are the
# steps' side of it; they charge the meter that :func:`running` has set for this thread.
#
# This module needs jinja2 as it loads, so import it only where a template is at hand.

MAX_TEXT = 1 << 20  # characters of any one text (or items of a list) that a template builds
MAX_SECONDS = 1.5
MAX_WORK = 8_000_000  # loop passes, calls, items built; eight characters of new text count as one


class LimitError(Exception):
    """The template wants more time, work or memory than a prompt can need."""


class _Meter:
    def __init__(self) -> None:
        self.left = MAX_WORK
        self.deadline = time.monotonic() + MAX_SECONDS


# A template cannot reach a context variable; an argument of render() it could change.
_METER: ContextVar[_Meter] = ContextVar("template_meter")


@contextmanager
def running() -> Iterator[None]:
    """A fresh meter for what this thread does within."""
    token = _METER.set(_Meter())
    try:
        yield
    finally:
        _METER.reset(token)


def spend(work: int) -> None:
    """Charges ``work``; LimitError when it, or the time, has run out."""
    meter = _METER.get()
    meter.left -= work
    if meter.left < 0:
        raise LimitError(f"it takes more than {MAX_WORK:,} steps")
    if time.monotonic() > meter.deadline:
        raise LimitError(f"it takes longer than {MAX_SECONDS:g} s")


def fits(length: int) -> None:
    """LimitError for a text or list that would become longer than MAX_TEXT."""
    if length > MAX_TEXT:
        raise LimitError(f"it builds a text or list of more than {MAX_TEXT:,}")


def weigh(value: Any) -> int:
    """Charges for every item in ``value``, however deep.

    Returns:
        About how many characters it has when it is written out.
    """
    todo, size = [value], 0
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            size += len(item) + 4
            spend(1 + len(item) // 8)
            continue
        size += 4 + item.bit_length() // 3 if isinstance(item, int) else 32
        spend(1)
        if isinstance(item, dict):
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            todo.extend(item)
        elif isinstance(item, Namespace):
            todo.append(attributes(item))
    return size


def attributes(namespace: Namespace) -> dict[str, Any]:
    """What a namespace holds; jinja2 hides it under this name from templates."""
    return getattr(namespace, "_Namespace__attrs")  # noqa: B009


def made(value: Any) -> Any:
    """Charges for a value that was just made, and returns it; a lazy one pays item by item."""
    if isinstance(value, GeneratorType):
        return paying(value)
    weigh(value)
    return value


def paying(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each charged for as it is taken."""
    for item in items:
        spend(1)
        yield item


def _tick(literals: int) -> None:
    """One pass through a body that writes so many literal characters."""
    spend(1 + literals // 8)


def _compared(value: Any) -> Any:
    """Two nested values are compared item by item, so both sides pay for theirs."""
    if isinstance(value, dict | list | tuple):
        weigh(value)
    return value


def _concat(items: tuple[Any, ...]) -> str:
    """jinja's ``~``."""
    fits(sum(len(item) if isinstance(item, str) else weigh(item) for item in items))
    return made("".join(map(str, items)))


# The filters that a metered template calls, under names that no template can spell.
STEPS = {"(tick)": _tick, "(made)": made, "(compared)": _compared, "(concat)": _concat}


def metered(template: nodes.Template) -> nodes.Template:
    """A parsed template with the meter in it; its environment needs STEPS among its filters."""
    return _Metering().visit(template)


class _Metering(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def _ticking(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        literals = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_through("(tick)", nodes.Const(literals))))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("(concat)", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through("(made)", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("(made)", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("(made)", node) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through("(compared)", node.expr)
        for operand in node.ops:
            operand.expr = _through("(compared)", operand.expr)
        return node


def _through(step: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, step, [], [], None, None, lineno=node.lineno)


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
