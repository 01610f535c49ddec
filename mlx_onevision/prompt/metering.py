"""A meter for jinja templates: what they do costs work, and work runs out.

:func:`metered` puts the meter into a parsed template: every pass of a loop, every macro, and every
list or text that is built pays. No single step is large (:func:`fits`), and the clock is looked at
between any two, so neither time nor memory can run away. The functions here are the steps' side of
it; they charge the meter that :func:`running` has set for this thread.

This module needs jinja2 as it loads, so import it only where a template is at hand.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import GeneratorType
from typing import Any

from jinja2 import nodes
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

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
