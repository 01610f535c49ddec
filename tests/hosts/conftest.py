"""What tests of the page share. A file that needs another server has a ``client`` of its own."""

from collections.abc import Iterator

import pytest
from hosts.browser import Tab, launched, opened
from playwright.sync_api import Browser
from served import Client, serving

from mlx_onevision.plugins import open_backend


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(open_backend("engine", model="demo")) as found:
        yield found


@pytest.fixture
def tab(browser: Browser, client: Client) -> Iterator[Tab]:
    with opened(browser, None, client=client) as found:
        yield found
