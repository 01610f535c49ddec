"""Who may speak to the server, and how much it reads of what they say."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from click.testing import CliRunner
from served import JSON, Client, serving, wait_for

from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http import server as running
from mlx_onevision.plugins.hosts.http.app import create_app
from mlx_onevision.plugins.hosts.http.command import serve
from mlx_onevision.plugins.hosts.http.errors import redact_paths
from mlx_onevision.plugins.hosts.http.server import ServerSettings, is_loopback
from mlx_onevision.plugins.service.service import Limits

ROOT = Path(__file__).parents[3]
ROUTES = [
    *(("GET", path) for path in ("/health", "/metrics", "/v1/models", "/v1/models/fake")),
    *(("POST", f"/v1/{name}") for name in ("chat/completions", "embeddings", "video/describe")),
]
CHAT = "/v1/chat/completions"

GOOD_HOSTS = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:1", "[::1]", "[::1]:8000"]
BAD_HOSTS = [
    *("evil.example", "EVIL.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"),
    *("localhost.", "127.0.0.1.", "localhost@evil.example", "evil.example@localhost", "2130706433"),
    *("0x7f000001", "127.1", "0177.0.0.1", "127.0.0.2", "0.0.0.0", "192.168.1.5:8000", "", " "),
    *("localhost:", "localhost:x", "localhost:99999", "localhost:8000:8000", "localhost,evil"),
    *("localhost evil", "localhost/evil", "localhost#", "localhost?", "http://localhost", "[::1"),
    *("::1", "[::]", "[::ffff:127.0.0.1]", "[fe80::1%lo]", "localhost\\evil", "lоcalhost"),
    *("127.0.0.1\tevil", "*", "localhost:-1", "null"),
]
BAD_ORIGINS = [
    *("null", "", "http://evil.example", "https://evil.example:8000", "file://", "file:///a.html"),
    *("https://127.0.0.1:8000", "http://127.0.0.1:8001", "http://127.0.0.1:8000.evil.example"),
    *(
        "http://127.0.0.1:8000/",
        "http://user@127.0.0.1:8000",
        "chrome-extension://abc",
        "127.0.0.1",
    ),
]


async def call(
    app: Any, method: str, path: str, *headers: tuple[str, str]
) -> tuple[int, Any, bool]:
    """Status, headers, and whether the body was read, of a request made inside the process."""
    sent: list[Any] = []
    read = False

    async def receive() -> dict[str, Any]:
        nonlocal read
        read = True
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    await app(scope, receive, send)
    return sent[0]["status"], {name.decode() for name, _ in sent[0]["headers"]}, read


def test_every_host_with_every_origin_on_every_route() -> None:
    assert len(GOOD_HOSTS) + len(BAD_HOSTS) >= 40 and len(BAD_ORIGINS) >= 12
    wrong = []

    async def all_of_them() -> None:
        with FakeBackend() as backend:
            app = create_app(backend)
            for method, path in [("GET", "/"), *ROUTES]:
                for host in [*GOOD_HOSTS, *BAD_HOSTS]:
                    for origin in [None, *BAD_ORIGINS]:
                        said = [("host", host), ("content-type", "application/json")]
                        said += [] if origin is None else [("origin", origin)]
                        status, headers, read = await call(app, method, path, *said)
                        bad = 421 if host in BAD_HOSTS else 403 if origin is not None else None
                        good = status in (200, 400) if bad is None else status == bad and not read
                        if not good or any(name.startswith("access-control") for name in headers):
                            wrong.append((method, path, host, origin, status))

    asyncio.run(all_of_them())
    assert wrong == []


def test_hosts_and_origins_twice_or_not_at_all() -> None:
    async def all_of_them() -> None:
        with FakeBackend() as backend:
            app = create_app(backend)
            good = ("host", "localhost")
            assert (await call(app, "GET", "/health"))[0] == 421
            assert (await call(app, "GET", "/health", good, good))[0] == 421
            own, evil = ("origin", "http://localhost"), ("origin", "http://evil.example")
            assert (await call(app, "GET", "/health", good, own))[0] == 200
            assert (await call(app, "GET", "/health", good, own, evil))[0] == 403

    asyncio.run(all_of_them())


def test_the_page_behind_a_proxy_with_a_certificate() -> None:
    """Only by a name that was given for it."""

    async def status(host: str, origin: str) -> int:
        with FakeBackend() as backend:
            app = create_app(backend, ServerSettings(names=("pictures.example",)))
            return (await call(app, "GET", "/health", ("host", host), ("origin", origin)))[0]

    async def all_of_them() -> None:
        for host in ("pictures.example", "pictures.example:8443"):
            assert await status(host, f"https://{host}") == 200
            assert await status(host, f"http://{host}") == 200
            assert await status(host, "https://evil.example") == 403
        assert await status("localhost", "https://localhost") == 403
        assert await status("localhost", "https://pictures.example") == 403

    asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend()) as found:
        yield found


def raw(client: Client, data: bytes) -> bytes:
    """What comes back for bytes; the connection is closed from the other side."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil"])
