"""A folder's weight files: which belong together, what is in them, and one name for each tensor.

The published checkpoints name the same tensor in five ways: the Hub's original layout, those of
transformers 4.52 and 5, the original lmms-lab one, and mlx-vlm's. ``canonical_name`` maps them all
to the module tree of ``network.onevision``. Headers are parsed and checked by the safetensors
library, because MLX's own reader takes files whose tensors overlap or leave holes. Nothing here
reads tensor data but ``same_bytes``.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from mlx_onevision.errors import CheckpointError, short
from mlx_onevision.files import read_json

# Bounds on a header, so that an untrusted one cannot fill the memory. The first is the library's.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 20_000
MAX_ITEMS = 2_000_000  # of JSON

PICKLE = "it is a pickle under another name, which is never opened"
# What a file that is not safetensors begins with, and what to say about it.
FOREIGN: Mapping[bytes, str] = {
    b"PK\x03\x04": "it is a pickled PyTorch archive under another name, which is never opened",
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), PICKLE),
    b"GGUF": "it is a GGUF file under another name, which is not supported",
    b"version ": "it is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'",
}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
ADAPTERS = ("adapter_model.safetensors", "adapters.safetensors")  # these may lie beside a model
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

EMBEDDING = "language_model.embed_tokens"  # modules of the network
HEAD = "lm_head"

# In the files, never used: the tower's features are taken before post_layernorm and the head.
UNUSED = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|position_ids)|vision_tower\.(head|post_layernorm)\..*"
)
# Of these, what other programs ask for all the same.
POST_LAYERNORM = ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")
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

    part : an axis, which of its equal parts this is, and of how many; ``shape`` is the part's, and
        the bytes are those of the whole.
    """

    name: str
    source: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    part: tuple[int, int, int] | None = None


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by its own names for them, in the order of their bytes.

    Raises:
        CheckpointError: if the file cannot be read, the safetensors library does not accept it, or
            its header is beyond the bounds.
    """
    tensors: dict[str, Tensor] = {}
    try:
        stop = _check_header_size(path)
        opened: Any = safe_open(path, framework="numpy")
        with opened as file:
            for source in file.offset_keys():
                entry = file.get_slice(source)
                dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
                # The library has checked that the tensors follow each other without a gap.
                start, stop = stop, stop + prod(shape) * bits_per_value(dtype) // 8
                tensors[source] = Tensor(_renamed(source), source, path, dtype, shape, start, stop)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    except SafetensorError as error:
        reason = short(str(error).removeprefix("Error while deserializing header: "))
        raise CheckpointError(
            f"{path.name} is not a valid safetensors file: {reason} (it has "
            f"{path.stat().st_size} bytes); download or copy it again"
        ) from None
    return tensors


def _check_header_size(path: Path) -> int:
    """The length of a header in bytes, its length field included."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            reasons = (what for magic, what in FOREIGN.items() if prefix.startswith(magic))
            reason = next(reasons, f"its header claims {length} bytes")
            raise CheckpointError(f"{path.name} is not a valid safetensors file: {reason}")
        header = file.read(length)
    # A tensor has two lists, its shape and its offsets.
    if header.count(b"[") > 2 * MAX_TENSORS or sum(map(header.count, b"[{,:")) > MAX_ITEMS:
        raise CheckpointError(
            f"{path.name} has more than {MAX_TENSORS} tensors or {MAX_ITEMS} items in its header, "
            "the most that are accepted"
        )
    return 8 + length


def bits_per_value(dtype: str) -> int:
    """Of one of safetensors' dtypes: the first number in its name ("F8_E4M3"), 8 for "BOOL"."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def canonical_name(name: str) -> str | None:
    """The module tree's name for a tensor or a module of any layout; None if it is never used.

    ``scales`` and ``biases`` of quantized modules follow their weight. A name of no known layout
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
    files = _shards(folder) if index is None else sorted(set(index.values()))
    _require_files(folder, files)
    tensors: dict[str, Tensor] = {}
    for file in files:
        header = read_header(folder / file)
        if index is not None:
            _require_named(file, index, header)
        for source, tensor in header.items():
            if index is not None and index.get(source, file) != file:
                continue  # another shard has the copy that counts
            if UNUSED.fullmatch(tensor.name) and tensor.name not in also:
                continue
            if other := tensors.get(tensor.name):
                raise CheckpointError(
                    f"{short(other.source)} in {other.file.name} and "
                    f"{short(source)} in {file} are the same tensor"
                )
            tensors[tensor.name] = tensor
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
    files = cast(dict[str, Any], index)
    for source, name in files.items():
        # A shard is a file of this folder: an index must not point anywhere else.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{INDEX} names a file outside its folder for {short(source)}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{INDEX} names {short(name)}, but only .safetensors files are opened"
            )
    return files


def _require_named(name: str, index: Mapping[str, str], header: Iterable[str]) -> None:
    held = set(header)
    lacking = [source for source, file in index.items() if file == name and source not in held]
    if lacking:
        raise CheckpointError(f"{INDEX} says that {name} has {_some(lacking)}; it does not")


def _shards(folder: Path) -> list[str]:
    """The weight files of a folder without an index: one, or one complete set of shards."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    # Dot files are none: on exFAT, macOS keeps an extended attribute in "._" beside the file.
    names = sorted(path.name for path in folder.glob("[!.]*.safetensors") if path.is_file())
    names = [name for name in names if name not in ADAPTERS]
    if not names:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickled:
            raise CheckpointError(
                f"{folder} has only pickled weights ({_some(pickled)}), which are never opened; "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{folder} has no weights: no .safetensors file is in it")
    parts = [SHARD.fullmatch(name) for name in names]
    if len(names) == 1 and parts[0] is None:
        return names
    sets = {(part[1], part[3]) for part in parts if part}
    if None in parts or len(sets) != 1:
        raise CheckpointError(
            f"{folder} has several weight files ({_some(names)}) and no {INDEX} to say which count"
        )
    ((stem, count),) = sets
    return [f"{stem}-{n + 1:05d}-of-{count}.safetensors" for n in range(int(count))]


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
