"""Attachments of ``llm`` as media of the contract.

What llm takes an attachment for is not believed (it guesses that HEIC pictures are videos, and
takes the word of a web server): the file's first bytes decide.
"""

import os

import llm

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import Kind, Media, sniff
from mlx_onevision.plugins.hosts.llm.registry import POLICY

BEGINNING = 32  # bytes that tell a picture from a video

# What llm lets through, by the types that it knows the files under.
TYPES = frozenset(
    {
        "image/png",
        "image/jpeg",
        "image/webp",
        "image/gif",
        "image/heic",
        "image/heif",
        "image/avif",
        "image/tiff",
        "image/bmp",
        "video/mp4",
        "video/quicktime",
        "video/x-matroska",
        "video/webm",
        "video/x-msvideo",
    }
)


def media(attachment: llm.Attachment) -> Media:
    """A picture or a video. A file stays where it is; what is behind an address is fetched.

    Raises:
        PluginError: for what is neither, and what cannot be read.
    """
    if attachment.path:
        # Not from llm's bytes, which would be a copy of a whole film.
        path = os.path.abspath(os.path.expanduser(attachment.path))
        return Media(_kind_of_file(path), path=path)
    if attachment.content:
        return Media(kind(attachment.content, "the attachment"), data=attachment.content)
    if attachment.url:
        data = POLICY.open(Media("image", url=attachment.url))
        assert isinstance(data, bytes)
        return Media(kind(data, attachment.url), data=data)
    raise PluginError("unsupported_media", "an attachment is empty", "attach a picture or a video")


def kind(data: bytes, name: str) -> Kind:
    """What bytes are.

    Raises:
        PluginError: ``unsupported_media``, for neither a picture nor a video.
    """
    found = sniff(data[:BEGINNING])
    if found is None:
        raise PluginError(
            "unsupported_media",
            f"{name} is neither a picture nor a video",
            "attach one in a usual format",
        )
    return found


def _kind_of_file(path: str) -> Kind:
    # As a video, of which only what is needed is ever read, however large it is.
    file = POLICY.open(Media("video", path=path))
    assert not isinstance(file, bytes)
    with file:
        return kind(file.read(BEGINNING), path)
