"""Other pages that may speak to the server, and addresses that are nearly right."""

from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from served import Client, serving

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.command import serve
from mlx_onevision.plugins.hosts.http.server import ServerSettings

CHAT = "/v1/chat/completions"
ORIGINS = (
    "app://obsidian.md",
    "tauri://localhost",
    "vscode-webview:",
    "https://notes.example:8443",
)
ALLOWED = [
    *(o for o in ORIGINS if not o.endswith(":")),
    "vscode-webview://1a2b",
    "APP://obsidian.md",
]
OTHERS = [
    *("app://evil.md", "https://notes.example", "http://notes.example:8443", "null", ""),
    *("app://obsidian.md.evil", "vscode-webview", "vscode-webview:evil", "tauri://localhost:80"),
]
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    "Access-Control-Request-Private-Network": "true",
}


def readable(headers: dict[str, str]) -> str | None:
    return headers.get("access-control-allow-origin")


def test_a_page_that_was_allowed_may_ask_and_read() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    with serving(FakeBackend(), ServerSettings(origins=ORIGINS, token="t")) as client:
        for origin in ALLOWED:
            own = {"Origin": origin, "Authorization": "Bearer t"}
            for stream in (False, True):
                reply = client.ask("POST", CHAT, {**body, "stream": stream}, own)
                assert (reply.status, readable(reply.headers)) == (200, origin)
                assert reply.headers["vary"] == "Origin"
            refused = client.ask("POST", CHAT, body, {"Origin": origin})
            assert (refused.status, readable(refused.headers)) == (401, origin)
            asked = client.ask("OPTIONS", CHAT, headers={"Origin": origin, **PREFLIGHT})
            assert (asked.status, readable(asked.headers), asked.body) == (204, origin, b"")
            assert asked.headers["access-control-allow-headers"].split(",")[-1] == "x-stainless-os"
            assert "POST" in asked.headers["access-control-allow-methods"]
            assert asked.headers["access-control-allow-private-network"] == "true"


def test_all_others_are_refused_as_before() -> None:
    with serving(FakeBackend(), ServerSettings(origins=ORIGINS)) as client:
        for origin in OTHERS:
            for method, headers in (("POST", {}), ("OPTIONS", PREFLIGHT)):
                reply = client.ask(method, CHAT, {}, {"Origin": origin, **headers})
                assert (reply.status, readable(reply.headers)) == (403, None), origin
        for host in ("evil.example", "obsidian.md"):  # the name of the server counts as ever
            both = {"Origin": ORIGINS[0], "Host": host}
            reply = client.ask("GET", "/health", headers=both)
            assert (reply.status, readable(reply.headers)) == (421, None)
        assert readable(client.ask("GET", "/health").headers) is None


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "https:", "http:", "file:", "https://*.example", "app://a/b", "obsidian.md", ""],
)
def test_what_is_no_origin_or_everybodys(origin: str) -> None:
    with pytest.raises(PluginError, match="no origin that can be allowed; name one, such as"):
        ServerSettings(origins=(origin,))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend()) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "the address lacks /v1; the base URL is http://127.0.0.1:"),
        ("/models", "lacks /v1"),
        ("/v1/v1/chat/completions", "ends with /v1 already"),
        ("/v1/completions", "ask /v1/chat/completions"),
        ("/v1/audio/speech", "see /openapi.json"),
        ("/api/chat", "start serve with --ollama"),
        ("/else", ""),
    ],
)
def test_an_address_that_is_nearly_right(client: Client, path: str, hint: str) -> None:
    reply = client.ask("POST", path, {})
    message = reply.json["error"]["message"]
    assert reply.status == 404 and message.startswith("there is nothing at this address")
    assert hint in message and ("; " in message) == bool(hint)


@pytest.mark.parametrize("options", [(), ("--allow-media-host", "*")])
def test_ones_own_network_is_allowed_by_name_alone(options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(serve, [*options, "--allow-private"])
    assert result.exit_code == 2
    assert "--allow-private needs hosts by name: --allow-media-host NAME" in result.output
