"""How many cases of a kind are tried: few in ``make test``, many in ``make soak``."""

import os

# A share of the full numbers, 1 for all; unset or 0: the quick ones.
SOAK = float(os.environ.get("SOAK") or 0)


def cases(quick: int, full: int) -> int:
    return max(quick, round(full * SOAK))
