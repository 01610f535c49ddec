"""What a backend reads for those who ask it: what it was allowed to, and nothing else."""

import base64
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hostile.addresses import hostile

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import GenerateRequest, Media
from mlx_onevision.plugins.service import download as remote
from mlx_onevision.plugins.service.media_policy import Hints, MediaPolicy

SHAPES = Path(__file__).parents[2] / "examples/shapes.png"


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Images that may be read, beside one that may not."""
    album = tmp_path / "album"
    (album / "inner").mkdir(parents=True)
    (album / "a.png").write_bytes(b"allowed")
    (album / "inner/b.png").write_bytes(b"allowed too")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "album-2").mkdir()
    (tmp_path / "album-2/c.png").write_bytes(b"secret")
    (album / "link.png").symlink_to(tmp_path / "secret.png")
    (album / "away").symlink_to(tmp_path)
    (album / "home.png").symlink_to(album / "a.png")
    os.mkfifo(album / "pipe.png")
    return album


def image(path: str | Path) -> Media:
    return Media("image", path=str(path))


def refused(policy: MediaPolicy, medium: Media) -> PluginError:
    with pytest.raises(PluginError) as raised:
        policy.open(medium)
    assert len(str(raised.value)) < 300 and not str(raised.value).endswith(".")
    return raised.value


def content(policy: MediaPolicy, medium: Media) -> bytes:
    source = policy.open(medium)
    if isinstance(source, bytes):
        return source
    with source:
        assert source.name == medium.path
        return source.read()


def test_bytes_and_nothing_else_by_default(album: Path) -> None:
    policy = MediaPolicy()
    assert content(policy, Media("image", data=b"abc")) == b"abc"
    url = f"data:image/png;base64,{base64.b64encode(b'abc').decode()}"
    assert content(policy, Media("image", url=url)) == b"abc"
    for medium in (image(album / "a.png"), Media("image", url="http://example.org/a.png")):
        error = refused(policy, medium)
        assert error.code == "bad_request" and "MediaPolicy" in error.hint


def test_a_refusal_has_the_words_of_the_program_that_runs(album: Path) -> None:
    hints = Hints("--media-root", "--allow-media-host", "--allow-private")
    policy = MediaPolicy(hosts=["127.0.0.1:9"], hints=hints)
    assert refused(policy, image(album / "a.png")).hint == "--media-root"
    for url, hint in (
        ("http://example.org/a.png", "--allow-media-host"),
        ("http://127.0.0.1:9/a.png", "--allow-private"),
    ):
        assert refused(policy, Media("image", url=url)).hint == hint


def test_files_below_an_allowed_folder(album: Path) -> None:
    policy = MediaPolicy(folders=[album])
    assert content(policy, image(album / "a.png")) == b"allowed"
    assert content(policy, image(album / "inner/b.png")) == b"allowed too"
    assert content(policy, image(f"{album}//inner/./b.png")) == b"allowed too"


def test_a_folder_named_by_a_link_is_the_folder(album: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(album)
    for folder, asked in ((alias, album), (alias, alias), (album, album)):
        assert content(MediaPolicy(folders=[folder]), image(asked / "a.png")) == b"allowed"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("../secret.png", "bad_request"),
        ("inner/../../secret.png", "bad_request"),
        ("inner/../a.png", "bad_request"),
        ("../album-2/c.png", "bad_request"),
        (".", "bad_request"),
        ("link.png", "unsupported_media"),
        ("home.png", "unsupported_media"),
        ("away/secret.png", "unsupported_media"),
        ("away/album/a.png", "unsupported_media"),
        ("pipe.png", "unsupported_media"),
        ("inner", "unsupported_media"),
        ("a.png/b.png", "unsupported_media"),
        ("nothing.png", "unsupported_media"),
        ("x" * 5000, "unsupported_media"),
    ],
)
def test_ways_around_it_are_closed(album: Path, name: str, code: str) -> None:
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: Any) -> None:
        if watching and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(watch)
    error = refused(MediaPolicy(folders=[album]), image(f"{album}/{name}"))
    watching = False
    assert error.code == code
    assert not any("secret" in path or "album-2" in path for path in opened)


def test_folders_are_listed_as_files_are_read(album: Path, tmp_path: Path) -> None:
    policy = MediaPolicy(folders=[album])
    for folder in (album, album / "inner"):
        descriptor = policy.open_folder(str(folder))
        try:
            assert sorted(os.listdir(descriptor)) == sorted(os.listdir(folder))
        finally:
            os.close(descriptor)
    for path, code in (
        (tmp_path, "bad_request"),
        (album / "inner/../..", "bad_request"),
        (album / "away", "unsupported_media"),
        (album / "a.png", "unsupported_media"),
        (album / "nothing", "unsupported_media"),
    ):
        with pytest.raises(PluginError) as raised:
            policy.open_folder(str(path))
        assert raised.value.code == code


def test_other_forms_of_a_path_are_no_way_around(album: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(album)
    policy = MediaPolicy(folders=[album])
    for path in ("a.png", "./a.png", "~/a.png", f"file://{album}/a.png", "/etc/passwd", "/", "\\a"):
        assert refused(policy, image(path)).code == "bad_request"


def test_what_is_there_is_not_said_outside(album: Path, tmp_path: Path) -> None:
    policy = MediaPolicy(folders=[album])
    there = refused(policy, image(tmp_path / "secret.png"))
    not_there = refused(policy, image(tmp_path / "sacred.png"))
    assert str(there).replace("secret", "") == str(not_there).replace("sacred", "")


def test_a_name_that_becomes_a_link_while_it_is_opened(album: Path, tmp_path: Path) -> None:
    """Whatever is swapped, and when: what is read is the allowed file or nothing."""
    policy, stop = MediaPolicy(folders=[album]), threading.Event()
    target, away = album / "inner", album / "inner-2"

    def swap() -> None:
        while not stop.is_set():
            os.rename(target, away)
            os.symlink(tmp_path, target)
            os.unlink(target)
            os.rename(away, target)

    (tmp_path / "b.png").write_bytes(b"secret")
    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(300):
            try:
                assert content(policy, image(target / "b.png")) == b"allowed too"
            except PluginError as error:
                assert error.code == "unsupported_media"
    finally:
        stop.set()
        swapper.join()


def test_a_trusting_one_reads_every_file(album: Path, monkeypatch: Any) -> None:
    policy = MediaPolicy.trusting()
    monkeypatch.chdir(album)
    assert content(policy, image("a.png")) == b"allowed"
    assert content(policy, image(album / "link.png")) == b"secret"
    assert refused(policy, image(album / "pipe.png")).code == "unsupported_media"


def test_files_are_closed_again(album: Path) -> None:
    policy = MediaPolicy(folders=[album])
    before = len(os.listdir("/dev/fd"))
    for name in ("a.png", "link.png", "away/secret.png", "inner", "nothing", "pipe.png") * 5:
        try:
            content(policy, image(album / name))
        except PluginError:
            pass
    assert len(os.listdir("/dev/fd")) == before


def test_too_much_is_refused(album: Path) -> None:
    policy = MediaPolicy(folders=[album], size=8, images=2, frames=4)
    url = "data:image/png;base64," + base64.b64encode(b"x" * 9).decode()
    for medium in (
        Media("image", data=b"x" * 9),
        Media("video", data=b"x" * 9),
        Media("image", url=url),
        Media("image", url="data:image/png;base64," + "A" * 100_000),
        image(album / "inner/b.png"),
    ):
        assert refused(policy, medium).code == "too_large"
    # A video on disk is read in place.
    video = Media("video", path=str(album / "inner/b.png"))
    assert content(policy, video) == b"allowed too"
    with pytest.raises(PluginError, match="3 images; send 2 at most"):
        policy.admit([Media("image", data=b"x")] * 3)
    policy.check_frames(4)
    with pytest.raises(PluginError, match="5 frames"):
        policy.check_frames(5)


def test_bad_base64_is_refused() -> None:
    for url in ("data:image/png;base64,???", "data:image/png,plain"):
        assert refused(MediaPolicy(), Media("image", url=url)).code == "unsupported_media"


def test_a_policy_that_makes_no_sense(tmp_path: Path) -> None:
    nonsense: list[dict[str, Any]] = [
        {"folders": str(tmp_path)},
        {"hosts": "a"},
        {"folders": [tmp_path / "no"]},
    ]
    for given in nonsense:
        with pytest.raises(PluginError):
            MediaPolicy(**given)


# Addresses.


class Server(ThreadingHTTPServer):
    paths: list[str]


class Answers(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        port = self.server.server_address[1]
        where = {
            "/moved": "/picture",
            "/loop": "/loop",
            "/away": "http://elsewhere.test/picture",
            "/odd": "file:///etc/passwd",
            "/inside": f"http://127.0.0.2:{port}/picture",
        }.get(self.path)
        self.send_response(302 if where else 404 if self.path == "/no" else 200)
        if where:
            self.send_header("Location", where)
        body = {"/picture": b"picture", "/large": b"x" * 2000, "/endless": b""}.get(self.path, b"")
        promised = {"/broken": 50, "/huge": 1 << 40}.get(self.path, len(body))
        if self.path != "/endless":
            self.send_header("Content-Length", str(promised))
        self.end_headers()
        try:
            for _ in range(1000 if self.path == "/endless" else 0):
                self.wfile.write(b"x" * 1000)
            self.wfile.write(body)
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    server.paths = []
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_allowed_host(server: Server) -> None:
    here = f"127.0.0.1:{server.server_address[1]}"
    policy = MediaPolicy(hosts=[here], private=True, size=1000)

    def get(path: str) -> Media:
        return Media("image", url=f"http://{here}{path}")

    assert content(policy, get("/picture")) == b"picture"
    assert content(policy, get("/moved")) == b"picture"
    for path, code, word in (
        ("/no", "unsupported_media", "404"),
        ("/loop", "unsupported_media", "redirects"),
        ("/away", "bad_request", "elsewhere.test"),
        ("/odd", "bad_request", "not an address"),
        ("/inside", "bad_request", "127.0.0.2"),
        ("/large", "too_large", "MB"),
        ("/huge", "too_large", "MB"),
        ("/endless", "too_large", "MB"),
        ("/broken", "unsupported_media", "broke"),
    ):
        error = refused(policy, get(path))
        assert error.code == code and word in str(error), (path, error)
    # The same host is out of reach unless its owner says that it may be near.
    server.paths.clear()
    assert "network" in refused(replace(policy, private=False), get("/picture")).message
    assert server.paths == []


@pytest.mark.parametrize("hosts", [(), ("allowed.test",), None])
def test_no_address_reaches_this_machine(server: Server, monkeypatch: Any, hosts: Any) -> None:
    """Over a hundred of them, for images and videos; whatever names stand for."""
    server.paths.clear()
    real = socket.getaddrinfo
    connected: list[str] = []

    def resolve(host: str, *rest: Any, **named: Any) -> Any:
        if host.endswith((".test", ".example")):
            return real("127.0.0.1", *rest, **named)
        return real(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", lambda a, **_: connected.append(a))
    policy = MediaPolicy(hosts=hosts)
    addresses = hostile(server.server_address[1])
    assert len(addresses) > 100
    for url in [*addresses, "http://allowed.test/"]:
        for kind in ("image", "video"):
            error = refused(policy, Media(kind, url=url))
            assert error.code in ("bad_request", "unsupported_media")
    assert connected == [] and server.paths == []


def test_a_name_is_looked_up_once(server: Server, monkeypatch: Any) -> None:
    """A name that is harmless when it is judged and near when it is connected to."""
    port = server.server_address[1]
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    connected: list[Any] = []

    def resolve(host: str, where: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), where))]

    def connect(address: Any, **_: Any) -> Any:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    policy = MediaPolicy(hosts=[f"flips.test:{port}"])
    refused(policy, Media("image", url=f"http://flips.test:{port}/picture"))
    assert connected == [("93.184.216.34", port)]


def test_addresses_in_their_parts() -> None:
    where = remote.parse_url("https://Example.ORG:8443/a%20b?c=d#e")
    assert (where.named, where.target) == ("example.org:8443", "/a%20b?c=d")
    assert remote.parse_url("http://example.org:80").named == "example.org"


# What comes of it in a backend.


@pytest.mark.parametrize("name", ["engine", "fake"])
def test_a_backend_asks_its_policy(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(SHAPES.read_bytes())
    inside, outside = tmp_path / "a.png", SHAPES
    with open_backend(name, policy=MediaPolicy(folders=[tmp_path], images=2)) as backend:
        ask = "What is in the image?"
        assert backend.generate(GenerateRequest.ask(ask, image(inside))).result().text
        for media, code in (
            ([image(outside)], "bad_request"),
            ([Media("image", url="http://127.0.0.1/")], "bad_request"),
            ([image(inside)] * 3, "too_large"),
            ([image(tmp_path / "b.png")], "unsupported_media"),
        ):
            with pytest.raises(PluginError) as raised:
                backend.generate(GenerateRequest.ask(ask, *media)).result()
            assert raised.value.code == code
