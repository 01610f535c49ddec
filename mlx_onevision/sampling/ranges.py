"""The ranges of the sampling settings, for the library, the plugin contract and its hosts. Standard
library only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_onevision.errors import RequestError

MOST_BIAS = 100.0
"""The most that a token's logit is changed by, up or down."""

MOST_LOGPROBS = 20
"""The most alternatives reported for each token."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: at least ``ge``, above ``gt``, at most ``le``; whole
    numbers only where ``whole``.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether it is a number within the bounds; NaN and infinities never are."""
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            return False
        if self.whole and type(value) is not int:
            return False
        if not -math.inf < value < math.inf:
            return False
        above = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        return above and (self.le is None or value <= self.le)

    @property
    def bounds(self) -> dict[str, Any]:
        """As the arguments of a pydantic ``Field``."""
        bounds = {"ge": self.ge, "gt": self.gt, "le": self.le}
        return {name: value for name, value in bounds.items() if value is not None}

    def __str__(self) -> str:
        low = f"{self.ge} or more" if self.gt is None else f"above {self.gt}"
        high = "" if self.le is None else f" and at most {self.le}"
        return f"{low}{high if self.le != 2**64 - 1 else ' and below 2**64'}"


RANGES: Mapping[str, Range] = {
    "max_tokens": Range(ge=1, whole=True),
    "temperature": Range(ge=0),
    "top_p": Range(gt=0, le=1),
    "top_k": Range(ge=0, whole=True),
    "min_p": Range(ge=0, le=1),
    "repetition_penalty": Range(gt=0),
    "presence_penalty": Range(ge=-2, le=2),
    "frequency_penalty": Range(ge=-2, le=2),
    "seed": Range(ge=0, le=2**64 - 1, whole=True),
    "prompt_lookup": Range(ge=0, le=64, whole=True),
    "draft_tokens": Range(ge=0, le=64, whole=True),
    "visual_tokens": Range(gt=0, le=1),
    "logprobs": Range(ge=0, le=MOST_LOGPROBS, whole=True),
}


def check_range(name: str, value: float) -> None:
    """Raises RequestError for a value that the setting ``name`` cannot have."""
    allowed = RANGES[name]
    if not allowed.holds(value):
        number = "a whole number, " if allowed.whole else ""
        raise RequestError(f"{name} must be {number}{allowed}, not {value!r}")
