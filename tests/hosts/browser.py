"""Chromium for tests: the system's, headless, and watched for all that a page must never do."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    expect,
    sync_playwright,
)
from served import Client, serving

from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend

expect.set_options(timeout=20_000)  # milliseconds, on a machine that does much else

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def chromium() -> str:
    """Where it is; without it the tests of the page fail, because nothing else can stand for it."""
    named = os.environ.get("CHROMIUM")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.fail(
            f"the page is tested in Chromium, and there is no {named or NAMES[0]}; install it "
            "(apt-get install chromium) or name one in the environment as CHROMIUM"
        )
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page of the server's, and what was wrong with it.

    allowed : parts of messages on the console that the test provokes, such as a status.
    """

    def __init__(self, page: Page, origin: str) -> None:
        self.page, self.origin = page, origin
        self.allowed: list[str] = []
        self.faults: list[str] = []
        self.sent: list[Request] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", self._request)
        page.on("popup", lambda _: self.faults.append("a window was opened"))

    def _console(self, message: ConsoleMessage) -> None:
        said = f"{message.text} {message.location.get('url', '')}"
        if message.type in ("error", "warning", "assert"):
            if not any(part in said for part in self.allowed):
                self.faults.append(f"console: {said}")

    def _dialog(self, dialog: Any) -> None:
        self.faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Request) -> None:
        self.sent.append(request)
        if not request.url.startswith((f"{self.origin}/", f"blob:{self.origin}/")):
            self.faults.append(f"request to {request.url}")

    def bodies(self, path: str) -> list[Any]:
        """What was sent to a route, each time."""
        return [one.post_data_json for one in self.sent if one.url == self.origin + path]

    # What a person does

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def choose(self, *files: Path | dict[str, Any], by: str = "Add files") -> None:
        """Through the system's dialog. "Choose files" is there as long as nothing is shown, and
        a file that was chosen is shown a little later."""
        with self.page.expect_file_chooser() as chooser:
            self.button(by).click()
        given: list[Any] = list(files)  # the one or the other
        chooser.value.set_files(given)

    def drop(self, *files: tuple[str, str, bytes]) -> None:
        """Name, type and bytes of each, as a file manager drags them in."""
        parts = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
        carried = self.page.evaluate_handle(
            """parts => {
              const carried = new DataTransfer();
              for (const [name, type, data] of parts) {
                const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
                carried.items.add(new File([bytes], name, { type }));
              }
              return carried;
            }""",
            parts,
        )
        for event in ("dragenter", "dragover", "drop"):
            self.page.dispatch_event("main", event, {"dataTransfer": carried})

    def ask(self, question: str) -> None:
        self.page.get_by_label("Your question").fill(question)
        self.button("Ask").click()

    @property
    def turns(self) -> Locator:
        return self.page.locator("#talk article")

    @property
    def words(self) -> Locator:
        return self.turns.locator(".answer > .words")


@contextmanager
def opened(
    browser: Browser,
    backend: Backend | None,
    settings: ServerSettings | None = None,
    *,
    client: Client | None = None,
    allowed: tuple[str, ...] = (),
    path: str = "/",
    **context: Any,
) -> Iterator[Tab]:
    """The page of a server of its own, or of one that runs already; looked at again at the end."""
    if client is None:
        assert backend is not None
        with serving(backend, settings) as started:
            with opened(
                browser, None, client=started, allowed=allowed, path=path, **context
            ) as tab:
                yield tab
        return
    origin = f"http://127.0.0.1:{client.port}"
    around = browser.new_context(**context)
    try:
        around.grant_permissions(["clipboard-read", "clipboard-write"], origin=origin)
        tab = Tab(around.new_page(), origin)
        tab.allowed += allowed
        tab.page.goto(origin + path)
        yield tab
        assert not tab.faults, "\n".join(tab.faults)
    finally:
        around.close()
