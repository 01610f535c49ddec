"""The page's files over HTTP: who gets them, with which headers, and what they are made of."""

import hashlib
import re
from collections.abc import Iterator

import pytest
from served import Client, serving

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http import app as page
from mlx_onevision.plugins.hosts.http.server import ServerSettings

POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "media-src blob:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
}
KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "mp4": "video/mp4",
}
# A library, whole and unchanged, and its licence, which is not served.
VENDORED, LICENCE = "marked.js", "marked.LICENSE.txt"
SERVED = [file for file in page.STATIC_FOLDER.iterdir() if file.name != LICENCE]
TEXTS = {file.name: file.read_text(encoding="utf-8") for file in SERVED if file.suffix != ".mp4"}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    settings = ServerSettings(token="secret", max_body_bytes=123_456)
    with serving(FakeBackend(), settings) as found:
        yield found


def test_every_file_with_its_headers(client: Client) -> None:
    paths = page.read_page(ServerSettings(), 0)
    assert len(paths) == len(SERVED) > 20 and "/" in paths
    for path in paths:
        reply = client.ask("GET", path)
        assert reply.status == 200, path
        assert (
            reply.headers["content-type"]
            == KINDS[path.rpartition(".")[2] if "." in path else "html"]
        )
        assert set(reply.headers["content-security-policy"].split("; ")) == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cache-control"] == "no-cache"
        assert not any(name.startswith("access-control") for name in reply.headers)
        head = client.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"")
        assert head.headers["content-length"] == str(len(reply.body))
        if path != "/":
            assert reply.body == page.STATIC_FOLDER.joinpath(path.rpartition("/")[2]).read_bytes()


def test_a_file_that_has_not_changed_is_not_sent_again(client: Client) -> None:
    tag = client.ask("GET", "/page/app.js").headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        reply = client.ask("GET", "/page/app.js", headers={"If-None-Match": known})
        assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", tag)
    for other in ('"other"', "", tag.strip('"')):
        reply = client.ask("GET", "/page/app.js", headers={"If-None-Match": other})
        assert reply.status == 200


def test_the_page_knows_what_the_server_takes(client: Client) -> None:
    assert b'<meta name="body-limit" content="123456">' in client.ask("GET", "/").body
    with serving(FakeBackend()) as other:
        assert b'content="33554432"' in other.ask("GET", "/").body


def test_nothing_else_is_read_without_a_token(client: Client) -> None:
    for method, path in (
        *(("POST", "/"), ("PUT", "/"), ("DELETE", "/page/app.js"), ("OPTIONS", "/")),
        *(("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/page")),
        *(("GET", "/page/"), ("GET", "/page/index.html"), ("GET", "/page/page.py"), ("GET", "//")),
        *(("GET", "/page/../page.py"), ("GET", "/page/%2e%2e/page.py"), ("GET", "/page/app.js/")),
        *(("GET", "/page/app.js%00"), ("GET", "/static/app.js"), ("GET", "/PAGE/app.js")),
    ):
        assert client.ask(method, path).status == 401, (method, path)
    token = {"Authorization": "Bearer secret"}
    assert client.ask("GET", "/page/index.html", headers=token).status == 404
    assert client.ask("DELETE", "/", headers=token).status == 405


def test_names_and_origins_are_looked_at_all_the_same(client: Client) -> None:
    for path in ("/", "/page/app.js"):
        assert client.ask("GET", path, headers={"Host": "evil.example"}).status == 421
        assert client.ask("GET", path, headers={"Origin": "http://evil.example"}).status == 403


def test_the_files_need_one_another_and_nothing_else() -> None:
    """What they name exists, all of it is used, and nothing is on another machine."""
    found = {"index.html", "shapes.mp4"}
    for name, text in TEXTS.items():
        found |= set(re.findall(r'(?:href|src)="page/([^"]+)"', text))
        found |= set(re.findall(r'from "\./([^"]+)"', text))
        addresses = set(re.findall(r"\w+://[^\s\"'`)]+", text))
        if name != VENDORED:  # it names its own home
            assert addresses <= {"http://www.w3.org/2000/svg"}, addresses
    assert found == {file.name for file in SERVED}
    assert '"page/shapes.mp4"' in TEXTS["demo.js"]


def test_no_text_ever_becomes_markup_or_code() -> None:
    for name, text in TEXTS.items():
        for word in (
            *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser"),
            *("createContextualFragment", "setHTML", "eval(", "Function(", "srcdoc", "javascript:"),
        ):
            assert word not in text, (name, word)
        assert not re.search(r"<\w[^>]*\s(on\w+|style)=", text), name


def test_files_stay_small() -> None:
    for name, text in TEXTS.items():
        assert text.count("\n") <= 250, name
    assert sum(file.stat().st_size for file in SERVED if file.name != VENDORED) < 200_000
    assert (page.STATIC_FOLDER / VENDORED).stat().st_size < 60_000


def test_the_library_is_whole_and_has_its_licence() -> None:
    assert "marked v18.2.1 - a markdown parser" in TEXTS[VENDORED][:100]
    assert hashlib.sha256((page.STATIC_FOLDER / VENDORED).read_bytes()).hexdigest() == (
        "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de"
    )
    licence = (page.STATIC_FOLDER / LICENCE).read_text(encoding="utf-8")
    assert "Permission is hereby granted" in licence and "MarkedJS" in licence
