"""Where bytes come from: files and what is none, images and videos told apart, downloads."""

from __future__ import annotations

import base64
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from images import recorded
from PIL import Image
from videos import counting, written

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media import sources
from mlx_onevision.media.image import identify_image, load_image
from mlx_onevision.media.sources import download, is_url, is_video, quoted
from mlx_onevision.media.video import load_video
from mlx_onevision.plugins import interface


def outcome(read: Any, *arguments: Any) -> Any:
    """What reading gives, or its error; not waited for without end."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(read(*arguments))
        except Exception as error:
            future.set_result(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(10)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_pipe_or_a_device_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, str(pipe), "/dev/null", "/dev/zero"):
        error = outcome(load_image, path) if kind == "image" else outcome(load_video, path, 8)
        assert isinstance(error, MediaError)
        assert f"is no ordinary file, not {'an image' if kind == 'image' else 'a video'}" in str(
            error
        )
        assert not is_video(path)


def test_a_file_object_that_gives_no_bytes_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", recorded()["file/jpeg 4:4:4"].tobytes())
    with path.open("rb") as closed, path.open("rb", 0) as closed_raw:
        pass
    with (
        path.open(encoding="utf-8") as utf_8,
        path.open(encoding="latin-1") as latin_1,
        (tmp_path / "b.png").open("wb") as unreadable,
    ):
        for source, words in (
            (StringIO("x"), "the KIND given as a file object does not give bytes; open the file "),
            (utf_8, r".*a\.png' does not give bytes; open the file in binary mode"),
            (latin_1, r".*a\.png' does not give bytes; open the file in binary mode"),
            (closed, r"cannot read '.*a\.png': .*closed file"),
            (closed_raw, r"cannot read '.*a\.png': .*closed file"),
            (unreadable, r"cannot read '.*b\.png': read"),
        ):
            for read in (load_image, identify_image, lambda source: load_video(source, 8)):
                kind = "image" if read in (load_image, identify_image) else "video"
                with pytest.raises(MediaError, match=words.replace("KIND", kind)):
                    read(cast(Any, source))


def animation(brand: bytes) -> bytes:
    """An AVIF image sequence of that major brand."""
    file = BytesIO()
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(file, "AVIF", save_all=True, append_images=frames[1:])
    data = file.getvalue()
    assert data[4:12] == b"ftypavis"
    return data[:8] + brand + data[12:]


@pytest.mark.parametrize("brand", [b"avis", b"avif", b"msf1", b"mif1"])
def test_an_image_sequence_is_an_image_in_library_and_plugins(brand: bytes) -> None:
    data = animation(brand)
    assert interface.sniff(data[:32]) == "image" and not is_video(data)
    assert load_image(data).shape == (30, 40, 3)


def test_a_video_without_a_file_type_box_is_one_in_library_and_plugins(tmp_path: Path) -> None:
    data = counting(3)
    assert data[4:8] == b"ftyp"
    data = data[:4] + b"free" + data[8:]
    assert interface.sniff(data[:32]) == "video"
    assert is_video(data) and is_video(written(tmp_path / "nameless", data))
    assert load_video(data, 8).total == 3


def test_the_scheme_of_a_data_uri_may_be_in_capitals() -> None:
    file = BytesIO()
    Image.new("RGB", (4, 5)).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    assert load_image(f"DATA:image/png;base64,{text}").shape == (5, 4, 3)
    encoded = base64.b64encode(counting(2)).decode()
    assert is_video(f"DATA:video/mp4;base64,{encoded}")
    assert load_video(f"DATA:video/mp4;base64,{encoded}", 8).total == 2


class Answers(BaseHTTPRequestHandler):
    """What each path of the test's server answers."""

    agents: list[str]

    def do_GET(self) -> None:
        body = recorded()["file/jpeg turned 6"].tobytes()
        self.agents.append(self.headers["User-Agent"])
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path in ("/picture.jpg", "/m%C3%BCnchen%20bild.png?a=%C3%A9%20b"):
            self.answer(body, len(body))
        elif self.path == "/claims-much":
            self.answer(b"", 1 << 40)
        elif self.path == "/is-much":
            self.answer(bytes(100_000), None)
        elif self.path == "/stops":
            self.answer(body[:-200], len(body))
        elif self.path == "/empty":
            self.answer(b"", 0)
        elif self.path == "/drips":
            self.answer(body[:10], None)
            self.stop.wait(10)
        else:
            self.send_error(404)

    stop = threading.Event()

    def answer(self, body: bytes, length: int | None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to stderr."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that answers as above."""
    monkeypatch.setenv("no_proxy", "*")
    Answers.agents = []
    Answers.stop.clear()
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    Answers.stop.set()
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_url_is_read_like_a_file(server: str) -> None:
    expected = load_image(recorded()["file/jpeg turned 6"].tobytes())
    assert np.array_equal(load_image(f"{server}/picture.jpg"), expected)
    assert np.array_equal(load_image(f"{server}/to//picture.jpg"), expected)
    assert np.array_equal(load_image(f"{server}/to/{server}/picture.jpg"), expected)
    assert set(Answers.agents) == {"mlx-onevision"}


@pytest.mark.parametrize(
    "path",
    [
        "/münchen bild.png?a=é b",
        "/m%C3%BCnchen%20bild.png?a=é%20b#teil ü",
        "/to//münchen bild.png?a=é b",
    ],
)
def test_a_url_is_read_as_people_write_it(server: str, path: str) -> None:
    assert load_image(server + path).shape


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://bücher.example/a", "https://xn--bcher-kva.example/a"),
        ("https://straße.example:8443/ä b", "https://strasse.example:8443/%C3%A4%20b"),
        ("http://127.0.0.1:80/a%20b?c=d&e=%2F", "http://127.0.0.1:80/a%20b?c=d&e=%2F"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("https://a.example/写真.jpg?x=1+2", "https://a.example/%E5%86%99%E7%9C%9F.jpg?x=1+2"),
    ],
)
def test_a_url_is_sent_in_ascii(url: str, sent: str) -> None:
    assert sources.encoded_url(url) == sent


