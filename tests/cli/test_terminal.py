"""Lines: read from a person or a pipe, kept for the next time, and what is meant by them."""

import io
import sys
from pathlib import Path

import pytest

from mlx_onevision.cli import terminal as lines
from mlx_onevision.cli.paths import media_argument, parse_path
from mlx_onevision.cli.terminal import (
    HISTORY,
    MAX_LINES,
    History,
    history_path,
)
from mlx_onevision.errors import RequestError


def test_paths_are_read_as_people_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = str(tmp_path / "the other's.png")  # with a space and an apostrophe
    Path(other).touch()
    dropped = other.replace(" ", "\\ ").replace("'", "\\'")
    assert parse_path(other) == parse_path(dropped) == parse_path(f'"{other}"') == other
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.png").touch()
    assert parse_path("~/a b.png") == parse_path("~/a\\ b.png") == str(tmp_path / "a b.png")
    assert parse_path("https://example.com/a b.png") == "https://example.com/a b.png"
    assert parse_path("it's nowhere.png") == "it's nowhere.png"


def test_the_reader_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tty:
        def __init__(self, tty: bool) -> None:
            self._tty = tty

        def isatty(self) -> bool:
            return self._tty

    monkeypatch.setattr(sys, "stdin", Tty(False))
    assert lines.line_reader()[1] is False
    monkeypatch.setenv(HISTORY, "")
    monkeypatch.setattr(sys, "stdin", Tty(True))
    assert lines.line_reader()[1] is True


def test_lines_are_kept_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "state" / "mlx-onevision" / "history"
    one, other = History(path), History(path)  # two conversations at once
    assert one.lines() == []
    one.add("what is it")
    other.add("   ")
    other.add("wo ist der grüne Kreis")
    one.add("/exit")
    assert History(path).lines() == ["what is it", "wo ist der grüne Kreis", "/exit"]
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("".join(f"{n}\n" for n in range(2 * MAX_LINES)) + "not whole")
    expected = [str(n) for n in range(MAX_LINES, 2 * MAX_LINES)]
    assert History(path).lines() == expected
    assert path.read_text().split() == expected
    assert [file.name for file in tmp_path.iterdir()] == ["history"]


def test_a_file_that_cannot_be_kept_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\n")
    for path in (None, tmp_path, tmp_path / "file" / "history"):
        history = History(path)
        history.add("hello")
        assert history.lines() == []
    assert History(tmp_path / "file").lines() == ["\ufffd"]
    History(tmp_path / "new").add("half \ud800 pair")
    assert (tmp_path / "new").read_bytes() == b""


def test_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HISTORY, raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert history_path() == Path("/home/me/.local/state/mlx-onevision/history")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/mlx-onevision/history")
    monkeypatch.setenv(HISTORY, "~/mine")
    assert history_path() == Path("/home/me/mine")
    monkeypatch.setenv(HISTORY, "")
    assert history_path() is None


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("file:///tmp/a%20b/M%C3%BCnchen.png", "/tmp/a b/München.png"),
        ("FILE://localhost/a.png", "/a.png"),
        ("a.png", "a.png"),
        ("https://a.example/b.png", "https://a.example/b.png"),
    ],
)
def test_an_address_of_a_file_is_its_path(given: str, path: str) -> None:
    assert media_argument(given) == path == parse_path(given)


def test_a_file_of_another_machine_is_none_of_this_one() -> None:
    for address in ("file://nas/a.png", "file://["):
        with pytest.raises(RequestError, match="is a file of another machine; give the path"):
            media_argument(address)


def test_media_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xd8")))
    assert media_argument("-") == b"\xff\xd8"
    with pytest.raises(RequestError, match="stdin is empty; pipe an image"):
        media_argument("-")
