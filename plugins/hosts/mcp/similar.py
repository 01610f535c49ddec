"""The tools that embed images, videos and texts, and that find what looks alike in a folder."""

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import anyio
import numpy as np

from mlx_onevision.plugins.contract.errors import Code, PluginError, bad_request
from mlx_onevision.plugins.contract.requests import (
    SNIFF_BYTES,
    EmbeddingSpace,
    EmbedRequest,
    Kind,
    Media,
    sniff,
)
from mlx_onevision.plugins.contract.results import EmbedResult
from mlx_onevision.plugins.hosts.mcp import schemas
from mlx_onevision.plugins.hosts.mcp.allowed_files import AllowedFiles
from mlx_onevision.plugins.hosts.mcp.tool import Call, Tool, in_thread, make_tool
from mlx_onevision.plugins.interface import Backend

MAX_CACHE_BYTES = 64 << 20  # of all vectors; some 10,000 images
ENTRY_OVERHEAD_BYTES = 200  # of an entry beside its vector, roughly

MAX_FILES_PER_FOLDER = 5000  # of a folder
FILES_PER_BATCH = 8  # files that are read, and images that are embedded, together

# What is wrong with a file, and not with the server.
FILE_ERRORS: set[Code] = {"unsupported_media", "too_large", "bad_request", "context_overflow"}

TIMEOUT_HINT = "call it again: what was done until now is kept, and it goes on from there"

Key = tuple[object, ...]


class VectorCache:
    """The vectors (float32) of what was embedded last, by content. For one thread."""

    def __init__(self, size: int = MAX_CACHE_BYTES) -> None:
        self._limit, self._bytes = size, 0
        self._vectors: OrderedDict[Key, bytes] = OrderedDict()

    def get(self, key: Key) -> bytes | None:
        if key in self._vectors:
            self._vectors.move_to_end(key)
        return self._vectors.get(key)

    def put(self, key: Key, vector: bytes) -> None:
        if self.get(key) is None:
            self._vectors[key] = vector
            self._bytes += len(vector) + ENTRY_OVERHEAD_BYTES
        while self._bytes > self._limit:
            _, oldest = self._vectors.popitem(last=False)
            self._bytes -= len(oldest) + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True)
class MediaFile:
    """An image or a video of a folder. ``content`` is equal for what has equal vectors."""

    path: str
    kind: Kind
    content: Key


def inspect_file(files: AllowedFiles, path: str) -> MediaFile | None:
    """What a file is; None where it is neither an image nor a video.

    An image is identified by its bytes, wherever it lies. A video may be too large to be read for
    that: it is identified by device, inode, size and time of change. Raises PluginError: for a file
    that cannot be read.
    """
    file = files.open(path)
    try:
        with file:
            head = file.read(SNIFF_BYTES)
            kind = sniff(head)
            if kind is None:
                return None
            status = os.fstat(file.fileno())
            if kind == "video":
                inode = (status.st_dev, status.st_ino, status.st_size)
                return MediaFile(path, kind, (*inode, status.st_mtime_ns, status.st_ctime_ns))
            if status.st_size > files.policy.size:
                raise PluginError("too_large", "the image is too large")
            digest = blake2b(head, digest_size=20)
            while piece := file.read(1 << 20):
                digest.update(piece)
            return MediaFile(path, kind, (digest.digest(),))
    except OSError as error:
        raise PluginError("unsupported_media", f"cannot be read: {error.strerror}") from None


def list_files(files: AllowedFiles, folder: str, recursive: bool) -> list[str]:
    """The paths of a folder's ordinary files, in order; links and hidden ones are left out. Raises
    PluginError: ``too_large`` for more than ``MAX_FILES_PER_FOLDER``.
    """
    found: list[str] = []
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        for name, is_folder in _entries(files, inside):
            path = os.path.join(inside, name)
            if not is_folder:
                found.append(path)
            elif recursive:
                waiting.append(path)
            if len(found) + len(waiting) > MAX_FILES_PER_FOLDER:
                message = f"there are more than {MAX_FILES_PER_FOLDER} files"
                raise PluginError("too_large", message, "name a smaller folder")
    return sorted(found)


def _entries(files: AllowedFiles, folder: str) -> list[tuple[str, bool]]:
    """Names of files and folders, and whether it is a folder; links and devices are neither."""
    descriptor = files.policy.open_folder(folder)
    try:
        with os.scandir(descriptor) as entries:
            return [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not entry.name.startswith(".") and _is_text(entry.name)
                if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
            ]
    except OSError as error:
        reason = f"cannot list {folder!r}: {error.strerror}"
        raise PluginError("unsupported_media", reason) from None
    finally:
        os.close(descriptor)


def _is_text(name: str) -> bool:
    """Whether JSON has a place for it: a name may hold bytes that stand for no characters."""
    return name.encode(errors="ignore").decode() == name


