"""``mlx-onevision train``: the command around a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mlx_onevision.cli.main import cli
from mlx_onevision.errors import RequestError

TURNS = [
    {"role": "user", "content": "What is in the image?"},
    {"role": "assistant", "content": "A red heart."},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "a.png")
    row = json.dumps({"messages": TURNS, "images": ["a.png"]})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row}\n")
    return tmp_path / "rows.jsonl"


def run(data: Path, *options: str) -> Result:
    fixed = ["--data", str(data), "--adapter", str(data.parent / "out")]
    cache = ["--cache", str(data.parent / "cache")]
    return CliRunner().invoke(cli, ["train", "--model", "demo", *fixed, *cache, *options])


def test_trains_reports_and_draws(data: Path) -> None:
    curve = data.parent / "loss.png"
    result = run(data, "--steps", "2", "--rank", "2", "--report", str(curve))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "2 rows; a step takes about 0." in result.stderr
    assert re.search(r"step 2/2  loss .* tok/s  \d+\.\d\d GB", result.stderr)
    assert {path.name for path in (data.parent / "out").iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
        "log.jsonl",
    }
    with Image.open(curve) as image:
        assert image.width > 1000
    about: dict[str, Any] = json.loads((data.parent / "out/adapter_config.json").read_text())
    assert (about["fine_tune_type"], about["model"], about["rows"]) == ("lora", "demo", 2)


def test_a_dry_run_shows_the_rows_and_writes_nothing(data: Path) -> None:
    result = run(data, "--dry-run")
    assert "⟦A red heart.<|im_end|>⟧" in result.stdout
    assert result.stdout.count("rows.jsonl:") == 2
    assert not (data.parent / "out").exists()


def test_bad_rows_end_it_before_the_first_step(data: Path) -> None:
    (data.parent / "a.png").unlink()
    result = run(data)
    assert result.exit_code == 1
    assert "rows.jsonl:2: there is no file" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: 2 rows of ")


def test_where_the_adapter_is_stands_before_a_curve_that_cannot_be_drawn(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RequestError("loss.png cannot be written: No space left on device")

    monkeypatch.setattr("mlx_onevision.train.report.draw_curve", fails)
    result = run(data, "--steps", "1", "--rank", "2", "--report", str(data.parent / "loss.png"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == [
        f"The adapter is in {data.parent / 'out'}",
        "error: loss.png cannot be written: No space left on device",
    ]
