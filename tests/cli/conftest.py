"""What tests of the conversation share."""

from pathlib import Path

import pytest
from images import picture_file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of the same size."""
    folder = tmp_path_factory.mktemp("pictures")
    return picture_file(folder / "one.png", 1), picture_file(folder / "the other's.png", 2)
