"""A folder's weight files: which belong together, what is in them, and one name for each tensor.

The published checkpoints name the same tensor in five ways: the Hub's original layout, those of
transformers 4.52 and 5, the original lmms-lab one, and mlx-vlm's. ``canonical_name`` maps them all
to the module tree of ``network.onevision``. Nothing here reads tensor data but ``same_bytes``.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_onevision.checkpoint.header import read_header, short
from mlx_onevision.errors import CheckpointError
from mlx_onevision.files import read_json

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
