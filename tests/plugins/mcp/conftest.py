"""What tests of tools share."""

import os
import shutil
from pathlib import Path

import pytest

from mlx_onevision.plugins.conformance.subject import png

VIDEO = Path(__file__).parents[3] / "examples/circle.mp4"


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Images and a video that may be read, beside one that may not."""
    album = tmp_path / "album"
    (album / "inner").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "inner/c.png", ".hidden.png")):
        (album / name).write_bytes(png(8, 8, (number, 2, 3)))
    shutil.copy(album / "a.png", album / "twin.png")
    shutil.copy(VIDEO, album / "film.mp4")
    (album / "words.txt").write_text("no picture")
    (tmp_path / "secret.png").write_bytes(png(8, 8, (9, 9, 9)))
    (album / "link.png").symlink_to(tmp_path / "secret.png")
    (album / "away").symlink_to(tmp_path)
    os.mkfifo(album / "pipe.png")
    return album
