"""The list of a converted folder's files: written last, so that a folder that has it is whole.

The loader compares sizes, which costs nothing; the converter, which has just written the files,
compares their hashes too.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from mlx_onevision.errors import CheckpointError, short
from mlx_onevision.files import read_json

NAME = "mlx_onevision_manifest.json"
FORMAT = 1
CHUNK = 1 << 24  # bytes

# May be edited: people write on a model's card, and the network does not depend on it.
EDITABLE = ("README.md",)


@dataclass(frozen=True)
class File:
    """One file: ``size`` in bytes, ``sha256`` in hexadecimal digits."""

    size: int
    sha256: str


def text(files: Mapping[str, File]) -> str:
    """The manifest of a folder with these files."""
    listed = {
        name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(files.items())
    }
    return json.dumps({"format": FORMAT, "files": listed}, indent=1) + "\n"


def check(
    folder: Path, hashes: bool = False, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Compares a folder with its manifest. A folder without one is not the converter's, and passes.

    hashes : read the files and compare their SHA-256 as well.
    progress : called with how many bytes have just been read.

    Raises:
        CheckpointError: naming the first file that is missing or differs, or a weight file that
            the manifest does not know.
    """
    files = _read(folder)
    if files is None:
        return
    for name, file in files.items():
        path = folder / name
        if name in EDITABLE and not hashes:
            continue
        try:
            size = path.stat().st_size
        except OSError:
            raise CheckpointError(
                f"{folder} lacks {short(name)}, which its manifest lists; "
                "convert, download or copy it again"
            ) from None
        if size != file.size:
            raise CheckpointError(
                f"{short(name)} has {size} bytes, and {file.size} by the folder's manifest; convert"
                f" or copy it again, or delete {NAME} if you changed it yourself"
            )
        if hashes and _digest(path, progress) != file.sha256:
            raise CheckpointError(f"{short(name)} does not hold what was written into it")
    weights = {path.name for path in folder.glob("[!.]*.safetensors")}
    if unknown := sorted(weights - files.keys()):
        raise CheckpointError(
            f"{folder} has {short(unknown[0])}, which its manifest does not list; remove it, "
            f"or delete {NAME}"
        )


def _read(folder: Path) -> dict[str, File] | None:
    """The files that a folder's manifest lists; None where it has none."""
    values = read_json(folder / NAME)
    if values is None:
        return None
    listed = values.get("files")
    if values.get("format") != FORMAT or not isinstance(listed, dict):
        raise CheckpointError(f"{NAME} is of another format; update mlx-onevision")
    files: dict[str, File] = {}
    for name, entry in cast(dict[str, Any], listed).items():
        file = _file(entry)
        if Path(name).name != name or "\\" in name or "\0" in name or file is None:
            raise CheckpointError(f"{NAME} has no valid entry for {short(name)}; delete it")
        files[name] = file
    return files


def _digest(path: Path, progress: Callable[[int], None]) -> str:
    digest = sha256()
    buffer = bytearray(min(CHUNK, path.stat().st_size + 1))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            progress(count)
    return digest.hexdigest()


def _file(entry: Any) -> File | None:
    """An entry of the manifest; None where it is none."""
    if not isinstance(entry, dict):
        return None
    size, digest = (cast(dict[str, Any], entry).get(key) for key in ("size", "sha256"))
    return File(size, digest) if type(size) is int and isinstance(digest, str) else None
