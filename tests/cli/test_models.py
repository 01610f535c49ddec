"""``models``: what is in the Hub's cache, through the real client and a hub on loopback."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from checkpoints import Sizes, write
from click.testing import CliRunner, Result
from fakehub import FakeHub
from huggingface_hub import constants, snapshot_download

from mlx_onevision.checkpoint import hub as models_hub
from mlx_onevision.checkpoint.hub import resolve
from mlx_onevision.checkpoint.load import open_checkpoint
from mlx_onevision.checkpoint.recipes import uniform
from mlx_onevision.cli.main import cli
from mlx_onevision.convert.conversion import convert
from mlx_onevision.network.footprint import footprint, longest_context


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", *arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """With a model of each layout, one of another family, and an empty cache."""
    plain = write(tmp_path / "plain")
    with FakeHub() as fake:
        fake.add("org/plain", files(plain))
        fake.add("org/original", files(write(tmp_path / "original", layout="lmms-lab")))
        fake.add("org/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("time.sleep", lambda _: None)  # before a download is tried again
        monkeypatch.setattr(models_hub, "resolve", partial(resolve, endpoint=fake.url))
        yield fake


def test_what_is_in_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    empty = run()
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert empty.stderr == "No model is in the cache; type: mlx-onevision models pull 0.5b\n"
    small = tmp_path / "4-bit"
    convert(tmp_path / "plain", small, recipe=uniform(4))
    hub.add("org/small", files(small))
    for name in ("plain", "original", "small"):
        pulled = run("pull", f"org/{name}")
        assert pulled.exit_code == 0, pulled.output
        assert (Path(pulled.stdout.strip()) / "config.json").exists()
    listed = run("--memory", "8")
    assert listed.stderr == ""
    rows = [re.split(r" {2,}", line) for line in listed.stdout.splitlines()]
    assert [[row[0], row[1], row[3]] for row in rows] == [
        ["org/original", "main", "float32, original layout; fits, with 32,768 tokens"],
        ["org/plain", "main", "float32, hub layout; fits, with 32,768 tokens"],
        ["org/small", "main", "4-bit, mlx layout; fits, with 32,768 tokens"],
    ]
    described = {model["repository"]: model for model in json.loads(run("--json").stdout)}
    for name, model in described.items():
        there = sum(len(content) for content in hub.repositories[name].files.values())
        assert model["disk_bytes"] == there and model["problem"] is None
        assert model["revision"] == hub.repositories[name].commit
    snapshot_download("org/bert", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert run().stderr == "1 more in the cache are no LLaVA-OneVision models.\n"


def test_what_is_not_whole_is_called_that_and_can_be_pulled_again(hub: FakeHub) -> None:
    weights = len(hub.repositories["org/plain"].files["model.safetensors"])
    hub.cuts["model.safetensors"] = [weights // 2] * 50
    assert run("pull", "org/plain").exit_code == 1
    [line] = run().stdout.splitlines()
    assert line.endswith(
        "not usable: its download is incomplete; type: mlx-onevision models pull org/plain"
    )
    hub.cuts.clear()
    folder = Path(run("pull", "org/plain").stdout.strip())
    assert "fits" in run().stdout
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "llava_onevision", "text_config": 3}')
    assert "not usable: config.json: text_config is not an object" in run().stdout
    (folder / "tokenizer.json").unlink()
    assert "its download is incomplete" in run().stdout


def test_another_family_and_a_folder_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    other = run("pull", "org/bert")
    assert other.exit_code == 1 and "model_type 'bert'" in other.stderr
    for command in ("pull", "rm"):
        refused = run(command, str(tmp_path))
        assert refused.exit_code == 1
        assert "is no model of the Hub; name a Hugging Face id" in refused.stderr


def test_removed_with_all_its_files(hub: FakeHub, tmp_path: Path) -> None:
    run("pull", "org/plain")
    run("pull", "org/original")
    unsure = run("rm", "org/plain")
    assert unsure.exit_code == 2 and "add --yes" in unsure.stderr
    (commit,) = (tmp_path / "cache" / "models--org--plain" / "snapshots").iterdir()
    part = run("rm", "org/plain", "--revision", commit.name).stderr
    assert f"This would remove revision {commit.name} of org/plain (" in part
    short = run("rm", "org/plain", "--revision", commit.name[:8]).stderr
    assert f"This would remove revision {commit.name[:8]} of org/plain (" in short
    wrong = run("rm", "org/plain", "--revision", "v9", "--yes")
    assert wrong.exit_code == 1
    assert wrong.stderr == (
        "error: revision v9 of org/plain is not in the cache, only main; "
        "type: mlx-onevision models rm org/plain --revision main\n"
    )
    assert [line.split()[0] for line in run().stdout.splitlines()] == ["org/original", "org/plain"]
    assert run("rm", "org/plain", "--yes").exit_code == 0
    assert not (tmp_path / "cache" / "models--org--plain").exists()
    assert [line.split()[0] for line in run().stdout.splitlines()] == ["org/original"]
    again = run("rm", "org/plain", "--yes")
    assert again.exit_code == 1 and "'mlx-onevision models' lists what is" in again.stderr


@pytest.mark.parametrize("spare", [2e6, 5e7])
def test_the_longest_context_fits_and_one_step_more_does_not(tmp_path: Path, spare: float) -> None:
    config = open_checkpoint(write(tmp_path, sizes=Sizes(layers=8))).config
    weights = 10**7
    least = footprint(config, weights)
    usable = least.total + int(spare)
    form = {"itemsize": 2, "quantized": False}
    longest = longest_context(config, weights, usable, **form)
    assert least.tokens <= longest
    whole = footprint(config, weights, tokens=longest, working_set=usable, **form)
    assert whole.total <= usable
    if longest < config.text_config.max_position_embeddings:
        more = footprint(config, weights, tokens=longest + 256, working_set=usable, **form)
        assert more.total > usable
    assert longest_context(config, weights, weights, **form) == 0