SCREENSHOT = "Screenshot 2026-01-05 at 3.07.21\u202fPM.png"


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        (SCREENSHOT, SCREENSHOT.replace("\u202f", " ")),
        ("Mu\u0308nchen.png", "M\u00fcnchen.png"),
        ("M\u00fcnchen.png", "Mu\u0308nchen.png"),
        ("a\u00a0b.png", "a b.png"),
    ],
)
def test_a_name_that_looks_the_same_is_taken_where_there_is_no_other(
    there: str, asked: str, tmp_path: Path
) -> None:
    Image.new("RGB", (4, 5)).save(tmp_path / there)
    assert load_image(tmp_path / asked).shape == (5, 4, 3)
    assert load_image(str(tmp_path / asked)).shape == (5, 4, 3)
    Image.new("RGB", (7, 8)).save(tmp_path / asked)
    assert load_image(tmp_path / asked).shape == (8, 7, 3)  # the exact one


def test_of_several_that_look_the_same_none_is_taken(tmp_path: Path) -> None:
    for space in "\u202f\u00a0":
        Image.new("RGB", (4, 5)).save(tmp_path / f"a{space}b.png")
    with pytest.raises(MediaError, match="does not exist"):
        load_image(tmp_path / "a b.png")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing.jpg", "the server answers 404"),
        ("/stops", "it broke off after [0-9,]+ of [0-9,]+ bytes"),
        ("/empty", "is empty"),
        ("/to/ftp://127.0.0.1/a.jpg", "the server answers 302"),
        ("/to/file:///etc/hostname", "the server answers 302"),
        ("/is-much", "is not an image"),
    ],
)
def test_a_bad_answer_is_one_sentence(server: str, path: str, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        load_image(server + path)
    assert server + path in str(caught.value)


def test_too_many_bytes(server: str) -> None:
    """By what the header says before anything is read, else as soon as they came."""
    for path in ("/claims-much", "/is-much"):
        with pytest.raises(TooLargeError, match="larger than"):
            download(server + path, most=50_000)


def test_a_server_that_does_not_answer(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TIMEOUT", 0.2)
    with pytest.raises(MediaError, match="timed out"):
        download(f"{server}/drips")
    monkeypatch.setattr(sources, "DEADLINE", -1.0)
    with pytest.raises(MediaError, match="not done after"):
        download(f"{server}/picture.jpg")


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.jpg"
        with pytest.raises(MediaError, match=f"cannot read '{url}': Connection refused"):
            download(url)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "https://a b/c", "http://host:port/"])
def test_what_is_no_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(MediaError, match="cannot read 'http"):
        load_image(url)


@pytest.mark.parametrize("url", ["ftp://host/a.jpg", "file:///etc/hostname", "s3://bucket/a.jpg"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(MediaError, match="only http and https are read"):
        load_image(url)


def test_what_is_a_url() -> None:
    assert is_url("HTTPS://host/a.jpg")
    assert not is_url("C:/a.jpg") and not is_url("http.jpg") and not is_url("data:image/png,")


def test_quoted_is_one_short_line() -> None:
    assert quoted("a b.jpg") == "'a b.jpg'"
    assert quoted("a\nb") == r"'a\nb'"
    assert len(quoted("a" * 5000)) < 160 and quoted("a" * 5000 + ".png").endswith(".png'")
