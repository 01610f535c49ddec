"""Typed, ranged reading of JSON fields: a value that is off is an error that names its field."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_onevision.errors import ConfigError

Json = Mapping[str, Any]


class Reader:
    """Reads one JSON object; ``where`` names it in errors. A null counts as absent."""

    def __init__(self, values: Json, where: str) -> None:
        self.values = values
        self.where = where

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int, most: int, least: int = 1) -> int:
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(
                f"{self.where}: {key} is {value!r}, not a whole number from {least} to {most}."
            )
        return value

    def square(self, key: str, default: int, most: int) -> int:
        value = self.values.get(key)
        if isinstance(value, Sequence) and len(value) == 2 and value[0] == value[1]:
            return Reader({key: value[0]}, self.where).integer(key, default, most)
        return self.integer(key, default, most)

    def positive(self, key: str, default: float) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}: {key} is {value!r}, not a number.")
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{self.where}: {key} is {value!r}, not a positive number.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {value!r}, not true or false.")
        return value

    def choice(self, key: str, default: str, choices: frozenset[str]) -> str:
        value = self._get(key, default)
        if value not in choices:
            raise ConfigError(
                f"{self.where}: {key} is {value!r}; supported are {', '.join(sorted(choices))}."
            )
        return value
