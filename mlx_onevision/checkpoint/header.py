"""The safetensors header, checked before anything else reads the file.

MLX's own reader takes files whose tensors overlap or leave holes, so what it is given is checked
here first. A header is accepted when the safetensors library's own (Rust) reader accepts it, except
that this one also refuses duplicate keys, tensors described by position instead of by key, and more
than ``MAX_TENSORS`` tensors, ``MAX_DIMENSIONS`` dimensions or ``MAX_ITEMS`` JSON items.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mlx_onevision.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_ITEMS = 2_000_000  # of JSON, so that a hostile header cannot fill the memory
MAX_DEPTH = 127  # of JSON nesting, as the Rust reader has it
SIZE_LIMIT = 2**64  # shapes, offsets and their products are 64-bit there

# Bits per element of every dtype that the format defines.
BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# What a file that is not safetensors begins with, and what to say about it.
FOREIGN = (
    (b"PK\x03\x04", "it is a pickled PyTorch archive under another name, which is never opened"),
    (b"\x80\x02", "it is a pickle under another name, which is never opened"),
    (b"\x80\x03", "it is a pickle under another name, which is never opened"),
    (b"\x80\x04", "it is a pickle under another name, which is never opened"),
    (b"\x80\x05", "it is a pickle under another name, which is never opened"),
    (b"GGUF", "it is a GGUF file under another name, which is not supported"),
    (b"version ", "it is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are ``[start, stop)``, counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Invalid(Exception):
    """Why a header is refused."""


def short(name: str, most: int = 100) -> str:
    """A name that is safe to print: it comes from the file, which may be hostile."""
    text = name if len(name) <= most else f"{name[:most]}…"
    return text if text.isprintable() else repr(text)[1:-1]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name, in the order of their bytes.

    Raises:
        CheckpointError: if the file cannot be read or is not exactly what the format says.
    """
    try:
        with path.open("rb") as file:
            return _parse(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    except _Invalid as why:
        raise CheckpointError(f"{path.name} is not a valid safetensors file: {why}") from None


def _parse(file: BinaryIO, size: int) -> dict[str, Entry]:
    prefix = file.read(8)
    for magic, what in FOREIGN:
        # A pickle's first bytes, read as a length, always exceed a header's: no real file is lost.
        if prefix.startswith(magic) and int.from_bytes(prefix, "little") > MAX_HEADER_BYTES:
            raise _Invalid(what)
    if len(prefix) < 8:
        raise _Invalid(f"it is cut short, with {size} bytes and no header")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise _Invalid(f"its header claims {length} bytes")
    if 8 + length > size:
        raise _Invalid(f"it is cut short: its header of {length} bytes ends beyond the file")
    tensors = _tensors(_decode(file.read(length)))
    entries: dict[str, Entry] = {}
    at = 0
    for name, (dtype, shape, (begin, end)) in sorted(tensors.items(), key=lambda item: item[1][2]):
        if begin != at or end < begin:
            raise _Invalid(
                f"the bytes of '{short(name)}' are [{begin}, {end}), "
                f"which overlap another tensor's or leave a gap after {at}"
            )
        if end - begin != (needed := _byte_size(name, dtype, shape)):
            raise _Invalid(
                f"'{short(name)}' has {end - begin} bytes, but {needed} are "
                f"needed for {dtype} {list(shape)}"
            )
        entries[name] = Entry(dtype, shape, 8 + length + begin, 8 + length + end)
        at = end
    if 8 + length + at != size:
        kind = "it is cut short" if 8 + length + at > size else "it has bytes that no tensor owns"
        raise _Invalid(f"{kind}: {8 + length + at} bytes are described, {size} are there")
    return entries


def _decode(header: bytes) -> dict[str, Any]:
    """The header's JSON, held to the rules of the Rust reader where Python's are laxer."""
    if sum(header.count(mark) for mark in b"[{,:") > MAX_ITEMS:
        raise _Invalid(f"it has more than {MAX_ITEMS} items in its header")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise _Invalid(f"its header has '{short(name)}' twice")
            result[name] = value
        return result

    def constant(name: str) -> NoReturn:
        raise ValueError(name)

    def fraction(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(digits)
        return value

    def whole(digits: str) -> float:
        value = int(digits)
        float(value)  # overflows where the Rust reader calls the number out of range
        return value if digits != "-0" else -0.0

    try:
        text = header.decode("utf-8")
        values = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=fraction,
            parse_int=whole,
        )
        if "\\u" in text:  # Python lets an escaped lone surrogate pass
            json.dumps(values, ensure_ascii=False).encode("utf-8")
    except (ValueError, OverflowError, RecursionError):
        raise _Invalid("its header is not valid JSON") from None
    if not isinstance(values, dict):
        raise _Invalid("its header is not a JSON object")
    return values


def _tensors(
    values: dict[str, Any],
) -> dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]:
    metadata = values.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    ):
        raise _Invalid("its metadata is not text by name")
    if len(values) > MAX_TENSORS:
        raise _Invalid(f"it has more than {MAX_TENSORS} tensors, the most that is accepted")
    tensors = {}
    for name, info in values.items():
        if not isinstance(info, dict):
            raise _Invalid(f"'{short(name)}' is not described by an object")
        dtype, shape, offsets = (info.pop(key, None) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in BITS:
            raise _Invalid(f"'{short(name)}' has an unknown dtype")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise _Invalid(f"'{short(name)}' has no valid shape and offsets")
        if len(shape) > MAX_DIMENSIONS:
            raise _Invalid(
                f"it has a tensor of {len(shape)} dimensions, '{short(name)}'; "
                f"the most that is accepted is {MAX_DIMENSIONS}"
            )
        if any(_depth(value) > MAX_DEPTH - 2 for value in info.values()):
            raise _Invalid("its header is not valid JSON")
        tensors[name] = (dtype, tuple(shape), (offsets[0], offsets[1]))
    return tensors


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < SIZE_LIMIT for n in value)


def _byte_size(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    bits = 1
    for factor in (*shape, BITS[dtype]):
        bits *= factor
        if bits >= SIZE_LIMIT:  # at any step, as a 64-bit machine would overflow
            raise _Invalid(f"the size of '{short(name)}' overflows")
    if bits % 8:
        raise _Invalid(f"'{short(name)}' does not fill whole bytes")
    return bits // 8


def _depth(value: Any) -> int:
    """How deeply a JSON value nests; 0 for a plain one. Without recursion: the input is hostile."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth
