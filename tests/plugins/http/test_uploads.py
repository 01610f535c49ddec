"""Files that are sent by themselves, and the requests that name them."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostile.disk import full
from served import Client, Reply, serving, text, video, wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.spool import Spool

FILES = "/v1/files"
VIDEO = b"\0\0\0\x18ftypmp42" + bytes(300_000)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
LEAST = ServerSettings(max_body_bytes=100_000, max_held_bytes=100_000, header_timeout=1.0)


@contextmanager
def taking(folder: Path, load_seconds: float = 0.0) -> Iterator[Client]:
    spool = Spool(folder, max_file_bytes=1 << 20, max_total_bytes=2 << 20)
    policy = MediaPolicy(uploads=spool, size=100_000)
    backend = FakeBackend(policy=policy, load_seconds=load_seconds)
    with serving(backend, LEAST) as client:
        yield client
    spool.close()


def send(client: Client, data: bytes = VIDEO, kind: str = "video/mp4") -> Reply:
    return client.ask("POST", FILES, data, {"Content-Type": kind})


def stored(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def message(reply: Reply) -> str:
    said = reply.json["error"]["message"]
    assert "; " in said and "\n" not in said
    return said


def test_a_video_that_fits_into_no_request(tmp_path: Path) -> None:
    with taking(tmp_path) as client:
        sent = send(client)
        assert sent.status == 201 and sent.json["bytes"] == len(VIDEO), sent.body
        assert sent.headers["location"] == f"{FILES}/{sent.json['id']}"
        url = sent.json["url"]
        assert client.ask("GET", sent.headers["location"]).json == sent.json
        for part in (video(url), {"type": "video", "video": url}):
            answer = client.chat([part, text("What is it?")])
            assert answer.json["choices"][0]["message"]["content"].endswith("[1 video]")
        described = client.ask("POST", "/v1/video/describe", {"video": {"url": url}})
        assert described.events[-1]["kind"] == "done"
        job = client.ask("POST", "/v1/video/jobs", {"video": url}).json
        wait_for(lambda: client.ask("GET", job["poll"]).json["status"] == "done")
        asked = {"input": [{"type": "video_url", "video_url": url}], "space": "vision"}
        assert client.ask("POST", "/v1/embeddings", asked).status == 200
        gone = client.ask("DELETE", sent.headers["location"])
        assert gone.json == {"object": "file", "id": sent.json["id"], "deleted": True}
        assert client.ask("GET", sent.headers["location"]).status == 404
        assert "send the file again" in message(client.chat([video(url), text("And now?")]))
        assert stored(tmp_path) == []


def test_an_image(tmp_path: Path) -> None:
    with taking(tmp_path) as client:
        url = send(client, PNG, "application/octet-stream").json["url"]
        part = {"type": "image_url", "image_url": {"url": url}}
        said = client.chat([part, text("What?")]).json["choices"][0]["message"]["content"]
        assert said.endswith("[1 image][0 videos]")
        # It is held in memory, so it may not be larger than one that comes with a request.
        url = send(client, PNG + bytes(200_000), "image/png").json["url"]
        reply = client.chat([{"type": "image_url", "image_url": url}, text("What?")])
        assert reply.status == 413 and str(tmp_path) not in message(reply)


@pytest.mark.parametrize(
    ("data", "headers", "status", "said"),
    [
        (VIDEO, {"Content-Type": "application/json"}, 415, "the file itself has to be the body"),
        (VIDEO, {"Content-Type": "multipart/form-data; boundary=x"}, 415, "--data-binary @FILE"),
        (VIDEO, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "video/mp4"),
        (VIDEO, {"Content-Encoding": "gzip"}, 415, "compressed"),
        (b"neither of them, at some length " * 9, {}, 400, "neither an image nor a video"),
        (VIDEO + bytes(1 << 20), {}, 413, "1 MB are taken (serve --max-upload)"),
        (VIDEO, {"Origin": "https://example.org"}, 403, "--allow-origin"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, data: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    with taking(tmp_path) as client:
        reply = client.ask("POST", FILES, data, {"Content-Type": "video/mp4", **headers})
        assert reply.status == status and said in reply.json["error"]["message"], reply.body
        assert stored(tmp_path) == []
        assert send(client).status == 201


def test_one_that_is_larger_than_it_says(tmp_path: Path) -> None:
    """In chunks, whose sum nobody knows before."""
    with taking(tmp_path) as client, socket.create_connection(("127.0.0.1", client.port)) as line:
        head = f"POST {FILES} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: video/mp4\r\n"
        line.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = VIDEO[: 1 << 16]
        for _ in range(20):
            line.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        line.sendall(b"0\r\n\r\n")
        answer = line.makefile("rb").read()
        assert b" 413 " in answer and b"the file has more than 1 MB; send something" in answer
        assert stored(tmp_path) == []


def test_all_of_them_together_are_bounded(tmp_path: Path) -> None:
    with taking(tmp_path) as client:
        sent = [send(client, VIDEO + bytes(600_000)) for _ in range(4)]
        assert [one.status for one in sent] == [201, 201, 429, 429]
        assert "retry-after" in sent[-1].headers and "try again" in message(sent[-1])
        assert sum(path.stat().st_size for path in stored(tmp_path)) <= 2 << 20


def test_a_full_disk(tmp_path: Path) -> None:
    with taking(tmp_path) as client:
        with full(100_000):
            reply = send(client)
        assert reply.status == 507 and "has no more room" in message(reply)
        assert str(tmp_path) not in reply.body.decode() and stored(tmp_path) == []
        assert send(client).status == 201


def test_a_client_that_leaves_or_stands_still(tmp_path: Path) -> None:
    with taking(tmp_path) as client:
        head = f"POST {FILES} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: video/mp4\r\n"
        head += f"Content-Length: {len(VIDEO)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", client.port)) as line:
            line.sendall(head.encode() + VIDEO[:200_000])
            wait_for(lambda: stored(tmp_path))
        wait_for(lambda: not stored(tmp_path))
        with socket.create_connection(("127.0.0.1", client.port)) as line:
            line.sendall(head.encode() + VIDEO[:200_000])
            assert b" 408 " in line.makefile("rb").read()
        assert stored(tmp_path) == []


def test_it_stays_while_a_request_is_about_it(tmp_path: Path) -> None:
    """A request that waits in the queue opens its file late."""
    with taking(tmp_path, load_seconds=1.0) as client:
        url = send(client).json["url"]
        connection = client.begin("POST", "/v1/video/describe", {"video": url})
        wait_for(lambda: client.ask("GET", "/health").json["active"] == 1)
        (file,) = stored(tmp_path)
        time.sleep(0.2)
        assert file.exists()
        assert b"event: done" in connection.getresponse().read()
        connection.close()


def test_a_server_that_takes_none(tmp_path: Path) -> None:
    with serving(FakeBackend()) as client:
        assert send(client).status == 404
        assert FILES not in client.ask("GET", "/openapi.json").json["paths"]
        said = message(client.chat([video("upload:" + "0" * 32), text("What?")]))
        assert said == "no uploads are taken here; send the file itself"
    with taking(tmp_path) as client:
        assert client.ask("GET", "/openapi.json").json["paths"][FILES]["post"]["requestBody"]
        # No path out of the folder, nor to what lies in it beside the uploads.
        for name in ("lock", "../lock", "..", "", "/etc/passwd"):
            reply = client.chat([video("upload:" + name), text("What?")])
            assert reply.status == 400 and "is not here" in message(reply)
