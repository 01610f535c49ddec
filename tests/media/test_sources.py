"""Downloads, against a server of our own on this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from recorded_pixels import recorded

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media import sources as fetch
from mlx_onevision.media.image import load_image
from mlx_onevision.media.sources import download, is_url, quoted


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
        elif self.path == "/picture.jpg":
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
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    with pytest.raises(MediaError, match="timed out"):
        download(f"{server}/drips")
    monkeypatch.setattr(fetch, "DEADLINE", -1.0)
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
