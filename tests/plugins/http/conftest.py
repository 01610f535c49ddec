"""A server that the tests of a file share."""

from collections.abc import Iterator

import pytest
from served import (
    Client,
    serving,
)

from mlx_onevision.plugins.adapters.fake import FakeBackend


@pytest.fixture(scope="module")
def fake() -> Iterator[Client]:
    with serving(FakeBackend()) as client:
        yield client
