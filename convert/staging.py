"""A folder that is either the old one or the whole new one, at every moment.

The new folder is made beside the target, under a name that nothing loads, and locked while its
maker lives. What a killed run leaves behind is unlocked, and the next run removes it.
"""

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import sys
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from mlx_onevision.convert.hub import is_model_file
from mlx_onevision.convert.report import size
from mlx_onevision.convert.writer import failure, flush_folder
from mlx_onevision.errors import RequestError, StorageError

logger = logging.getLogger("mlx_onevision")

# ".name.mlx-onevision-1a2b3c4d" is being made; "...-old-1a2b3c4d" was there before.
TEMPORARY = re.compile(r"\.(.+)\.mlx-onevision-(old-)?[0-9a-f]{8}", re.DOTALL)

RENAME_EXCHANGE = RENAME_SWAP = 2  # from linux/fs.h and macOS' stdio.h
AT_FDCWD = -100
# Errors of a system or a file system that cannot swap two folders.
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)

# What systems and the Hub put into folders by themselves.
IGNORED = (".DS_Store", ".gitattributes", "._")  # the last: beside each file, macOS's on exFAT


class Staging:
    """``with Staging(target, overwrite) as staging:`` fill ``staging.path``, then ``publish()``.
    Without that, and when it fails, nothing is left and the target is what it was.

    Raises:
        RequestError: for a target that may not be replaced.
        StorageError: when the system does not do it.
    """

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        self.target = require_target(target, overwrite)
        self._overwrite = overwrite
        self._published = False

    def __enter__(self) -> Self:
        try:
            remove_leftovers(self.target.parent)
            while True:
                self.path = _beside(self.target)
                # Whatever comes between here and the end, such as a signal that ends the process.
                self._removal = weakref.finalize(self, _discard, self.path)
                self.path.mkdir()
                with suppress(FileNotFoundError):  # taken for a leftover by another run, just now
                    self._lock = _open(self.path)
                    if _try_lock(self._lock, self.path) is not False:
                        return self
                    os.close(self._lock)
        except OSError as error:
            raise failure(self.target.parent, error) from error

    def __exit__(self, *_: object) -> None:
        try:
            if self._published:
                self._removal.detach()
            self._removal()
        finally:
            os.close(self._lock)

    def publish(self) -> None:
        """Puts the new folder in the target's place, in one step; the old one is deleted then."""
        flush_folder(self.path)
        require_target(self.target, self._overwrite)  # somebody may have been faster
        old: Path | None = None
        try:
            if not self._overwrite or not self.target.exists() or not any(self.target.iterdir()):
                # Fails where something is there, as somebody else's model by now.
                os.rename(self.path, self.target)
            elif exchange(self.path, self.target):
                old = self.path
            else:
                old = _replace(self.path, self.target)
        except OSError as error:
            if self.target.exists() and not self._overwrite:
                raise _refusal(self.target) from None
            raise failure(self.target, error) from error
        self._published = True
        try:
            flush_folder(self.target.parent)
        except StorageError:
            logger.warning("%s is there, but might not outlast a power failure", self.target)
        if old is not None:
            _discard(old)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two folders of one file system in one step; False, and nothing done, where the system
    cannot. Raises OSError when it can, but does not.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, RENAME_SWAP)
        else:
            failed = library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE)
    except AttributeError:  # a C library without it
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in UNABLE:
        return False
    raise OSError(number, os.strerror(number), str(one))


def require_target(target: Path, overwrite: bool) -> Path:
    """The folder to write, every link in its name followed. Raises RequestError if it has no parent
    folder, is there without ``overwrite``, or holds anything that is not a model's.
    """
    try:
        target = target.expanduser().resolve()
    except (OSError, RuntimeError):
        raise RequestError(f"{target} is not a name that a folder can have") from None
    if not target.name or not target.parent.is_dir():
        raise RequestError(f"there is no folder {target.parent} to write {target.name} into")
    if not os.path.lexists(target):
        return target
    if not target.is_dir():
        raise RequestError(f"{target} is a file; name a new folder")
    names = sorted(path.name for path in target.iterdir() if not path.name.startswith(IGNORED))
    if not names:
        return target
    if not overwrite:
        raise _refusal(target)
    foreign = [n for n in names if not is_model_file(target / n) or (target / n).is_dir()]
    if foreign or "config.json" not in names:
        what = f"holds {foreign[0]}" if foreign else "holds no config.json"
        raise RequestError(f"{target} {what}, so it is not only a model; name another folder")
    return target


def require_space(folder: Path, needed: int) -> None:
    """Raises StorageError when a folder's disk has less than ``needed`` bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise failure(folder, error) from error
    if needed > free:
        raise StorageError(
            f"{size(needed)} are needed in {folder}, and {size(free)} are free; "
            "free some space or name a folder on another disk"
        )


def remove_leftovers(parent: Path) -> None:
    """Removes what killed runs left in a folder; puts back what one had moved away."""
    for path in sorted(parent.iterdir()):
        found = TEMPORARY.fullmatch(path.name)
        if found is None or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError), _held(path) as held:
            if not held:
                continue  # its maker is at work, or nobody can know
            original = parent / found[1]
            if found[2] and not os.path.lexists(original):
                os.rename(path, original)
            else:
                _discard(path)


def _replace(new: Path, target: Path) -> Path:
    """Two steps, for systems that cannot swap; the next run mends one killed between them."""
    old = _beside(target, "old-")
    with _held(target):
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
    return old


def _discard(folder: Path) -> None:
    """Deletes a folder, first of all what makes it a model: half of one must not load."""
    with suppress(OSError):
        os.unlink(folder / "config.json")
    shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path, kind: str = "") -> Path:
    return target.with_name(f".{target.name}.mlx-onevision-{kind}{secrets.token_hex(4)}")


@contextmanager
def _held(folder: Path) -> Generator[bool]:
    """Whether this process has locked a folder meanwhile."""
    descriptor = _open(folder)
    try:
        yield _try_lock(descriptor, folder) is True
    finally:
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _try_lock(descriptor: int, folder: Path) -> bool | None:
    """Locks an open folder until it is closed or the process ends. False where another process has
    it, or the folder has gone; None where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _refusal(target: Path) -> RequestError:
    return RequestError(f"{target} is there already; name another folder, or give --overwrite")
