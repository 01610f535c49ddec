"""The tools that make vectors, and that find what looks alike."""

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import anyio

from mlx_onevision.plugins.contract.errors import Code, PluginError, bad_request
from mlx_onevision.plugins.contract.requests import EmbeddingSpace, EmbedRequest, Kind, Media, sniff
from mlx_onevision.plugins.contract.results import EmbedResult
from mlx_onevision.plugins.hosts.mcp import schemas
from mlx_onevision.plugins.hosts.mcp.allowed_files import HEAD, McpSettings, Places
from mlx_onevision.plugins.hosts.mcp.tool import LATE, Call, Tool, blocking, offered, too_late
from mlx_onevision.plugins.interface import Backend

# What is in a folder, and the vectors that are known already, by what is in the files; standard
# library only.

SIZE = 64 << 20  # bytes of all vectors; some 10,000 pictures
OVERHEAD = 200  # bytes of an entry beside its value, roughly

Key = tuple[object, ...]


class Known:
    """What was computed last, the longest unused forgotten first. For one thread."""

    def __init__(self, size: int = SIZE) -> None:
        self._most, self._held = size, 0
        self._values: OrderedDict[Key, bytes] = OrderedDict()

    def get(self, key: Key) -> bytes | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: bytes) -> None:
        self._drop(key)
        self._values[key] = value
        self._held += len(value) + OVERHEAD
        while self._held > self._most:
            self._drop(next(iter(self._values)))

    def _drop(self, key: Key) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._held -= len(value) + OVERHEAD


@dataclass(frozen=True)
class Seen:
    """A picture or a video of a folder. ``content`` is equal for what has equal vectors."""

    path: str
    kind: Kind
    content: Key

    @property
    def medium(self) -> Media:
        return Media(self.kind, path=self.path)


def look(places: Places, path: str) -> Seen | None:
    """What a file is; None where it is neither a picture nor a video.

    A picture is known by its bytes, wherever it lies. A video may be too large to be read for that,
    so it is known by which file it is, its size, and when it was changed.

    Raises:
        PluginError: for a file that cannot be read.
    """
    file = places.policy.open(Media("video", path=path))
    assert not isinstance(file, bytes)
    try:
        with file:
            head = file.read(HEAD)
            kind = sniff(head)
            if kind is None:
                return None
            status = os.fstat(file.fileno())
            if kind == "video":
                inode = (status.st_dev, status.st_ino, status.st_size)
                return Seen(path, kind, (*inode, status.st_mtime_ns, status.st_ctime_ns))
            if status.st_size > places.policy.size:
                raise PluginError("too_large", "the picture is too large")
            digest = blake2b(head, digest_size=20)
            while piece := file.read(1 << 20):
                digest.update(piece)
            return Seen(path, kind, (digest.digest(),))
    except OSError as error:
        raise PluginError("unsupported_media", f"cannot be read: {error.strerror}") from None


def listed(places: Places, folder: str, recursive: bool, most: int) -> list[str]:
    """The paths of a folder's ordinary files, in order; links and hidden ones are left out.

    Raises:
        PluginError: ``too_large`` for more than ``most``.
    """
    found: list[str] = []
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        for name, is_folder in _entries(places, inside):
            path = os.path.join(inside, name)
            if not is_folder:
                found.append(path)
            elif recursive:
                waiting.append(path)
            if len(found) + len(waiting) > most:
                raise PluginError(
                    "too_large", f"there are more than {most} files", "name a smaller folder"
                )
    return sorted(found)


def _entries(places: Places, folder: str) -> list[tuple[str, bool]]:
    """Names of files and folders, and which one it is."""
    descriptor = places.policy.open_folder(folder)
    try:
        with os.scandir(descriptor) as entries:
            return [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not entry.name.startswith(".") and _is_text(entry.name)
                # Links and devices are neither.
                if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
            ]
    except OSError as error:
        raise PluginError(
            "unsupported_media", f"cannot list {folder!r}: {error.strerror}"
        ) from None
    finally:
        os.close(descriptor)


