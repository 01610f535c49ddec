"""Stdin and stdout for the protocol alone, which speaks JSON lines.

The descriptors 0 and 1 are moved before any library is imported: from then on 0 is empty, and what
C code or a child process prints to 1 goes to stderr. Standard library only.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

READ_BYTES = 1 << 16  # bytes read at once; a pipe holds no more

# The id of a message that is not read whole, as the official clients begin it.
_ID = re.compile(
    rb'\s*\{\s*"jsonrpc"\s*:\s*"2\.0"\s*,\s*"id"\s*:\s*(-?\d{1,15}|"[^"\\]{0,99}")\s*,'
)


@dataclass(frozen=True)
class Pipes:
    """Descriptors that nothing else in this process uses."""

    source: int
    target: int

    def write(self, line: bytes) -> None:
        """Raises OSError when nobody reads any more."""
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self.target, rest) :]


@dataclass(frozen=True)
class TooLong:
    """A line that was not read. ``id`` : the message's, where it could be found."""

    id: int | str | None


def take_stdio() -> Pipes:
    """Moves stdin and stdout away; to be called once, and early. Raises OSError: where one of them
    is not open.
    """
    source, target = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # there is no stderr
        os.dup2(nothing, 1)
    os.close(nothing)
    return Pipes(source, target)


def lines(source: int, limit: int) -> Iterator[bytes | TooLong]:
    """The lines, without their ends. One of more than ``limit`` bytes is not kept."""
    held = bytearray()
    dropped: TooLong | None = None
    while piece := os.read(source, READ_BYTES):
        first, *others = piece.split(b"\n")
        held += first
        for other in others:
            if dropped is not None or len(held) > limit:
                yield dropped or _too_long(held)
            elif held.strip():
                yield bytes(held)
            held, dropped = bytearray(other), None
        if len(held) > limit:
            dropped = dropped or _too_long(held)
        if dropped is not None:
            held.clear()
    # What ends without a newline was cut off.


def _too_long(held: bytearray) -> TooLong:
    return TooLong(known_id(held))


def known_id(line: bytes | bytearray) -> int | str | None:
    """The id of a message that is not read, where it begins as the official clients write it."""
    found = _ID.match(line[:300])
    return None if found is None else json.loads(found[1].decode("utf-8", "replace"))
