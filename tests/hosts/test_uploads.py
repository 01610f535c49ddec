"""A video of 60 MB, which no request has room for: sent by itself, by a program and by the page."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, Route, expect
from served import Client, serving, text, video, wait_for
from videos import grainy

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http import app
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.spool import Spool

LINUX = sys.platform == "linux"  # which says what a process has held
FILES = "/v1/files"
DESCRIBE = "/v1/video/describe"
CHAT = "/v1/chat/completions"
CAPTIONS = [
    "A red circle moves right, and a blue square stays still.",
    "An orange star moves up.",
    "A purple triangle moves left.",
    "A green square gets bigger.",
    "A red star moves down, and a black circle stays still.",
]


@pytest.fixture(scope="module")
def grainy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "grainy.mp4"
    path.write_bytes(grainy(app.STATIC_FOLDER / "shapes.mp4"))
    assert path.stat().st_size > 60e6
    return path


def taking(folder: Path) -> MediaPolicy:
    return MediaPolicy(uploads=Spool(folder, max_file_bytes=1 << 30, max_total_bytes=4 << 30))


def posted(tab: Tab) -> int:
    return sum(one.method == "POST" for one in tab.sent if one.url == tab.origin + FILES)


def answer(tab: Tab, question: str) -> str:
    """What is answered, in a turn of its own, once what is under way has come to its end."""
    stop = tab.button("Stop")
    expect(stop).to_be_hidden(timeout=120_000)
    before = tab.turns.count()
    tab.ask(question)
    expect(tab.turns).to_have_count(before + 1)
    expect(stop).to_be_hidden(timeout=120_000)
    return tab.turns.last.locator(".answer > .words").inner_text()


def test_the_page_sends_it_once(browser: Browser, grainy_file: Path, tmp_path: Path) -> None:
    backend = open_backend("engine", model="demo", policy=taking(tmp_path))
    with serving(backend) as client, opened(browser, None, client=client) as tab:
        expect(tab.page.locator("#limits")).to_contain_text("a video of up to 1.07 GB")
        tab.choose(grainy_file)
        expect(tab.page.locator("#video video")).to_be_visible()
        tab.button("Describe the video").click()
        parts = tab.turns.locator(".parts li .words")
        expect(parts).to_have_text(CAPTIONS, timeout=120_000)
        (asked,) = tab.bodies(DESCRIBE)
        assert re.fullmatch(r"upload:[0-9a-f]{32}", asked["video"])
        assert "red circle" in answer(tab, "How does the red circle move?")
        assert posted(tab) == 1
        # The server has let go of it: the page sends it again, unasked.
        tab.allowed.append("404")
        assert client.ask("DELETE", f"{FILES}/{asked['video'][7:]}").status == 200
        assert answer(tab, "What happens in the video?")
        assert posted(tab) == 2
        # It is kept over a reload, as any other.
        tab.page.reload()
        expect(tab.page.locator("#video .name")).to_have_text("grainy.mp4")
        expect(parts).to_have_text(CAPTIONS)


def test_what_is_shown_while_it_is_sent(
    browser: Browser, grainy_file: Path, tmp_path: Path
) -> None:
    backend = FakeBackend(policy=taking(tmp_path))
    with opened(browser, backend, allowed=("ERR_ABORTED", "net::")) as tab:
        held: list[Route] = []
        tab.page.route("**/v1/files", lambda route: held.append(route))
        tab.choose(grainy_file)
        tab.ask("What is it?")
        waiting = tab.turns.locator(".waiting")
        expect(waiting).to_have_text("Sending the video")
        # The model is not loaded either, which is not what is waited for.
        tab.page.wait_for_timeout(600)
        expect(waiting).to_have_text("Sending the video")
        held[0].continue_()
        expect(tab.words).to_have_text("What is it? [0 images][1 video]", timeout=60_000)


def test_the_server_refuses_it(browser: Browser, grainy_file: Path, tmp_path: Path) -> None:
    small = MediaPolicy(uploads=Spool(tmp_path, max_file_bytes=1 << 30, max_total_bytes=1 << 20))
    allowed = ("429", "ERR_CONNECTION", "net::", "404")
    with opened(browser, FakeBackend(policy=small), allowed=allowed) as tab:
        tab.choose(grainy_file)
        tab.ask("What is it?")
        fault = tab.turns.get_by_role("alert")
        expect(fault).to_contain_text(re.compile("is busy; try again|server hung up before"))
    small = MediaPolicy(uploads=Spool(tmp_path, max_file_bytes=50 << 20, max_total_bytes=1 << 30))
    with opened(browser, FakeBackend(policy=small)) as tab:
        tab.choose(grainy_file)
        expect(tab.page.get_by_role("alert")).to_contain_text(
            re.compile(
                r"has 6\d\.\d MB, but the server has room for 52\.4 MB; mlx-onevision describe"
            )
        )


def peak(process: "subprocess.Popen[str]") -> float:
    """MB that it has held at most."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve(cache: Path) -> tuple["subprocess.Popen[str]", Client]:
    server = subprocess.Popen(
        [sys.executable, "-m", "mlx_onevision", "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    assert server.stderr is not None
    for line in server.stderr:
        if line.startswith("Serving at http://"):
            return server, Client(int(line.split("/v1")[0].rpartition(":")[2]))
    raise AssertionError("it did not begin to serve")


def stored(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 100]


def test_the_command(grainy_file: Path, tmp_path: Path) -> None:
    data = grainy_file.read_bytes()
    server, client = serve(tmp_path)
    try:
        before = peak(server) if LINUX else 0.0
        sent = client.ask("POST", FILES, data, {"Content-Type": "video/mp4"})
        assert sent.status == 201 and sent.json["bytes"] == len(data)
        assert not LINUX or peak(server) - before < 30, "it is held in memory"
        assert stored(tmp_path) == [sent.json["id"]]
        answer = client.chat([video(sent.json["url"]), text("How does the red circle move?")])
        assert "right" in answer.json["choices"][0]["message"]["content"]
        server.send_signal(signal.SIGKILL)
        server.communicate()
        assert stored(tmp_path) == [sent.json["id"]]
        server, client = serve(tmp_path)
        assert stored(tmp_path) == []  # what a crash left
        assert client.ask("POST", FILES, data, {"Content-Type": "video/mp4"}).status == 201
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)
        wait_for(lambda: not stored(tmp_path))
    finally:
        server.kill()
        server.communicate()
