"""Frozen dataclasses that go through JSON and come back equal; standard library only.

A :class:`Record` travels alone, so it says which version of the contract it is written in. A
:class:`Part` is only ever inside one. Both are strict: a value of another type, a key that does not
exist, a number out of range and another version are each refused in one sentence, whether the
object is built in Python or read from JSON. Lists are taken for tuples and become
them.
"""

import base64
import binascii
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeGuard,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mlx_onevision.plugins.contract.errors import PluginError, bad_request

API_VERSION = 1
"""Of the whole contract: requests, events, results. It rises when an older side would not
understand a newer one."""

Json = Mapping[str, Any]

_LISTS = (tuple, Sequence)  # what fields are annotated with; they always hold tuples


class Part:
    """Something inside a record.

    ``discriminator``, where a class has one, is written as the key ``kind``: it tells which of
    several classes a JSON object is.
    """

    discriminator: ClassVar[str | None] = None

    def __init_subclass__(cls, discriminator: str | None = None) -> None:
        cls.discriminator = discriminator or cls.discriminator

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _fitted(getattr(self, name), hint, name, json=False))
        self.check()

    def check(self) -> None:
        """Raises PluginError for values that have the right types and still make no sense."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; bytes are base64, and a None that says nothing is left out."""
        values: dict[str, Any] = {}
        if self.discriminator is not None:
            values["kind"] = self.discriminator
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                values[field.name] = _plain(value)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The object that :meth:`to_dict` was taken of. Raises PluginError: ``bad_request``, saying
        in one sentence what is wrong with ``values``.
        """
        return _read(cls, values, "")


class Record(Part):
    """Something that travels alone, with the contract's version."""

    def to_dict(self) -> dict[str, Any]:
        return {"api_version": API_VERSION, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return _read(cls, without_version(values, cls.__name__), "")


def is_object(value: Any) -> TypeGuard[Json]:
    """Whether a value that was read from JSON is an object, whose keys are texts."""
    return isinstance(value, Mapping)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value that was read from JSON is a list."""
    return isinstance(value, list)


def without_version(values: Any, name: str) -> dict[str, Any]:
    """A record's JSON object without its version, which is checked."""
    if not is_object(values):
        raise bad_request(f"{name} is {_kind_of(values)}; it must be an object")
    if "api_version" not in values:
        raise bad_request(f"{name} has no api_version", f"this side speaks {API_VERSION}")
    version = values["api_version"]
    if version != API_VERSION or type(version) is not int:
        message = f"{name} has api_version {_short(version)}, but this side speaks {API_VERSION}"
        raise bad_request(message, "update the older side")
    return {key: value for key, value in values.items() if key != "api_version"}


@cache
def _hints(cls: type[Part]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}  # pyright: ignore


def _read(cls: type[Any], values: Any, where: str) -> Any:
    name = where or cls.__name__
    if not is_object(values):
        raise bad_request(f"{name} is {_kind_of(values)}; it must be an object")
    given = dict(values)
    if cls.discriminator is not None:
        kind = given.pop("kind", None)
        if kind != cls.discriminator:
            raise bad_request(f"{name} has the kind {_short(kind)}, not {cls.discriminator!r}")
    hints = _hints(cls)
    unknown = sorted(_short(key) for key in given if key not in hints)
    if unknown:
        raise bad_request(f"{name} has {unknown[0]}, which does not exist")
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and given.get(field.name) is None:
            raise bad_request(f"{name} has no {field.name}")
    prefix = f"{where}." if where else ""
    read = {
        key: _fitted(value, hints[key], f"{prefix}{key}", json=True) for key, value in given.items()
    }
    try:
        return cls(**read)
    except PluginError as error:
        if not where:
            raise
        raise error.of(where) from None


def _fitted(value: Any, hint: Any, where: str, json: bool) -> Any:
    """``value`` as the type ``hint`` wants it, or a PluginError that names ``where``.

    json : whether it comes from JSON, where bytes are base64 and parts are objects.
    """
    origin, options = get_origin(hint), get_args(hint)
    if not _looks_like(value, hint, json):
        raise _wrong(value, hint, where)
    if origin in (Union, types.UnionType):
        fitting = next(option for option in options if _looks_like(value, option, json))
        return _fitted(value, fitting, where, json)
    if origin in _LISTS:
        items: Sequence[Any] = value
        return tuple(
            _fitted(item, options[0], f"{where}[{place}]", json) for place, item in enumerate(items)
        )
    if hint is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad_request(f"{where} holds half of a surrogate pair, which is no text") from None
    elif hint is float:
        value = _finite(value, where)
    elif json and hint is bytes:
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise bad_request(f"{where} is not base64") from None
    elif json and isinstance(hint, type) and issubclass(hint, Part):
        return _read(hint, value, where)
    return value


def _looks_like(value: Any, hint: Any, json: bool) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if origin in _LISTS:
        return isinstance(value, list | tuple)
    if origin in (Union, types.UnionType):
        return any(_looks_like(value, option, json) for option in get_args(hint))
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    if json and hint is bytes:
        return isinstance(value, str)
    if json and issubclass(hint, Part):
        return is_object(value) and (
            hint.discriminator is None or value.get("kind") == hint.discriminator
        )
    return isinstance(value, hint)


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad_request(f"{where} is {_short(value)}; it must be a finite number")
    return number


def _plain(value: Part | tuple[Any, ...] | bytes | str | float | None) -> Any:
    if isinstance(value, Part):
        # A record inside another needs no version of its own.
        return Part.to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value


def _wrong(value: Any, hint: Any, where: str) -> PluginError:
    literals = _literals(hint)
    if literals and isinstance(value, str):
        return bad_request(f"{where} is {_short(value)}; it must be {' or '.join(literals)}")
    return bad_request(f"{where} is {_kind_of(value)}; it must be {_words(hint)}")


def _literals(hint: Any) -> Sequence[str]:
    if get_origin(hint) is Literal:
        return [str(one) for one in get_args(hint)]
    return [word for option in get_args(hint) for word in _literals(option)]


def _words(hint: Any) -> str:
    """A type, as a person says it."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    names |= {bytes: "bytes", types.NoneType: "nothing"}
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(_literals(hint))
    if origin in _LISTS:
        return "a list"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, get_args(hint))))
    return names.get(hint) or f"a {hint.__name__}"


def _kind_of(value: Any) -> str:
    """What a value is, without saying what is in it: that may be long, or private."""
    if value is None or isinstance(value, bool | int | float):
        return _short(value)
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}…"
