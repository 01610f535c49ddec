"""Pictures, videos and conversations, as a host hands them over; standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_onevision.plugins.contract.errors import bad_request
from mlx_onevision.plugins.contract.wire import Part

Kind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]

# Of the boxes of ISO media files ("ftyp"), which are pictures; the others are videos.
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif")


@dataclass(frozen=True)
class Media(Part):
    """A picture or a video: exactly one of ``path``, ``url`` and ``data``.

    path : an absolute path on the machine of the backend.
    url : http(s), or a ``data:`` address.
    data : the file's bytes; base64 in JSON.
    mime : what the host takes it for. Only a label: bytes are looked at, never believed.

    Whether a path or a URL is read at all is for whoever opened the backend to say.
    """

    kind: Kind
    path: str | None = None
    url: str | None = None
    data: bytes | None = None
    mime: str | None = None

    def check(self) -> None:
        given = [name for name in ("path", "url", "data") if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none of them"
            raise bad_request(f"the {self.kind} has {named}; give one of path, url and data")
        if not getattr(self, given[0]):
            raise bad_request(f"the {given[0]} of the {self.kind} is empty")
        if self.path is not None and "\0" in self.path:
            raise bad_request(f"the path of the {self.kind} holds a NUL")

    def __repr__(self) -> str:
        source = self.path or self.url or f"{len(self.data or b'')} bytes"
        return f"Media({self.kind}, {source if len(source) <= 80 else source[:77] + '…'})"


@dataclass(frozen=True)
class Message(Part):
    """One turn: a text, or texts and media in their order."""

    role: Role
    content: str | Sequence[str | Media]

    @property
    def parts(self) -> tuple[str | Media, ...]:
        """The content, one after another."""
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for part in self.parts if isinstance(part, Media))


def sniff(data: bytes) -> Kind | None:
    """Whether a file begins as a picture or as a video; None where it begins as neither.

    The first 32 bytes are enough. Types that a host has guessed from a name are often wrong (HEIC
    pictures are widely taken for videos); this is for filling in :attr:`Media.kind`.
    """
    if data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image"
    if data[:6] in (b"GIF87a", b"GIF89a") or data[:4] in (b"II*\0", b"MM\0*", b"qoif"):
        return "image"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "image"
    if data[:4] == b"RIFF":
        return {b"WEBP": "image", b"AVI ": "video"}.get(data[8:12])  # pyright: ignore
    if data[4:8] == b"ftyp":
        return "image" if data[8:12] in _PICTURE_BRANDS else "video"
    if data[:4] == b"\x1aE\xdf\xa3" or data[4:8] in (b"moov", b"mdat", b"wide", b"free"):
        return "video"
    return None