def _is_text(name: str) -> bool:
    """Whether a name can be told in JSON; others are bytes that stand for no characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


FILES = 5000  # of a folder
GROUP = 8  # files that are read, and pictures that are embedded, together

# What is wrong with a file, and not with the server.
THE_FILE: tuple[Code, ...] = ("unsupported_media", "too_large", "bad_request", "context_overflow")

LATE_FIND = "call it again: what was done until now is kept, and it goes on from there"


@dataclass(frozen=True)
class Finding:
    backend: Backend
    places: Places
    settings: McpSettings
    known: Known = field(default_factory=Known)

    def tools(self) -> list[Tool]:
        seconds = self.settings.timeout
        return [
            offered(
                "embed",
                "Vectors of pictures, videos and texts",
                "Returns an embedding vector for each picture or video on this computer, or for "
                "each text. For programs that compare them; to find what looks alike take "
                "find_similar.",
                schemas.Embed,
                schemas.Vectors,
                self.embed,
                seconds=seconds,
                late=LATE,
                said=lambda v: f"{len(v.vectors)} vectors of {v.dim} numbers, in the structure.",
            ),
            offered(
                "find_similar",
                "Find similar pictures",
                "Finds the pictures and videos in a folder on this computer that look most like a "
                "given one: duplicates, other shots of the same scene, similar motifs. Words are "
                "not searched for.",
                schemas.FindSimilar,
                schemas.Matches,
                self.find_similar,
                seconds=seconds,
                late=LATE_FIND,
                keeps_time=True,
            ),
        ]

    async def embed(self, asked: schemas.Embed, call: Call) -> schemas.Vectors:
        paths, texts = asked.paths or [], asked.texts or []
        if bool(paths) == bool(texts):
            raise bad_request("give either paths or texts")
        space = asked.space or ("joint" if texts else "vision")
        media = await blocking(lambda: [self.places.medium(path) for path in paths])
        items: list[Media | str] = [*media, *texts]
        results = [
            await self._request(part, space, call)
            for part in _parted(items, self.places.policy.images)
        ]
        first = results[0]
        return schemas.Vectors(
            vectors=[_rounded(vector) for result in results for vector in result.vectors],
            space=first.space,
            dim=first.dim,
            model=first.model,
            revision=first.revision,
            quantization=first.quantization,
            method=first.method,
        )

    async def find_similar(self, asked: schemas.FindSimilar, call: Call) -> schemas.Matches:
        path = self.places.path(asked.path)
        wanted = await blocking(lambda: look(self.places, path))
        if wanted is None:
            raise bad_request(f"{path!r} is neither a picture nor a video", "choose another file")

        def names() -> list[str]:
            return listed(self.places, self.places.folder(asked.folder), asked.recursive, FILES)

        paths = [name for name in await blocking(names) if name != path]
        search = _Search(self, wanted, len(paths))
        with anyio.move_on_after(call.left):
            await search.run(paths, call)
        if search.vector is None:
            raise too_late(self.settings.timeout, LATE_FIND)
        return search.matches(asked.k)

    async def _request(
        self, items: Sequence[Media | str], space: EmbeddingSpace, call: Call
    ) -> EmbedResult:
        async with self.backend.stream_embed(EmbedRequest(items, space=space)) as stream:
            async for event in stream:
                await call.follow(event)
            return await stream.aresult()

    async def vectors(self, group: Sequence[Seen]) -> None:
        """Has the vectors of a group known afterwards, of those at least that can be read.

        Raises:
            PluginError: for what is no fault of a file.
        """
        request = EmbedRequest([seen.medium for seen in group], space="vision")
        try:
            async with self.backend.stream_embed(request) as stream:
                result = await stream.aresult()
        except PluginError as error:
            if error.code not in THE_FILE:
                raise
            if len(group) > 1:  # one of them spoils the rest
                for seen in group:
                    await self.vectors([seen])
            return
        for seen, vector in zip(group, result.vectors, strict=True):
            self.known.put(seen.content, array("f", vector).tobytes())


class _Search:
    """One search: what was read so far."""

    def __init__(self, finding: Finding, wanted: Seen, total: int) -> None:
        self._finding, self._wanted = finding, wanted
        self._total = self._left = total
        self._skipped = 0
        self._found: list[tuple[Seen, bytes]] = []
        self.vector: bytes | None = None

    async def run(self, paths: Sequence[str], call: Call) -> None:
        await call.tell("looking at the picture")
        if self._vector_of(self._wanted) is None:
            await self._finding.vectors([self._wanted])
        self.vector = self._vector_of(self._wanted)
        if self.vector is None:
            raise bad_request(f"{self._wanted.path!r} cannot be read", "choose another file")
        for place in range(0, len(paths), GROUP):
            await call.tell("comparing", place, self._total)
            chunk = paths[place : place + GROUP]
            looked = await blocking(lambda chunk=chunk: [self._looked(path) for path in chunk])
            seen = [one for one in looked if isinstance(one, Seen)]
            for group in self._new(seen):
                await self._finding.vectors(group)
            vectors = [(one, self._vector_of(one)) for one in seen]
            good = [(one, vector) for one, vector in vectors if vector is not None]
            self._found += good
            self._skipped += sum(one is not None for one in looked) - len(good)
            self._left -= len(chunk)

    def matches(self, k: int) -> schemas.Matches:
        import numpy as np

        # Vectors have length 1, but for rounding.
        rows = np.array([np.frombuffer(vector, np.float32) for _, vector in self._found])
        wanted = np.frombuffer(self.vector or b"", np.float32)
        scores = [] if not self._found else np.clip(rows @ wanted, -1, 1).tolist()
        ranked = sorted(
            zip(scores, (seen for seen, _ in self._found), strict=True),
            key=lambda pair: (-pair[0], pair[1].path),
        )
        return schemas.Matches(
            matches=[
                schemas.Match(path=seen.path, kind=seen.kind, similarity=round(score, 4))
                for score, seen in ranked[:k]
            ],
            compared=len(self._found),
            skipped=self._skipped,
            left=self._left,
        )

    def _vector_of(self, seen: Seen) -> bytes | None:
        return self._finding.known.get(seen.content)

    def _looked(self, path: str) -> Seen | PluginError | None:
        try:
            return look(self._finding.places, path)
        except PluginError as error:
            return error

    def _new(self, seen: Sequence[Seen]) -> list[list[Seen]]:
        """What is not known yet: pictures together, videos alone, nothing twice."""
        new = {one.content: one for one in seen if self._vector_of(one) is None}
        pictures = [one for one in new.values() if one.kind == "image"]
        films = [one for one in new.values() if one.kind == "video"]
        return [*([pictures] if pictures else []), *([film] for film in films)]


def _parted(items: Sequence[Media | str], most: int) -> list[list[Media | str]]:
    """In order, and so that no part holds more than a request may: one video, some pictures."""
    parts: list[list[Media | str]] = [[]]
    for item in items:
        film = isinstance(item, Media) and item.kind == "video"
        part = parts[-1]
        has_film = any(isinstance(one, Media) and one.kind == "video" for one in part)
        if len(part) >= most or (film and has_film):
            parts.append([])
        parts[-1].append(item)
    return parts


def _rounded(vector: Sequence[float]) -> list[float]:
    """As many digits as a float32 has."""
    return [float(f"{value:.9g}") for value in vector]
