"""What whoever starts the server decides, and which files the tools may read because of it.

Refusals are worded so that a language model and a person find the way out. What is really read is
the policy's to decide; it checks again when it opens a file. Standard library only.
"""

import os
import re
from dataclasses import dataclass, field
from typing import BinaryIO

from mlx_onevision.media.sources import similar_name
from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import SNIFF_BYTES, Kind, Media, sniff
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# Of an image: these are the owner's own, and cameras make large ones.
MAX_IMAGE_PIXELS = 110_000_000

ALLOW_DIR_HINT = "start mlx-onevision mcp with --allow-dir FOLDER"

_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class McpSettings:
    """What no call can change.

    policy : which files the tools read; the backend's own, too.
    timeout : seconds after which a call is answered, with what there is or with what to do instead;
        hosts cut a call off after 60.
    max_tokens : of one answer, at most.
    max_message_bytes, max_json_values : of one message, and in its JSON.
    """

    policy: MediaPolicy = field(default_factory=MediaPolicy)
    timeout: float = 50.0
    max_tokens: int = 4096
    max_message_bytes: int = 1 << 20
    max_json_values: int = 500_000


@dataclass(frozen=True)
class AllowedFiles:
    """The files below the folders that the policy allows."""

    policy: MediaPolicy

    def folders(self) -> str:
        """Which folders these are, for a sentence."""
        if self.policy.folders is None:
            return "all"
        return ", ".join(map(str, self.policy.folders)) or f"none ({ALLOW_DIR_HINT} to open one)"

    def path(self, given: str) -> str:
        """A path that may be read, as far as can be said without opening it; where there is none,
        the one beside it that looks the same. Raises PluginError: ``bad_request``, with what would
        be right.
        """
        path = _absolute(given)
        try:
            self.policy.admit([Media("video", path=path)])
        except PluginError:
            raise self._refused(path) from None
        folder, name = os.path.split(path)
        try:
            descriptor = self.policy.open_folder(folder)
        except PluginError:
            return path
        try:
            names = os.listdir(descriptor)
        except OSError:
            return path
        finally:
            os.close(descriptor)
        similar = None if name in names else similar_name(name, names)
        return path if similar is None else os.path.join(folder, similar)

    def medium(self, given: str, wanted: Kind | None = None) -> Media:
        """The image or video at a path, by its bytes; ``wanted`` is what it has to be. Raises
        PluginError: for what may not or cannot be read, or is the other one.
        """
        path = self.path(given)
        with self.open(path) as file:
            head = file.read(SNIFF_BYTES)
        # A GIF may be either.
        kind = "video" if wanted == "video" and head[:4] == b"GIF8" else sniff(head)
        if wanted is None and kind is None:
            message = f"{_short(path)} is neither an image nor a video of a usual format"
            raise PluginError("unsupported_media", message, "choose another file")
        if wanted is not None and kind is not None and kind != wanted:
            article = "a" if kind == "video" else "an"
            raise bad_request(f"{_short(path)} is {article} {kind}", f"use ask_{kind} for {kind}s")
        # What begins as neither is for the backend to refuse, by name.
        return Media(kind or wanted or "image", path=path)

    def open(self, path: str) -> BinaryIO:
        """Opens a file as the policy does."""
        # As a video: of those any size may be opened.
        file = self.policy.open(Media("video", path=path))
        assert not isinstance(file, bytes)
        return file

    def folder(self, given: str) -> str:
        """A folder that may be listed: an allowed one, or one below it. Raises PluginError: as
        :meth:`path`, and for what is no folder.
        """
        path = _absolute(given)
        try:
            os.close(self.policy.open_folder(path))
        except PluginError as error:
            raise self._refused(path) if error.code == "bad_request" else error from None
        return path

    def _refused(self, path: str) -> PluginError:
        if path.rstrip("/") in map(str, self.policy.folders or ()):
            return bad_request(f"{_short(path)} is a folder", "name an image or a video in it")
        if not self.policy.folders:
            return bad_request("no folder is open to this server", f"{ALLOW_DIR_HINT} to open one")
        message = f"{_short(path)} is not below a folder that is open to this server"
        return bad_request(message, f"open are: {self.folders()}; for another, {ALLOW_DIR_HINT}")


def _absolute(given: str) -> str:
    path = os.path.expanduser(given) if given == "~" or given.startswith("~/") else given
    if "\0" in path:
        raise bad_request("the path holds a NUL", "give an absolute path")
    if os.path.isabs(path):
        return path
    if _URL.match(path):
        raise bad_request(f"{_short(path)} is an address, and only files are read", "give a path")
    message = f"the path {_short(path)} is relative, and to which folder is not known here"
    raise bad_request(message, "give an absolute path")


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else f"{text[:60]}…{text[-50:]}")
