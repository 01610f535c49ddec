"""Attachments of ``llm`` as media of the contract.

The file's first bytes decide what it is, not the type that llm guesses (it takes HEIC images for
videos) or that a web server sends.
"""

import os

import llm

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import Kind, Media, sniff
from mlx_onevision.plugins.hosts.llm.registry import POLICY

HEAD = 32  # bytes that tell an image from a video

# What llm accepts, by the MIME types that it guesses.
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
    """An image or a video. A file is named by its path; a URL is fetched.

    Raises:
        PluginError: for what is neither, and what cannot be read.
    """
    if attachment.path:
        # Not from llm's bytes, which would be a copy of a whole video.
        path = os.path.abspath(os.path.expanduser(attachment.path))
        # As a video, of which any size may be opened: only the beginning is read.
        file = POLICY.open(Media("video", path=path))
        assert not isinstance(file, bytes)
        with file:
            return Media(kind(file.read(HEAD), path), path=path)
    if attachment.content:
        return Media(kind(attachment.content, "the attachment"), data=attachment.content)
    if attachment.url:
        data = POLICY.open(Media("image", url=attachment.url))
        assert isinstance(data, bytes)
        return Media(kind(data, attachment.url), data=data)
    raise PluginError("unsupported_media", "an attachment is empty", "attach an image or a video")


def kind(data: bytes, name: str) -> Kind:
    """Image or video; ``unsupported_media`` for anything else."""
    found = sniff(data[:HEAD])
    if found is None:
        raise PluginError(
            "unsupported_media",
            f"{name} is neither an image nor a video",
            "attach one in a usual format",
        )
    return found