def test_hosts_over_the_wire(client: Client, host: str) -> None:
    reply = client.ask("GET", "/health", headers={"Host": host})
    assert reply.status == 421 and reply.json["error"]["code"] == "misdirected"
    for data in (
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
    ):
        assert raw(client, data).split()[1] in (b"400", b"421")


def test_origins_over_the_wire_before_the_body_is_read(client: Client) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
    # The body never comes.
    answer = raw(
        client, f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 403") and b"access-control" not in answer.lower()
    preflight = client.ask("OPTIONS", CHAT, headers={"Origin": "http://evil.example"})
    assert preflight.status == 403
    wrong = client.ask("OPTIONS", CHAT)
    assert wrong.status == 405 and wrong.json["error"]["message"].endswith("; it takes POST")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_only_json_is_taken(client: Client, kind: str) -> None:
    reply = client.ask("POST", CHAT, b"{}", {"Content-Type": kind})
    assert reply.status == 415 and "application/json" in reply.json["error"]["message"]
    compressed = client.ask("POST", CHAT, b"{}", {"Content-Encoding": "gzip"})
    assert compressed.status == 415


def test_nothing_but_the_routes(client: Client) -> None:
    for method, path, status in (
        *(("GET", "/page/", 404), ("GET", "/v1/models/", 404), ("GET", "/../etc/passwd", 404)),
        *(("GET", CHAT, 405), ("DELETE", "/v1/models/fake", 405), ("GET", "/v1/models/a/b", 404)),
        *(("GET", "/docs", 404), ("POST", "/openapi.json", 405), ("GET", "//evil.example/", 404)),
    ):
        reply = client.ask(method, path)
        assert (reply.status, set(reply.json)) == (status, {"error"}), (method, path)
        assert "location" not in reply.headers
    for path in ("/unload", "/v1/unload", "/v1/settings"):
        assert client.ask("POST", path, b"{}").status == 404


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "object"),
        (b"5", "object"),
        (b'{"messages":NaN}', "JSON"),
        (b'{"temperature":1e999,"messages":[{"role":"user","content":"x"}]}', "number"),
        (b'{"seed":' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "deep"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
        (b'{"a":[' + b"{}," * 600_000 + b"{}]}", "values"),
    ],
)
def test_json_that_is_none(client: Client, body: bytes, named: str) -> None:
    reply = client.ask("POST", CHAT, body, JSON)
    assert reply.status == 400 and named in reply.json["error"]["message"], reply.body
    assert reply.seconds < 2


def test_a_body_is_bounded_as_it_is_read() -> None:
    with serving(
        FakeBackend(), ServerSettings(max_body_bytes=100_000, header_timeout=0.3)
    ) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        told = raw(client, f"{head}Content-Length: 100001\r\n\r\n".encode())
        assert told.startswith(b"HTTP/1.1 413") and b"too_large" in told
        huge = raw(client, f"{head}Content-Length: {'9' * 400}\r\n\r\n".encode())
        assert huge.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))
        # Endless chunks: it stops reading soon after the limit.
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(11):
                connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            assert connection.recv(12) == b"HTTP/1.1 413"
        began = time.monotonic()
        slow = raw(client, f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert slow.startswith(b"HTTP/1.1 408") and time.monotonic() - began < 2
        assert client.chat().status == 200


def test_a_token() -> None:
    with serving(FakeBackend(), ServerSettings(token="right")) as client:
        for method, path in ROUTES:
            for given in (None, "Bearer wrong", "Bearer", "right", "Basic right", "Bearer right x"):
                headers = {} if given is None else {"Authorization": given}
                reply = client.ask(method, path, b"{}" if method == "POST" else None, headers)
                assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
        for good in ("Bearer right", "bearer right"):
            assert client.ask("GET", "/health", headers={"Authorization": good}).status == 200


def test_when_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[str | None] = []

    def seen(*, token: str | None, **_: object) -> None:
        needed.append(token)
        raise PluginError("internal", "seen")

    monkeypatch.setattr(running, "ServerSettings", seen)
    for arguments in (
        *([], ["--require-token"], ["--host", "0.0.0.0"]),
        ["--require-token", "--api-key", "mine"],
    ):
        CliRunner().invoke(serve, ["--port", "0", *arguments])
    none, required, reachable, own = needed
    assert none is None and required and reachable and required != reachable and own == "mine"


def test_no_answer_is_taken_for_something_else(client: Client) -> None:
    for method, path, body in (
        *(("GET", "/health", None), ("GET", "/", None), ("GET", "/nothing", None)),
        *(("POST", CHAT, b"{"), ("POST", CHAT, b'{"messages":[{"role":"user","content":"x"}]}')),
    ):
        reply = client.ask(method, path, body)
        assert reply.headers["x-content-type-options"] == "nosniff", path
    assert b"nosniff" in raw(client, b"junk\r\n\r\n")


def test_names_of_an_open_server() -> None:
    async def status(settings: ServerSettings, host: str) -> int:
        with FakeBackend() as backend:
            return (await call(create_app(backend, settings), "GET", "/health", ("host", host)))[0]

    everywhere = ServerSettings(host="0.0.0.0", names=("mac.local",))
    one = ServerSettings(host="192.168.1.5")
    for settings, host, expected in (
        *((everywhere, "192.168.1.9:8000", 200), (everywhere, "Mac.local", 200)),
        *((everywhere, "evil.example", 421), (everywhere, "2130706433", 421)),
        *((one, "192.168.1.5", 200), (one, "192.168.1.6", 421), (one, "localhost", 200)),
    ):
        assert asyncio.run(status(settings, host)) == expected, host


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.5.5.5", "::1", "LOCALHOST"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.5", "mac.local", ""))


