"""A disk that is full: the system itself refuses to write on, in the middle of a file."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hostile.sizes import cases

from mlx_onevision.errors import sentence


@contextmanager
def full(nbytes: int) -> Iterator[None]:
    """Meanwhile no file of this process may become larger (EFBIG; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def offsets(size: int) -> Sequence[int]:
    """Where it fills up, in a file of so many bytes."""
    count = cases(5, 20)
    return [size * n // count for n in range(count)]


def refusal(error: Exception) -> str:
    """The error that is reported, which must be of a disk and no defect."""
    text = sentence(error)
    assert "File too large" in text and "\n" not in text and len(text) < 400, repr(error)
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
