"""Media that are sent before the requests about them: files in a private folder of this process.

The folder is locked as long as its process lives, and deleted at its end. What a process that was
killed has left is deleted by the next one. Standard library only.
"""

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import BinaryIO

from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import SNIFF_BYTES, Kind, sniff
from mlx_onevision.plugins.contract.streams import background

FOLDER_PREFIX = "process-"
LOCK_FILE = "lock"
IDLE_SECONDS = 60.0  # without a request, after which a file makes room for others


@dataclass(eq=False)
class Upload:
    """A file of a :class:`Spool`; changed under the spool's lock.

    size : bytes so far. kind : known once the first of them are there. used : when a request was
        last about it (``monotonic``). users : how many requests use it, its upload included.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    size: int = 0
    kind: Kind | None = None
    used: float = field(default_factory=monotonic)
    users: int = 0


class Spool:
    """Uploads on disk. Every method may be called from any thread.

    parent : the folder that the process's own is made in, with the first upload.
    max_file_bytes : of one file. max_total_bytes : of all of them together.
    max_files : at once.
    retention_seconds : without a request about it, after which a file is deleted.
    """

    def __init__(
        self,
        parent: Path,
        *,
        max_file_bytes: int,
        max_total_bytes: int,
        max_files: int = 64,
        retention_seconds: float = 900.0,
    ) -> None:
        self.max_file_bytes, self.retention_seconds = max_file_bytes, retention_seconds
        self._parent, self._max_total_bytes, self._max_files = parent, max_total_bytes, max_files
        self._uploads: dict[str, Upload] = {}
        self._folder: Path | None = None
        self._lock_file: int | None = None
        self._closed = self._sweeps = False
        self._lock = threading.Lock()
        background.start()
        with suppress(OSError):
            _delete_left(parent)

    @contextmanager
    def receive(self) -> Generator["Receiver"]:
        """A new file, which is deleted unless :meth:`Receiver.finish` was called. Raises
        PluginError: ``busy`` where there are too many.
        """
        with self._lock:
            folder = self._made_folder()
            self._forget()
            if len(self._uploads) >= self._max_files and not self._delete_idle():
                hint = "delete one, or try again in a minute"
                raise PluginError("busy", f"{self._max_files} uploads are kept", hint)
            upload = Upload(users=1)
            self._uploads[upload.id] = upload
        receiver = None
        try:
            with _disk_errors():
                receiver = Receiver(self, upload, folder / upload.id)
            yield receiver
        finally:
            if receiver is not None:
                receiver.close()
            with self._lock:
                if receiver is None or not receiver.finished:
                    self._delete(upload)
                self._let_go(upload)

    def upload(self, id: str) -> Upload:
        """Raises PluginError: ``bad_request`` for one that is not there, or not any more."""
        with self._lock:
            return self._found(id)

    @contextmanager
    def using(self, id: str) -> Generator[None]:
        """Keeps a file while a request is about it. Raises PluginError: as :meth:`upload`."""
        with self._lock:
            upload = self._found(id)
            upload.users += 1
        try:
            yield
        finally:
            with self._lock:
                self._let_go(upload)

    def open(self, id: str) -> BinaryIO:
        """A file from its beginning, unbuffered; its ``name`` says nothing of where it lies. Raises
        PluginError: as :meth:`upload`, also where somebody else has deleted it.
        """
        with self._lock:
            upload = self._found(id)
            path = self._made_folder() / id
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                self._delete(upload)
                raise _gone(id) from None
        return open(f"upload:{id}", "rb", buffering=0, opener=lambda _path, _flags: descriptor)

    def delete(self, id: str) -> None:
        """Deletes a file; requests that have opened it read it to its end. Raises PluginError: as
        :meth:`upload`.
        """
        with self._lock:
            self._delete(self._found(id))

    def close(self) -> None:
        """Deletes everything, for good."""
        with self._lock:
            self._closed = True
            self._uploads.clear()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._unlock()

    def grow(self, upload: Upload, size: int) -> None:
        """Counts bytes that are about to be written. Raises PluginError: ``too_large``, and
        ``busy`` where the files of others take the room.
        """
        with self._lock:
            if self._closed:
                raise _gone(upload.id)
            if upload.size + size > self.max_file_bytes:
                message = f"the file has more than {self.max_file_bytes / 2**20:,.0f} MB"
                raise PluginError("too_large", message, "send something smaller")
            while sum(one.size for one in self._uploads.values()) + size > self._max_total_bytes:
                if not self._delete_idle():
                    message = f"uploads take {self._max_total_bytes / 2**20:,.0f} MB already"
                    raise PluginError("busy", message, "delete one, or try again in a minute")
            upload.size += size

    # Under the lock.

    def _made_folder(self) -> Path:
        if self._closed:
            raise bad_request("no more uploads are taken", "start the server again")
        if self._folder is not None and not self._folder.is_dir():  # whoever cleaned the cache
            self._uploads = {id: one for id, one in self._uploads.items() if one.users}
            self._unlock()
        if self._folder is None:
            with _disk_errors(), _locked(self._parent / LOCK_FILE):
                self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=self._parent))
                self._lock_file = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        return self._folder

    def _unlock(self) -> None:
        """Forgets the folder."""
        if self._lock_file is not None:
            os.close(self._lock_file)
        self._folder = self._lock_file = None

    def _found(self, id: str) -> Upload:
        self._forget()
        upload = self._uploads.get(id)
        if upload is None or upload.kind is None:
            raise _gone(id)
        upload.used = monotonic()
        return upload

    def _let_go(self, upload: Upload) -> None:
        upload.users -= 1
        upload.used = monotonic()
        if self._uploads and not self._sweeps:
            self._sweeps = True
            background.call_later(self.retention_seconds, self._sweep)

    def _sweep(self) -> None:
        with self._lock:
            self._forget()
            self._sweeps = bool(self._uploads)
            if self._sweeps:
                background.call_later(self.retention_seconds, self._sweep)

    def _forget(self) -> None:
        for upload in self._idle(self.retention_seconds):
            self._delete(upload)

    def _delete_idle(self) -> bool:
        """Deletes the file that was not asked about for longest; False if there is none."""
        idle = self._idle(IDLE_SECONDS)
        if idle:
            self._delete(min(idle, key=lambda upload: upload.used))
        return bool(idle)

    def _idle(self, seconds: float) -> list[Upload]:
        since = monotonic() - seconds
        return [one for one in self._uploads.values() if not one.users and one.used < since]

    def _delete(self, upload: Upload) -> None:
        if self._uploads.pop(upload.id, None) is not None and self._folder is not None:
            (self._folder / upload.id).unlink(missing_ok=True)


class Receiver:
    """Writes an upload. ``write`` and ``close`` may be called from different threads.

    finished : whether the file is whole, and stays.
    """

    def __init__(self, spool: Spool, upload: Upload, path: Path) -> None:
        self.upload, self._spool = upload, spool
        self._lock = threading.Lock()
        self._file = open(path, "xb", buffering=0, opener=_private)
        self._head = b""
        self.finished = False

    def write(self, data: bytes | bytearray) -> None:
        """Adds to the file. Raises PluginError: as :meth:`Spool.grow`; ``out_of_memory`` where the
        disk is full; ``unsupported_media`` for what begins as neither an image nor a video.
        """
        if len(self._head) < SNIFF_BYTES:
            self._head += bytes(data[: SNIFF_BYTES - len(self._head)])
            if len(self._head) == SNIFF_BYTES:
                self._kind()
        self._spool.grow(self.upload, len(data))
        with self._lock, _disk_errors():
            rest = memoryview(data)
            while rest and not self._file.closed:
                rest = rest[self._file.write(rest) or 0 :]

    def finish(self) -> None:
        """Makes the file known. Raises PluginError: as :meth:`write`."""
        self.upload.kind = self._kind()
        self.finished = True

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _kind(self) -> Kind:
        kind = sniff(self._head)
        if kind is None:
            message = "the file is neither an image nor a video"
            raise PluginError("unsupported_media", message, "send one in a usual format")
        return kind


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _gone(id: str) -> PluginError:
    message = f"the upload {id[:40]!r} is not here, or not any more"
    return bad_request(message, "send the file again")


@contextmanager
def _disk_errors() -> Generator[None]:
    """OSErrors of the folder as PluginErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = "the disk on which uploads are kept has no more room"
            raise PluginError("out_of_memory", message, "make some, or send less") from None
        why = f"uploads cannot be kept ({error.strerror})"
        hint = "set XDG_CACHE_HOME to a folder that can be written, and start the server again"
        raise PluginError("internal", why, hint) from None


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Holds the lock that a file is, which is made with its folder."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_left(parent: Path) -> None:
    """Deletes the folders of processes that do not live any more.

    The lock of all is held only while they are looked for: another server's first upload waits for
    it, and deleting gigabytes takes seconds.
    """
    with ExitStack() as held:
        left: list[Path] = []
        with _locked(parent / LOCK_FILE):
            for folder in parent.glob(f"{FOLDER_PREFIX}*"):
                if folder.is_symlink():  # none of ours: nothing is made or deleted behind it
                    continue
                with suppress(OSError):
                    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    descriptor = os.open(folder / LOCK_FILE, flags, 0o600)
                    held.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.append(folder)
        for folder in left:
            with suppress(OSError):
                shutil.rmtree(folder)
