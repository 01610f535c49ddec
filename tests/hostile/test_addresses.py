"""Addresses and paths on every way into the server: an audit hook sees that none is connected to,
and that no file is opened for one. MCP's tools: tests/plugins/mcp/test_tools.py.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hostile.addresses import Watch, corpus
from served import Client, image, serving, text, video

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.conformance.subject import png
from mlx_onevision.plugins.service.media_policy import MediaPolicy


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def listener() -> Iterator[ThreadingHTTPServer]:
    """What an address of this machine would reach."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    hits: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    assert hits == []


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may be read, beside what may not."""
    root = tmp_path_factory.mktemp("root")
    (root / "album").mkdir()
    (root / "album/a.png").write_bytes(png(8, 8, (1, 2, 3)))
    (root / "secret.png").write_bytes(png(8, 8, (9, 9, 9)))
    (root / "album/link.png").symlink_to(root / "secret.png")
    (root / "album/away").symlink_to(root)
    os.mkfifo(root / "album/pipe")
    return root / "album"


Ask = Callable[[Client, str], Any]
WAYS: dict[str, Ask] = {
    "image": lambda client, url: client.chat([image(url), text("What?")]),
    "video": lambda client, url: client.chat([video(url), text("What?")]),
    "response": lambda client, url: client.ask(
        "POST",
        "/v1/responses",
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": url},
                        {"type": "input_text", "text": "What?"},
                    ],
                }
            ]
        },
    ),
    "vector": lambda client, url: client.ask("POST", "/v1/embeddings", {"input": [image(url)]}),
    "description": lambda client, url: client.ask(
        "POST", "/v1/video/describe", {"video": {"url": url}}
    ),
}


@pytest.mark.parametrize("allowed", [False, True], ids=["by default", "beside what is allowed"])
def test_over_http(watch: Watch, listener: ThreadingHTTPServer, album: Path, allowed: bool) -> None:
    given: dict[str, Any] = {"folders": [album], "hosts": ["allowed.test"]} if allowed else {}
    urls = corpus(listener.server_address[1], album)
    assert len(urls) > 100
    # After a name that is allowed has been looked up, or on the way through what may be read.
    fair = ("look up 'allowed.test'", f"open {str(album)!r}"[:-1])
    with serving(FakeBackend(policy=MediaPolicy(**given))) as client:
        for way in WAYS.values():
            assert way(client, "data:image/png;base64,AAAA").status in (200, 400)  # imports
        for name, way in WAYS.items():
            for url in urls:
                with watch.watching(client.port) as events:
                    reply = way(client, url)
                assert 400 <= reply.status < 500, (name, url, reply)
                assert len(json.dumps(reply.json)) < 700 and b"Traceback" not in reply.body
                assert not [e for e in events if not (allowed and e.startswith(fair))], (name, url)


def test_the_watch_sees_what_it_is_for(watch: Watch, album: Path, tmp_path: Path) -> None:
    with watch.watching() as events:
        (album / "a.png").read_bytes()
    assert events == [f"open {str(album / 'a.png')!r}"]
