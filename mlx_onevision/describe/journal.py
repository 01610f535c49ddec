"""The finished parts of a description, kept in a file, so that the rest can be done later.

The file has a line of JSON each for what the description depends on (the video, the model, the
settings), for the spans of the scenes, for each segment, for each answer to a prompt of text, and
for the whole description. A line is on the disk before the next one is begun, and ends with a
checksum: a line that was cut short or changed does not count, and nothing behind it does.
"""

import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

from mlx_onevision.describe.formats import Segment, VideoDescription
from mlx_onevision.describe.scenes import Span
from mlx_onevision.errors import RequestError
from mlx_onevision.files import claim

VERSION = 2
BEGIN = b'{"type": "describes", '
CHECKSUM = b', "crc32": '
SAMPLES, SAMPLE = 64, 1 << 16  # of a video: places, and bytes at each

logger = logging.getLogger("mlx_onevision")


def fingerprint(file: BinaryIO) -> str:
    """A digest that tells videos apart without reading a long one whole: of its size, and of 64 KB
    at each of 64 places spread evenly over it. Up to 4 MB, that is every byte.
    """
    size = os.fstat(file.fileno()).st_size
    digest = blake2b(str(size).encode(), digest_size=20)
    last = max(size - SAMPLE, 0)
    for place in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
        digest.update(os.pread(file.fileno(), SAMPLE, place))
    return digest.hexdigest()


class BusyError(RequestError):
    """Another process is writing the file."""


class Journal:
    """The file, or with no path only what it would hold.

    path : where it is, or will be; its folder is there.
    about : what a description depends on, plain values.
    force : start over, whatever is there.
    spans : of the scenes, once they are known. segments : by number, with the warnings of each.
    answers : by question. description : once it is whole.

    Raises:
        RequestError: for a file that cannot be opened, that is of another kind, and that is about
            another video, model or settings.
        BusyError: for a file that another run is writing.
        OSError: where it cannot be read or written after that.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any], force: bool = False) -> None:
        self.spans: list[Span] | None = None
        self.segments: dict[int, tuple[Segment, list[str]]] = {}
        self.answers: dict[str, str] = {}
        self.description: VideoDescription | None = None
        self._path = path
        self._file: BinaryIO | None = None
        self._ours = False
        if path is None:
            return
        try:
            file = claim(path)
        except OSError as error:
            raise RequestError(
                f"{path} cannot be written: {error.strerror}; give another file for what is done"
            ) from error
        if file is None:
            raise BusyError(
                f"{path} is being written by another run; wait for it, or use another file"
            )
        self._file = file
        try:
            header = {"type": "describes", "version": VERSION, **about}
            begin = file.read(len(BEGIN))
            if not BEGIN.startswith(begin):  # it may have been cut short, but is nobody else's
                raise RequestError(f"{path} is no record of a description; use another file")
            if force:
                file.truncate(0)
            if not self._read(file, json.loads(json.dumps(header))):
                self._append(header)
            self._ours = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, which has all that was added; one without scenes is removed."""
        if self._file is not None:
            if self._path is not None and self._ours and not (self.spans or self.segments):
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def add_spans(self, spans: Sequence[Span]) -> None:
        self.spans = list(spans)
        self._append({"type": "scenes", "spans": self.spans})

    def add_segment(self, index: int, segment: Segment, warnings: Sequence[str]) -> None:
        self.segments[index] = segment, list(warnings)
        row = {"index": index, **segment.to_dict(), "warnings": list(warnings)}
        self._append({"type": "segment", **row})

    def add_answer(self, question: str, text: str) -> None:
        self.answers[question] = text
        self._append({"type": "answer", "question": question, "text": text})

    def finish(self, description: VideoDescription) -> None:
        self.description = description
        self._append({"type": "description", **description.to_dict()})

    def _append(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            text = json.dumps(row).encode()[:-1]
            self._file.write(text + CHECKSUM + str(zlib.crc32(text)).encode() + b"}\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, file: BinaryIO, header: Mapping[str, Any]) -> bool:
        """Takes what is there; False where there is no header yet. Writing goes on behind the last
        whole line.
        """
        file.seek(0)
        whole = 0
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            try:
                row = _checked(line)
                if number:
                    self._take(row)
            except (ValueError, KeyError, TypeError, RequestError):
                if self._path is not None:
                    logger.warning(
                        "%s is damaged in line %d: from there on it is done again",
                        self._path.name,
                        number + 1,
                    )
                break
            if not number and row != header:
                raise RequestError(
                    f"{self._path} is about {_difference(row, header)}; "
                    "start over (force), or use another file"
                )
            whole += len(line)
        file.seek(whole)
        file.truncate()
        return whole > 0

    def _take(self, row: Mapping[str, Any]) -> None:
        kind = row["type"]
        if kind == "scenes":
            self.spans = [(float(start), float(end)) for start, end in row["spans"]]
        elif kind == "segment":
            warnings = [str(warning) for warning in row["warnings"]]
            self.segments[int(row["index"])] = Segment.from_dict(row), warnings
        elif kind == "answer":
            self.answers[str(row["question"])] = str(row["text"])
        elif kind == "description":
            self.description = VideoDescription.from_dict(row)


def _checked(line: bytes) -> dict[str, Any]:
    """What a line says. ValueError where it is not what was written."""
    value: object = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    row = cast(dict[str, Any], value)
    if row.get("type") == "describes" and row.get("version") != VERSION:
        return row  # its lines may have no checksums
    text, mark, _ = line.rpartition(CHECKSUM)
    if not mark or zlib.crc32(text) != row.pop("crc32"):
        raise ValueError("the checksum is another one")
    return row


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    version = found.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        return f"{'a newer' if newer else 'an older'} form of this file"
    for name, other in (("video", "another video"), ("model", "another model")):
        if found.get(name) != wanted.get(name):
            return other
    if found.get("settings") != wanted.get("settings"):
        return "other settings"
    return "something else"
