"""What is done of a description, in a file: torn, foreign, locked, started over."""

import json
from pathlib import Path
from typing import Any

import pytest
from videos import written

from mlx_onevision.describe.formats import Segment, VideoDescription
from mlx_onevision.describe.journal import SAMPLE, SAMPLES, VERSION, Journal, fingerprint
from mlx_onevision.errors import RequestError
from mlx_onevision.files import save

ABOUT: dict[str, Any] = {"video": "v", "model": ["m", "r"], "settings": {"num_frames": 8}}
ONE = Segment(0.0, 2.5, "A dog — runs\u2028on.", (0.0, 1.25))
TWO = Segment(2.5, 4.0, "")
WHOLE = VideoDescription("a.mp4", 4.0, "m", (ONE, TWO), "A dog.", (), ("dark",))


def filled(path: Path) -> bytes:
    with Journal(path, ABOUT) as journal:
        journal.add_spans([(0.0, 2.5), (2.5, 4.0)])
        journal.add_segment(0, ONE, [])
        journal.add_segment(1, TWO, ["dark"])
        journal.add_answer("What?", "A dog.")
        journal.finish(WHOLE)
    return path.read_bytes()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    filled(tmp_path / "a.jsonl")
    with Journal(tmp_path / "a.jsonl", ABOUT) as journal:
        assert journal.spans == [(0.0, 2.5), (2.5, 4.0)]
        assert journal.segments == {0: (ONE, []), 1: (TWO, ["dark"])}
        assert journal.answers == {"What?": "A dog."}
        assert journal.description == WHOLE


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, ABOUT) as journal:
        journal.add_spans([(0.0, 2.5)])
        journal.add_segment(0, ONE, [])
        assert [json.loads(line)["type"] for line in path.read_text().split("\n")[:-1]] == [
            "describes", "scenes", "segment",
        ]  # fmt: skip


def test_a_file_cut_short_anywhere_goes_on_from_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = filled(path)
    ends = [place for place, byte in enumerate(data) if byte == ord("\n")]
    for size in sorted({*range(0, len(data), 41), *ends, *(end + 1 for end in ends[:-1])}):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        with Journal(path, ABOUT) as journal:
            assert (journal.spans is not None) == (whole >= 2)
            assert len(journal.segments) == min(max(whole - 2, 0), 2)
            assert len(journal.answers) == (whole >= 5)
            assert journal.description is None
            journal.add_spans([(0.0, 1.0)])
        lines = path.read_bytes().split(b"\n")
        assert lines[-1] == b"" and len(lines) == max(whole, 1) + 2
        for line in lines[:-1]:
            json.loads(line)


def test_nothing_that_is_spoilt_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = filled(path).splitlines(keepends=True)
    for bad in (b"nonsense\n", b"[]\n", b'{"type": "segment", "index": 0}\n', b"\xff\n", b"\n"):
        path.write_bytes(b"".join([*lines[:3], bad, *lines[3:]]))
        with Journal(path, ABOUT) as journal:
            assert journal.segments == {0: (ONE, [])} and journal.description is None
        assert path.read_bytes() == b"".join(lines[:3])


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"dog", b"hog"), (b"2.5", b"2.4"), (b"dark", b"dart"), (b'"crc32": ', b'"crc32": 1')],
)
def test_a_byte_that_was_changed_is_noticed(
    old: bytes, new: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it is still what could have been written."""
    path = tmp_path / "a.jsonl"
    lines = filled(path).splitlines(keepends=True)
    for number in range(1, len(lines)):
        if old not in lines[number]:
            continue
        changed = lines[number].replace(old, new, 1)
        path.write_bytes(b"".join([*lines[:number], changed, *lines[number + 1 :]]))
        caplog.clear()
        with Journal(path, ABOUT) as journal:
            assert len(journal.segments) == min(max(number - 2, 0), 2)
            assert journal.description is None
        assert f"a.jsonl is damaged in line {number + 1}" in caplog.text


def test_a_file_of_another_form_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for version, form in ((1, "an older"), (None, "an older"), (VERSION + 1, "a newer")):
        path.write_text(json.dumps({"type": "describes", "version": version, **ABOUT}) + "\n")
        with pytest.raises(RequestError, match=f"about {form} form of this file; start over"):
            Journal(path, ABOUT)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"video": "w"}, "another video"),
        ({"model": ["m", "s"]}, "another model"),
        ({"settings": {"num_frames": 9}}, "other settings"),
    ],
)
def test_another_ones_is_not_used(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = filled(path)
    with pytest.raises(RequestError, match=part) as error:
        Journal(path, ABOUT | change)
    assert "force" in str(error.value) and path.read_bytes() == data
    with Journal(path, ABOUT | change, force=True) as journal:
        assert journal.spans is None and not journal.segments
        journal.add_spans([(0.0, 1.0)])
    with Journal(path, ABOUT | change) as journal:
        assert journal.spans == [(0.0, 1.0)]


@pytest.mark.parametrize("data", [b"\x00\x00\x00 ftypisom", b"notes\n", b'{"a": 1}\n', b"{"])
@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_another_kind_is_never_touched(data: bytes, force: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", data)
    if data == b"{":  # the torn beginning of one of ours
        with Journal(path, ABOUT, force) as journal:
            journal.add_spans([])
        return
    with pytest.raises(RequestError, match="no record"):
        Journal(path, ABOUT, force)
    assert path.read_bytes() == data


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, ABOUT) as journal:
        journal.add_spans([(0.0, 1.0)])
        with pytest.raises(RequestError, match="another run"):
            Journal(path, ABOUT, force=True)
    with Journal(path, ABOUT) as journal:
        assert journal.spans == [(0.0, 1.0)]


def test_one_with_nothing_in_it_does_not_stay(tmp_path: Path) -> None:
    with Journal(tmp_path / "a.jsonl", ABOUT):
        pass
    with Journal(None, ABOUT) as journal:
        journal.add_segment(0, ONE, [])
        assert journal.segments
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "a.jsonl"):
        with pytest.raises(RequestError, match=r"cannot be written: .*; give another file"):
            Journal(path, ABOUT)


def test_a_fingerprint_is_the_contents(tmp_path: Path) -> None:
    def mark(data: bytes | bytearray, name: str = "a") -> str:
        with written(tmp_path / name, bytes(data)).open("rb") as file:
            return fingerprint(file)

    large = bytearray(SAMPLE * SAMPLES)
    first = mark(large)
    assert mark(large, "b") == first
    for place in (0, len(large) // 2, len(large) - 1):
        changed = large.copy()
        changed[place] ^= 1
        assert mark(changed) != first
    assert mark(large + b"\0") != first
    assert len({mark(b""), mark(b"\0"), mark(b"\0\0")}) == 3


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.srt"
    save(path, "one\r\n")
    assert path.read_bytes() == b"one\r\n"
    with pytest.raises(UnicodeEncodeError):
        save(path, "two\ud800")
    assert path.read_bytes() == b"one\r\n"
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "a.srt", "")
    assert list(tmp_path.iterdir()) == [path]
