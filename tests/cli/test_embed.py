"""``mlx-onevision embed``: vectors of images, videos and texts, as a file or as lines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import arrays, write
from click.testing import CliRunner
from images import picture
from PIL import Image
from videos import counting, written

from mlx_onevision.api import Model, load
from mlx_onevision.cli.main import cli
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.errors import OneVisionError


def embed(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli, ["embed", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        Image.fromarray(picture(number)).save(path)
    return paths


def test_the_command_writes_npz(
    model: Model, folder: Path, files: list[Path], tmp_path: Path
) -> None:
    done = embed(*files, "--model", folder, "--output", tmp_path / "out.npz")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    loaded = Embeddings.load(tmp_path / "out.npz")
    expected = model.embed(files)
    np.testing.assert_array_equal(loaded.vectors, expected.vectors)
    assert loaded.names == tuple(map(str, files)) and loaded.provenance == expected.provenance


def test_the_command_prints_lines(model: Model, folder: Path, files: list[Path]) -> None:
    options = ("--space", "joint", "--tiling", "never", "--no-normalize")
    done = embed(files[0], "--model", folder, "--text", "a star", "--jsonl", *options)
    assert (done.exit_code, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = model.embed(
        [files[0], {"type": "text", "text": "a star"}], "joint", tiling="never", normalize=False
    )
    assert [row["name"] for row in rows] == [str(files[0]), "a star"]
    for row, vector in zip(rows, expected.vectors, strict=True):
        np.testing.assert_allclose(row.pop("vector"), vector, atol=1e-5)
        assert {**row, "name": None} == {"name": None, **expected.provenance}


def test_the_command_takes_videos(
    model: Model, folder: Path, files: list[Path], tmp_path: Path
) -> None:
    clip = written(tmp_path / "video", counting(40))
    bad = tmp_path / "bad.mp4"
    bad.write_text("not a video")
    options = ("--frames", "4", "--start", "0.4", "--jsonl", "--model", folder)
    done = embed(clip, files[0], bad, *options)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "1 of 3 could not be embedded."
    assert f"error: cannot read '{bad}'" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    expected = model.embed([clip, files[0]], num_frames=4, start=0.4)
    assert [row["name"] for row in rows] == [str(clip), str(files[0])]
    for row, vector in zip(rows, expected.vectors, strict=True):
        np.testing.assert_allclose(row["vector"], vector, atol=1e-6)
        assert row["method"].endswith("4 frames a video")


def test_the_command_skips_what_is_broken(folder: Path, files: list[Path], tmp_path: Path) -> None:
    files[1].write_bytes(b"")
    done = embed(*files, "--model", folder, "--output", tmp_path / "out.npz")
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"error: '{files[1]}' is empty (0 bytes)",
        "1 of 3 could not be embedded.",
    ]
    assert Embeddings.load(tmp_path / "out.npz").names == (str(files[0]), str(files[2]))
    done = embed(files[1], "--model", folder, "--output", tmp_path / "none.npz")
    assert done.exit_code == 1 and not (tmp_path / "none.npz").exists()


def test_the_command_names_a_text_that_is_too_long(folder: Path, files: list[Path]) -> None:
    words = "a b " * 40_000
    options = ("--model", folder, "--space", "joint", "--tiling", "never", "--jsonl")
    done = embed(files[0], "--text", words, *options)
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 1
    assert done.stderr.startswith(f"error: {words[:40]!r}: it takes ")


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    weights = arrays()
    weights["vision_tower.encoder.layers.1.mlp.fc2.bias"][3] = np.inf
    broken = load(write(tmp_path / "broken", weights=weights))
    with pytest.raises(OneVisionError, match=r"item 1: .*not finite"):
        broken.embed([picture(0)])
    failed = []
    assert len(broken.embed([picture(0)], on_error=lambda *error: failed.append(error))) == 0
    assert len(failed) == 1
    broken.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("a.png",),
        ("a.png", "--jsonl", "--output", "x.npz"),
        ("--jsonl",),
        ("--jsonl", "--text", "a star"),
        ("a.png", "--jsonl", "--space", "words"),
        ("a.png", "--output", "no/such/folder/x.npz"),
    ],
)
def test_the_commands_usage(arguments: tuple[str, ...]) -> None:
    done = embed(*arguments)
    assert done.exit_code == 2 and done.stdout == "" and "Usage: " in done.stderr