def test_what_errors_leave_out() -> None:
    for text in ("'/a/b c.png' is bad", "at https://a.example/b?c", "in /etc/passwd: no"):
        left = redact_paths(text)
        assert "/" not in left and "…" in left
    assert redact_paths("3 tokens and/or 5") == "3 tokens and/or 5"
    assert len(redact_paths("x" * 5000)) <= 300
    assert redact_paths("'data:a,b' is not 'c'") == "… is not 'c'"
    for path in ("/a\"b'c", "/it's", 'http://a"b', "/a\\'", "data:'"):
        assert redact_paths(f"the video's path {path!r} is bad") == "the video's path … is bad"


def test_the_token_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "token"
    for token in ("first", "second"):
        running.keep_token(token, file)
        assert file.read_text() == f"{token}\n"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [f.name for f in file.parent.iterdir()] == ["token"]
    assert len({running.new_token() for _ in range(10)}) == 10


def test_a_port_that_is_taken() -> None:
    with running.listening(ServerSettings(), 0) as taken:
        with pytest.raises(PluginError, match="--port"):
            running.listening(ServerSettings(), taken.getsockname()[1])
    with pytest.raises(PluginError):
        running.listening(ServerSettings(host="no.such.host.invalid"), 0)


def command(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_onevision", "serve", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


def port_of(server: "subprocess.Popen[str]") -> int:
    assert server.stderr is not None
    for line in server.stderr:
        if line.startswith("Serving at http://"):
            return int(line.split("/v1")[0].rpartition(":")[2])
    raise AssertionError("it did not begin to serve")


def test_the_command_s_default_is_an_answer_of_1024_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Limits] = []

    def seen(*_: object, limits: Limits, **__: object) -> None:
        opened.append(limits)
        raise PluginError("internal", "seen")

    monkeypatch.setattr("mlx_onevision.plugins.adapters.engine.open_engine", seen)
    for most in ("4096", "500"):
        CliRunner().invoke(serve, ["--port", "0", "--max-tokens", most])
    usual, small = opened
    assert (usual.default_for(None), usual.default_for(5), small.default_for(None)) == (
        1024,
        5,
        500,
    )
    folder = write(tmp_path, tied=False)
    config = folder / "generation_config.json"
    values = json.loads(config.read_text()) if config.exists() else {}
    for own, expected in ({}, 6), ({"max_new_tokens": 4}, 4), ({"max_new_tokens": 9}, 8):
        config.write_text(json.dumps({**values, **own}))
        limits = Limits(default_max_tokens=6, max_tokens=8)
        with open_engine(folder, limits=limits) as backend, serving(backend) as client:
            assert client.chat("hello").json["usage"]["completion_tokens"] == expected
            assert client.chat("hello", max_tokens=3).json["usage"]["completion_tokens"] == 3


def test_the_command_and_its_end_while_it_answers(tmp_path: Path) -> None:
    server = command("--port", "0", "--host", "0.0.0.0", XDG_STATE_HOME=str(tmp_path))
    try:
        client = Client(port_of(server))
        (file,) = tmp_path.rglob("token")
        token = {"Authorization": f"Bearer {file.read_text().strip()}"}
        assert client.ask("GET", "/health").status == 401
        assert client.ask("GET", "/v1/models", headers=token).json["data"][0]["id"] == "demo"
        body = {"messages": [{"role": "user", "content": "count"}], "stream": True}
        connection = client.begin("POST", CHAT, {**body, "max_tokens": 2000}, token)
        wait_for(lambda: client.ask("GET", "/health", headers=token).json["loaded"], 30)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        assert time.monotonic() - began < 5
        connection.close()
        assert server.stdout is not None and server.stdout.read() == ""
        assert server.stderr is not None and "Traceback" not in server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def test_the_command_says_what_is_wrong() -> None:
    with running.listening(ServerSettings(), 0) as taken:
        port = taken.getsockname()[1]
        server = command("--port", str(port))
        said = server.communicate(timeout=60)[1].splitlines()[-1]
    assert server.returncode == 1 and said == (
        f"error: another program, maybe another serve, listens on port {port} already; "
        f"end it, or choose another port: --port {port + 1}"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_this_machines(host: str) -> None:
    with pytest.raises(PluginError, match=f"{host} is no address of this machine; leave --host"):
        running.listening(ServerSettings(host=host), 0)


def test_nothing_of_the_server_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys, mlx_onevision.__main__\n"
        "bad = {'starlette', 'uvicorn', 'pydantic', 'mlx', 'mlx_lm', 'av', 'numpy'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
