"""Which files the tools may read, said so that a language model and a person find the way out.

Standard library only. What is really read is the policy's to decide; it looks again when it opens.
"""

import os
import re
from dataclasses import dataclass, field

from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import Kind, Media, sniff
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# What whoever starts the server decides; no call can change it. Standard library only.

PIXELS = 110_000_000  # of a picture: those are the owner's own, and cameras make large ones
TIMEOUT = 50.0  # seconds; hosts cut a call off after 60


@dataclass(frozen=True)
class McpSettings:
    """How the server stands towards its host.

    policy : which files the tools read; the backend's own, too.
    timeout : seconds after which a call is answered, with what there is or with what to do instead.
    max_tokens : of one answer, at most.
    message_bytes, values : that a message may have, and its JSON may hold.
    """

    policy: MediaPolicy = field(default_factory=MediaPolicy)
    timeout: float = TIMEOUT
    max_tokens: int = 4096
    message_bytes: int = 1 << 20
    values: int = 500_000


OPTION = "start mlx-onevision mcp with --allow-dir FOLDER"

HEAD = 32  # bytes that tell a picture from a video

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Places:
    """The files below the folders that the policy allows."""

    policy: MediaPolicy

    def listed(self) -> str:
        """Which folders these are, for a sentence."""
        if self.policy.folders is None:
            return "all"
        return ", ".join(map(str, self.policy.folders)) or f"none ({OPTION} to open one)"

    def path(self, given: str) -> str:
        """A path that may be read, as far as can be said without touching anything.

        Raises:
            PluginError: ``bad_request``, with what would be right.
        """
        path = _absolute(given)
        try:
            self.policy.admit([Media("video", path=path)])
        except PluginError:
            raise self._refused(path) from None
        return path

    def medium(self, given: str, wanted: Kind | None = None) -> Media:
        """The picture or video at a path, told by its bytes; ``wanted`` is what it has to be.

        Raises:
            PluginError: for what may not or cannot be read, or is the other one.
        """
        path = self.path(given)
        head = self.head(path)
        kind = "video" if wanted == "video" and head[:4] == b"GIF8" else sniff(head)  # may move
        if wanted is None and kind is None:
            raise PluginError(
                "unsupported_media",
                f"{_short(path)} is neither a picture nor a video of a usual format",
                "choose another file",
            )
        if wanted is not None and kind is not None and kind != wanted:
            what, tool = ("video", "ask_video") if kind == "video" else ("picture", "ask_image")
            raise bad_request(f"{_short(path)} is a {what}", f"use {tool} for {what}s")
        # What begins as neither is for the backend to refuse, by name.
        return Media(kind or wanted or "image", path=path)

    def head(self, path: str) -> bytes:
        """How the file at a path begins."""
        # As a video: of those any size may be opened.
        file = self.policy.open(Media("video", path=path))
        if isinstance(file, bytes):
            return file[:HEAD]
        with file:
            return file.read(HEAD)

    def folder(self, given: str) -> str:
        """A folder that may be listed: an allowed one, or one below it.

        Raises:
            PluginError: as :meth:`path`, and for what is no folder.
        """
        path = _absolute(given)
        try:
            os.close(self.policy.open_folder(path))
        except PluginError as error:
            raise self._refused(path) if error.code == "bad_request" else error from None
        return path

    def _refused(self, path: str) -> PluginError:
        if path.rstrip("/") in map(str, self.policy.folders or ()):
            return bad_request(f"{_short(path)} is a folder", "name a picture or a video in it")
        if not self.policy.folders:
            return bad_request("no folder is open to this server", f"{OPTION} to open one")
        return bad_request(
            f"{_short(path)} is not below a folder that is open to this server",
            f"open are: {self.listed()}; for another, {OPTION}",
        )


def _absolute(given: str) -> str:
    path = os.path.expanduser(given) if given == "~" or given.startswith("~/") else given
    if "\0" in path:
        raise bad_request("the path holds a NUL", "give an absolute path")
    if os.path.isabs(path):
        return path
    if _ADDRESS.match(path):
        raise bad_request(f"{_short(path)} is an address, and only files are read", "give a path")
    raise bad_request(
        f"the path {_short(path)} is relative, and to which folder is not known here",
        "give an absolute path",
    )


def _short(text: str) -> str:
    text = text if len(text) <= 120 else f"{text[:60]}…{text[-50:]}"
    return repr(text)
