"""The page in Chromium, looked at by axe: every state, at both widths, light and dark."""

from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, expect
from served import EXAMPLES, PICTURE

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings

SHAPES, CIRCLE = EXAMPLES / "shapes.png", EXAMPLES / "circle.mp4"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
WRITTEN = [
    "# Shapes\n\n- **one**\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    f"```\n{'a line of code that is wider than its column, ' * 2}\n```\n",
]


@pytest.fixture(params=[390, 1280])
def wide(request: pytest.FixtureRequest) -> int:
    return request.param


def looked_at(tab: Tab, state: str) -> None:
    for scheme in SCHEMES:
        tab.page.emulate_media(color_scheme=scheme)
        found = Axe().run(tab.page).response["violations"]
        told = [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]
        assert told == [], (state, scheme)


def test_before_and_while_something_is_asked(browser: Browser, wide: int) -> None:
    size = {"width": wide, "height": 844}
    backend = open_backend("engine", model="demo")
    with backend, opened(browser, backend, viewport=size) as tab:
        expect(tab.button("An image")).to_be_visible()
        looked_at(tab, "empty")
        tab.drop(("notes.txt", "text/plain", b"words"))
        looked_at(tab, "a refused file")
    backend = FakeBackend(load_seconds=60)
    with opened(browser, backend, viewport=size) as tab:
        tab.choose(SHAPES)
        tab.button("Settings").click()
        looked_at(tab, "settings")
        tab.ask("Slowly?")
        expect(tab.turns.get_by_role("progressbar")).to_be_visible()
        looked_at(tab, "loading")
    settings = ServerSettings(token="a")
    with opened(browser, FakeBackend(), settings, allowed=("401",), viewport=size) as tab:
        expect(tab.page.locator("#token-field")).to_be_focused()
        looked_at(tab, "a token")


def test_after_it_was_asked(browser: Browser, wide: int) -> None:
    size = {"width": wide, "height": 844}
    with opened(browser, FakeBackend(pieces=WRITTEN), viewport=size, allowed=("FAILED",)) as tab:
        tab.choose(SHAPES)
        tab.ask("What?")
        expect(tab.turns.locator(".figures")).to_be_visible()
        looked_at(tab, "an answer")
        tab.button("Edit").click()
        looked_at(tab, "a question edited")
        tab.button("Cancel").click()
        tab.choose(CIRCLE)
        tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
        tab.button("Describe the video").click()
        expect(tab.turns.get_by_role("button", name="Save VTT")).to_be_visible()
        looked_at(tab, "a described video")
        tab.page.route("**/v1/chat/completions", lambda route: route.abort())
        tab.ask("And one that fails?")
        expect(tab.turns.get_by_role("alert")).to_be_visible()
        looked_at(tab, "a failure")
        tab.page.route("**/v1/models", lambda route: route.abort())
        tab.page.reload()
        expect(tab.page.locator("#server-fault")).to_be_visible()
        expect(tab.turns).to_have_count(2)
        looked_at(tab, "no server")


def test_axe_finds_what_is_wrong(browser: Browser) -> None:
    """The check that the others rely on."""
    with opened(browser, FakeBackend()) as tab:
        tab.page.evaluate(
            "src => document.querySelector('main').append("
            "Object.assign(document.createElement('img'), { src }))",
            PICTURE,
        )
        with pytest.raises(AssertionError, match="image-alt"):
            looked_at(tab, "an image without a name")