@dataclass(frozen=True)
class VectorTools:
    """The tools that embed, and that find what looks alike by its vectors."""

    backend: Backend
    files: AllowedFiles
    cache: VectorCache = field(default_factory=VectorCache)

    def tools(self) -> list[Tool]:
        return [
            make_tool(
                self.embed,
                "Vectors of images, videos and texts",
                "Returns an embedding vector for each image or video on this computer, or for "
                "each text. For programs that compare them; to find what looks alike take "
                "find_similar.",
                as_text=lambda v: f"{len(v.vectors)} vectors of {v.dim} numbers, in the structure.",
            ),
            make_tool(
                self.find_similar,
                "Find similar images",
                "Finds the images and videos in a folder on this computer that look most like a "
                "given one: duplicates, other shots of the same scene, similar motifs. Words are "
                "not searched for.",
                late=TIMEOUT_HINT,
                keeps_time=True,
            ),
        ]

    async def embed(self, asked: schemas.Embed, call: Call) -> schemas.Vectors:
        paths, texts = asked.paths or [], asked.texts or []
        if bool(paths) == bool(texts):
            raise bad_request("give either paths or texts")
        space: EmbeddingSpace = asked.space or ("joint" if texts else "vision")
        media = await in_thread(lambda: [self.files.medium(path) for path in paths])
        vectors: list[list[float]] = []
        result: EmbedResult | None = None
        for part in _parts([*media, *texts], self.files.policy.images):
            async with self.backend.stream_embed(EmbedRequest(part, space=space)) as stream:
                async for event in stream:
                    await call.report_event(event)
                result = await stream.aresult()
            # As many digits as a float32 has.
            vectors += [[float(f"{value:.9g}") for value in v] for v in result.vectors]
        assert result is not None  # there is an item at least
        names = schemas.Vectors.model_fields.keys() - {"vectors"}
        return schemas.Vectors(vectors=vectors, **{name: getattr(result, name) for name in names})

    async def find_similar(self, asked: schemas.FindSimilar, call: Call) -> schemas.Matches:
        path = await in_thread(lambda: self.files.path(asked.path))
        wanted = await in_thread(lambda: inspect_file(self.files, path))
        if wanted is None:
            raise bad_request(f"{path!r} is neither an image nor a video", "choose another file")

        def others() -> list[str]:
            found = list_files(self.files, self.files.folder(asked.folder), asked.recursive)
            # One file has several paths: "/a/./b", or below an allowed folder that is a link.
            own = os.path.realpath(path)
            return [name for name in found if os.path.realpath(name) != own]

        search = _Search(self, wanted, await in_thread(others))
        with anyio.move_on_after(call.seconds_left):
            await search.run(call)
        if search.vector is None:
            raise TimeoutError
        return search.matches(asked.k)

    async def fill_cache(self, group: Sequence[MediaFile]) -> None:
        """Puts the vectors of those files of a group that can be read into the cache. Raises
        PluginError: for what is no fault of a file.
        """
        media = [Media(file.kind, path=file.path) for file in group]
        try:
            async with self.backend.stream_embed(EmbedRequest(media, space="vision")) as stream:
                result = await stream.aresult()
        except PluginError as error:
            if error.code not in FILE_ERRORS:
                raise
            if len(group) > 1:  # one of them spoils the rest
                for file in group:
                    await self.fill_cache([file])
            return
        for file, vector in zip(group, result.vectors, strict=True):
            self.cache.put(file.content, array("f", vector).tobytes())


class _Search:
    """One search of ``paths``: what was compared so far."""

    def __init__(self, tools: VectorTools, wanted: MediaFile, paths: Sequence[str]) -> None:
        self._tools, self._wanted, self._paths = tools, wanted, paths
        self._done = self._skipped = 0
        self._found: list[tuple[MediaFile, bytes]] = []
        self.vector: bytes | None = None

    async def run(self, call: Call) -> None:
        await call.report("looking at the file")
        if self._cached(self._wanted) is None:
            await self._tools.fill_cache([self._wanted])
        self.vector = self._cached(self._wanted)
        if self.vector is None:
            raise bad_request(f"{self._wanted.path!r} cannot be read", "choose another file")
        while paths := self._paths[self._done : self._done + FILES_PER_BATCH]:
            await call.report("comparing", self._done, len(self._paths))
            files, unreadable = await in_thread(lambda paths=paths: self._inspect(paths))
            new = {file.content: file for file in files if self._cached(file) is None}
            images = [file for file in new.values() if file.kind == "image"]
            for group in (images, *([file] for file in new.values() if file.kind == "video")):
                if group:
                    await self._tools.fill_cache(group)
            vectors = [(file, self._cached(file)) for file in files]
            good = [(file, vector) for file, vector in vectors if vector is not None]
            self._found += good
            self._skipped += unreadable + len(files) - len(good)
            self._done += len(paths)

    def matches(self, k: int) -> schemas.Matches:
        vectors = [np.frombuffer(vector, np.float32) for _, vector in self._found]
        wanted = np.frombuffer(self.vector or b"", np.float32)
        # Vectors have length 1, but for rounding.
        scores = [float(np.clip(np.dot(vector, wanted), -1, 1)) for vector in vectors]
        files = (file for file, _ in self._found)
        ranked = sorted(zip(scores, files, strict=True), key=lambda pair: (-pair[0], pair[1].path))
        return schemas.Matches(
            matches=[
                schemas.Match(path=file.path, kind=file.kind, similarity=round(score, 4))
                for score, file in ranked[:k]
            ],
            compared=len(self._found),
            skipped=self._skipped,
            left=len(self._paths) - self._done,
        )

    def _cached(self, file: MediaFile) -> bytes | None:
        return self._tools.cache.get(file.content)

    def _inspect(self, paths: Sequence[str]) -> tuple[list[MediaFile], int]:
        """Those that are images or videos, and how many cannot be read."""
        found: list[MediaFile] = []
        unreadable = 0
        for path in paths:
            try:
                file = inspect_file(self._tools.files, path)
            except PluginError:
                unreadable += 1
            else:
                found += [] if file is None else [file]
        return found, unreadable


def _parts(items: Sequence[Media | str], limit: int) -> list[list[Media | str]]:
    """In order, and so that no part holds more than a request may: one video, some images."""
    parts: list[list[Media | str]] = [[]]
    videos = 0
    for item in items:
        is_video = isinstance(item, Media) and item.kind == "video"
        if len(parts[-1]) >= limit or (is_video and videos):
            parts.append([])
            videos = 0
        parts[-1].append(item)
        videos += is_video
    return parts
