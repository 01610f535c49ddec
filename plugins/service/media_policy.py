"""What a backend may read for those who ask it. It belongs to whoever opens the backend; nothing in
a request can widen it.

    MediaPolicy()                                  bytes only: neither files nor addresses
    MediaPolicy(folders=["/photos"])               and files below /photos
    MediaPolicy(hosts=["images.example.org"])      and that host, over https and http
    MediaPolicy(uploads=spool)                     and what was uploaded before
    MediaPolicy.trusting()                         whatever this process may read

The first is the default everywhere, also in process, because a host's requests may come from
untrusted users. A program that asks for itself alone uses ``trusting()``.

Files are opened from the allowed folder down, one name after another and through no link, and are
judged and read by the open descriptor: whatever is renamed or linked meanwhile, nothing outside is
read.
"""

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlx_onevision.errors import OneVisionError
from mlx_onevision.media.sources import data_uri
from mlx_onevision.plugins.contract.errors import PluginError, bad_request, to_plugin_error
from mlx_onevision.plugins.contract.requests import Media
from mlx_onevision.plugins.service.download import download, parse_url
from mlx_onevision.plugins.service.spool import Spool

UPLOAD_PREFIX = "upload:"  # and its id: the address of what was sent before the request

_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.ELOOP: "a part of it is a link",
    errno.EMLINK: "a part of it is a link",
    errno.ENOTDIR: "a part of it is a link or no folder",
    errno.EISDIR: "it is a folder",
}


@dataclass(frozen=True)
class Hints:
    """Hints of refusals, in the words of the program that opens the backend."""

    folders: str = "whoever opens the backend can allow its folder in the MediaPolicy"
    hosts: str = "whoever opens the backend can allow the host in the MediaPolicy"
    private: str = "whoever opens the backend can allow it with private in the MediaPolicy"


