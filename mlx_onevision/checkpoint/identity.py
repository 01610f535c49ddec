"""Which model made something: a name for people, and a mark that changes when the weights do."""

import re
from hashlib import blake2b
from pathlib import Path

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.errors import ModelNotFoundError

COMMIT = re.compile(r"[0-9a-f]{40}")
SAMPLE = 1 << 16  # bytes


def identify(folder: Path) -> tuple[str, str]:
    """The name of a checkpoint's folder, and its revision.

    In the Hub's cache these are the repository's id and the commit. Elsewhere the name is the
    folder's own, and the revision is a hash: of config.json, and of each weight file's size and its
    first and last 64 KB. That notices any other training run without reading all of it.

    Raises:
        ModelNotFoundError: for a folder whose files cannot be read (any more).
    """
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    digest = blake2b(digest_size=20)
    try:
        digest.update((folder / "config.json").read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE))
                file.seek(max(size - SAMPLE, 0))
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise ModelNotFoundError(
            f"{folder} cannot be read any more: {error.strerror}; load the model again"
        ) from None
    name = "demo" if folder == EMBEDDED else folder.resolve().name
    return name, digest.hexdigest()
