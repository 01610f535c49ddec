"""A folder's weight files: which belong together, what is in them, and one name for each tensor.

The published checkpoints name the same tensor in five ways: the Hub's original layout, those of
transformers 4.52 and 5, the original lmms-lab one, and mlx-vlm's. ``canonical_name`` maps them all
to the module tree of ``network.onevision``. Nothing here reads tensor data but ``same_bytes``.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mlx_onevision.errors import CheckpointError, short
from mlx_onevision.files import read_json

# The safetensors header, checked before anything else reads the file.
#
# MLX's own reader takes files whose tensors overlap or leave holes, so what it is given is checked
# here first. A header is accepted when the safetensors library's own (Rust) reader accepts it,
# except that this one also refuses duplicate keys, tensors described by position instead of by key,
# and more than ``MAX_TENSORS`` tensors, ``MAX_DIMENSIONS`` dimensions or ``MAX_ITEMS`` JSON items.

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


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# In the files, never used: the tower's features are taken before post_layernorm and the head.
UNUSED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|position_ids)|vision_tower\.(head|post_layernorm)\..*"
)
# Of these, what other programs ask for all the same.
NORM = ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")
RENAMED = (
    ("model.", ""),
    ("vision_tower.vision_tower.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("embed_tokens.", "language_model.embed_tokens."),
    ("layers.", "language_model.layers."),
    ("norm.", "language_model.norm."),
    ("mm_projector.0.", "multi_modal_projector.linear_1."),
    ("mm_projector.2.", "multi_modal_projector.linear_2."),
)
WRITTEN = (
    ("language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("vision_tower.", "vision_tower.vision_model."),
)


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk: ``name`` is canonical, ``source`` is the file's own name for it.

    Its bytes are ``[start, stop)`` of ``file``; ``dtype`` is safetensors' word for it ("BF16").
    """

    name: str
    source: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def canonical_name(name: str) -> str | None:
    """The module tree's name for a tensor or a module of any layout; None if it is never used.

    ``scales`` and ``biases`` of quantised modules follow their weight. A name of no known layout
    comes back as it is.
    """
    name = _renamed(name)
    return None if UNUSED.fullmatch(name) else name


def written_name(name: str) -> str:
    """The name that mlx-vlm, and so the converter, has for a tensor or module of the module
    tree.
    """
    for prefix, replacement in WRITTEN:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def _renamed(name: str) -> str:
    for prefix, replacement in RENAMED:
        if f"{name}.".startswith(prefix):
            name = (replacement + f"{name}."[len(prefix) :]).removesuffix(".")
    return name


def read_weights(folder: Path, also: Collection[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its canonical name, unused ones left out but for ``also``.

    As in the reference, model.safetensors counts where it stands beside an index that does not name
    it, and files that the index does not name are left alone.

    Raises:
        CheckpointError: if there are no weights, a shard is missing or damaged, the index and the
            shards disagree, or two tensors mean the same one.
    """
    index = _read_index(folder)
    if index is not None and SINGLE not in index.values() and (folder / SINGLE).is_file():
        index = None
    files = _shards(folder) if index is None else _indexed(folder, index)
    tensors: dict[str, Tensor] = {}
    for path in files:
        header = read_header(path)
        if index is not None:
            _require_named(path.name, index, header)
        for source, entry in header.items():
            if index is not None and index.get(source, path.name) != path.name:
                continue  # another shard has the copy that counts
            name = _renamed(source)
            if UNUSED.fullmatch(name) and name not in also:
                continue
            if name in tensors:
                raise CheckpointError(
                    f"{short(tensors[name].source)} in {tensors[name].file.name} and "
                    f"{short(source)} in {path.name} are the same tensor"
                )
            tensors[name] = Tensor(
                name, source, path, entry.dtype, entry.shape, entry.start, entry.stop
            )
    return tensors


def same_bytes(one: Tensor, other: Tensor, chunk: int = 1 << 22) -> bool:
    """Whether two tensors hold the same values, read ``chunk`` bytes at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.stop - one.start
        while left > 0:
            step = min(chunk, left)
            if a.read(step) != b.read(step):
                return False
            left -= step
    return True


def _read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file name, or None where the folder has none."""
    values = read_json(folder / INDEX)
    if values is None:
        return None
    index = values.get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{INDEX} has no weight_map")
    for source, name in index.items():
        # A shard is a file of this folder: an index must not point anywhere else.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{INDEX} names a file outside its folder for {short(source)}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX} names {short(name)}, but only .safetensors files are opened"
            )
    return index


def _indexed(folder: Path, index: Mapping[str, str]) -> list[Path]:
    names = sorted(set(index.values()))
    _require_files(folder, names)
    return [folder / name for name in names]


def _require_named(name: str, index: Mapping[str, str], header: Iterable[str]) -> None:
    held = set(header)
    lacking = [source for source, file in index.items() if file == name and source not in held]
    if lacking:
        raise CheckpointError(f"{INDEX} says that {name} has {_some(lacking)}; it does not")


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder without an index: one, or one complete set of shards."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if not names:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickled:
            raise CheckpointError(
                f"{folder} has only pickled weights ({_some(pickled)}), which are never opened; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{folder} has no weights: no .safetensors file is in it")
    if len(names) == 1 and not SHARD.fullmatch(names[0]):
        return [folder / names[0]]
    parts = [SHARD.fullmatch(name) for name in names]
    sets = {(part[1], part[3]) for part in parts if part}
    if None in parts or len(sets) != 1:
        raise CheckpointError(
            f"{folder} has several weight files ({_some(names)}) and no {INDEX} to say which count"
        )
    ((stem, count),) = sets
    wanted = [f"{stem}-{n + 1:05d}-of-{count}.safetensors" for n in range(int(count))]
    _require_files(folder, wanted)
    return [folder / name for name in wanted]


def _require_files(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_some(missing)} of its {len(names)} weight files; "
            "download or copy it again"
        )


def _some(names: list[str], most: int = 3) -> str:
    """The first few of a list of names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(short(name) for name in names[:most]) + (
        f" and {rest} more" if rest > 0 else ""
    )