@dataclass(frozen=True)
class MediaPolicy:
    """What may be read, and how much of it.

    folders : files below these; None for every file.
    hosts : names, with a port where it is not the usual one; None for every host.
    private : whether these hosts may have addresses of this machine or its network. A name that
        somebody else controls could otherwise point at a service of the same network.
    uploads : whose files may be named; None for none.
    images, videos : of one request, at most.
    size : bytes of an image's file, and of whatever comes with a request or from a host.
    pixels : of an image; what has more is not decoded. Those of one request may have four times as
        many together.
    frames : of one video.
    decoders : processes that decode at once. memory : bytes of each. seconds : of each, and one
        more for every 50 MB of its file.
    isolated : whether such processes decode the rarer kinds of images, too; PNG, JPEG, WebP, GIF
        and BMP are decoded in this one.
    hints : the way out of a refusal.
    """

    folders: Sequence[str | os.PathLike[str]] | None = ()
    hosts: Sequence[str] | None = ()
    private: bool = False
    uploads: Spool | None = None
    images: int = 16
    videos: int = 1
    size: int = 32 << 20
    pixels: int = 40_000_000
    frames: int = 128
    decoders: int = 2
    memory: int = 1536 << 20
    seconds: float = 20.0
    isolated: bool = True
    hints: Hints = Hints()

    @classmethod
    def trusting(cls) -> "MediaPolicy":
        """For a program that asks for itself: every file and host, and the engine's own limits."""
        return cls(
            folders=None,
            hosts=None,
            private=True,
            images=1000,
            videos=100,
            size=256 << 20,
            pixels=178_956_970,
            frames=1 << 20,
            decoders=8,
            memory=3 << 30,
            seconds=300.0,
            isolated=False,
        )

    def __post_init__(self) -> None:
        """Raises PluginError for a folder that is none, and for a single text instead of a list."""
        for name in ("folders", "hosts"):
            if isinstance(getattr(self, name), str | os.PathLike):
                raise bad_request(f"the policy's {name} are one text; give a list")
        if self.folders is not None:
            folders = tuple(Path(os.path.abspath(os.path.expanduser(f))) for f in self.folders)
            for folder in folders:
                if not folder.is_dir():
                    raise bad_request(f"the policy allows {str(folder)!r}, which is not a folder")
            object.__setattr__(self, "folders", folders)
        if self.hosts is not None:
            object.__setattr__(self, "hosts", tuple(host.lower() for host in self.hosts))

    def admit(self, media: Iterable[Media]) -> None:
        """Looks at what a request brings, and touches nothing yet. Raises PluginError:
        ``too_large`` for too many or too much, ``bad_request`` for a path or an address that is not
        allowed.
        """
        media = tuple(media)
        for kind, most in (("image", self.images), ("video", self.videos)):
            count = sum(medium.kind == kind for medium in media)
            if count > most:
                hint = f"send {most} at most in one request"
                raise PluginError("too_large", f"there are {count} {kind}s", hint)
        for medium in media:
            if medium.data is not None:
                self._check_size(len(medium.data), f"the {medium.kind} sent as data")
            elif medium.path is not None:
                self._folder(medium.path)
            elif _is_upload(medium):
                self._uploads().upload(_upload_id(medium))
            elif not _is_data(medium.url or ""):
                self._check_host(medium.url or "")

    def hold(self, media: Iterable[Media]) -> Callable[[], object]:
        """Keeps the uploads among these until what it returns is called. Raises PluginError:
        ``bad_request`` for one that is not there any more.
        """
        with ExitStack() as held:
            for medium in media:
                if _is_upload(medium):
                    held.enter_context(self._uploads().using(_upload_id(medium)))
            return held.pop_all().close
        raise AssertionError  # no error is suppressed

    def check_frames(self, count: int | None) -> None:
        """Raises PluginError ``too_large`` for more frames of one video than are allowed."""
        if count is not None and count > self.frames:
            message = f"{count} frames of one video are too many"
            raise PluginError("too_large", message, f"{self.frames} are read")

    def open(self, medium: Media) -> BinaryIO | bytes:
        """A medium's bytes, or its open file, whose ``name`` is the path that was asked for. Raises
        PluginError: ``bad_request`` for what is not allowed, ``too_large``, and
        ``unsupported_media`` for what cannot be read.
        """
        self.admit([medium])
        if medium.data is not None:
            return medium.data
        if _is_upload(medium):
            return self._sized(medium, self._uploads().open(_upload_id(medium)))
        if medium.url is not None:
            return self._fetched(medium)
        assert medium.path is not None
        with _translate_errors(medium.path):
            # Without waiting, as a pipe would have it.
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = self._descriptor(medium.path, flags)
            os.set_blocking(descriptor, True)
            file = open(medium.path, "rb", buffering=0, opener=lambda _path, _flags: descriptor)
        return self._sized(medium, file)

    def _sized(self, medium: Media, file: BinaryIO) -> BinaryIO:
        """The file, if it is one, and an image within the limit."""
        name = medium.path or medium.url or ""
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _unreadable(name, "it is no ordinary file")
            # A video is read in place, and only its sampled frames are ever held.
            if medium.kind == "image":
                self._check_size(status.st_size, f"the image {_named(name)}")
        except BaseException:
            file.close()
            raise
        return file

    def open_folder(self, path: str) -> int:
        """A descriptor of an allowed folder, or of one below it, to list what is in it. Raises
        PluginError: as :meth:`open`.
        """
        with _translate_errors(path):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            return self._descriptor(path, flags, itself=True)

    def _descriptor(self, path: str, flags: int, itself: bool = False) -> int:
        """What a path names, opened from an allowed folder down where there is one."""
        below = self._folder(path, itself)
        return os.open(os.path.expanduser(path), flags) if below is None else _walk(*below, flags)

    def _folder(self, path: str, itself: bool = False) -> tuple[Path, tuple[str, ...]] | None:
        """The allowed folder that a path is below (or is, itself), and the names from there on."""
        if self.folders is None:
            return None
        refused = bad_request(f"the path {_named(path)} is not allowed here", self.hints.folders)
        given = Path(path)
        if not given.is_absolute() or ".." in given.parts:
            raise refused
        for folder in map(Path, self.folders):
            # As the owner wrote it and as it really is: on a Mac /tmp is a link.
            for root in (folder, Path(os.path.realpath(folder))):
                if given.is_relative_to(root) and (itself or given != root):
                    return folder, given.relative_to(root).parts
        raise refused

    def _uploads(self) -> Spool:
        if self.uploads is None:
            raise bad_request("no uploads are taken here", "send the file itself")
        return self.uploads

    def _check_host(self, url: str) -> None:
        where = parse_url(url)
        if self.hosts is not None and where.named not in self.hosts:
            message = f"addresses at {where.named[:80]!r} are not allowed"
            raise bad_request(message, self.hints.hosts)

    def _fetched(self, medium: Media) -> bytes:
        url = medium.url or ""
        if not _is_data(url):
            return download(
                url,
                self._check_host,
                most=self.size,
                private=self.private,
                hint=self.hints.private,
            )
        # Refused by length before a second copy is made of it.
        self._check_size(len(url) // 4 * 3 - 4096, f"the {medium.kind} in the data URI")
        try:
            data = data_uri(url)
        except OneVisionError as error:
            raise to_plugin_error(error) from None
        self._check_size(len(data), f"the {medium.kind} in the data URI")
        return data

    def _check_size(self, size: int, name: str) -> None:
        if size > self.size:
            hint = f"{self.size / 2**20:,.1f} MB are read at most"
            raise PluginError("too_large", f"{name} has {size / 2**20:,.1f} MB", hint)


@contextmanager
def _translate_errors(path: str) -> Generator[None]:
    """OSErrors of a path as PluginErrors."""
    try:
        yield
    except (OSError, ValueError) as error:
        known = _REASONS.get(getattr(error, "errno", None) or 0)
        raise _unreadable(path, known or getattr(error, "strerror", None) or str(error)) from None


def _walk(folder: Path, names: Sequence[str], flags: int) -> int:
    """A descriptor of what lies below ``folder``, reached through no link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for place, name in enumerate(names):
        last = place == len(names) - 1
        how = flags if last else os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            inner = os.open(name, how | os.O_NOFOLLOW, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def _is_upload(medium: Media) -> bool:
    return medium.url is not None and medium.url.startswith(UPLOAD_PREFIX)


def _upload_id(medium: Media) -> str:
    return (medium.url or "").removeprefix(UPLOAD_PREFIX)


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _named(path: str) -> str:
    return repr(path if len(path) <= 160 else f"{path[:90]}…{path[-60:]}")


def _unreadable(path: str, why: str) -> PluginError:
    return PluginError("unsupported_media", f"cannot read {_named(path)}: {why}")
