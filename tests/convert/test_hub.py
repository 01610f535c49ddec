"""From the Hub and back to it, through the real huggingface_hub client and a hub on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from changed_checkpoints import logits
from checkpoints import write
from click.testing import CliRunner, Result
from fakehub import FakeHub
from huggingface_hub import constants

from mlx_onevision.__main__ import cli
from mlx_onevision.checkpoint import manifest, recipes
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.convert import hub as sources
from mlx_onevision.convert.conversion import convert, prepare
from mlx_onevision.convert.hub import upload
from mlx_onevision.errors import ModelNotFoundError, OneVisionError

NAME = "org/picture-model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the client takes for the Hub, and a cache of this test's own."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            fake.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield fake


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write(tmp_path / "source", shards=2, dtype="bfloat16")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [vision]\n---\n# Pictures\n")
    (folder / "LICENSE").write_text("Apache")
    return folder


def publish(hub: FakeHub, folder: Path) -> str:
    """The commit."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.add(NAME, files | {"model.py": b"evil", "weights.bin": b"evil"}).commit


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", "--no-verify", *map(str, arguments)])


def test_from_the_hub(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    commit = publish(hub, source)
    hub.cuts = {"model-00001-of-00002.safetensors": [30_000, 60_000]}  # and taken up again
    summary = convert(NAME, tmp_path / "made", revision="main", recipe=recipes.uniform())
    assert (summary.source, summary.revision) == (NAME, commit)
    assert not {"model.py", "weights.bin"} & hub.fetched()
    ranges = [r.range for r in hub.requests if r.range]
    assert ranges == ["bytes=16384-", "bytes=49152-"]  # the chunks that had come are kept
    ours = logits(load_checkpoint(summary.target).model)
    assert (ours == logits(load_checkpoint(source, recipe=recipes.uniform()).model)).all()
    origin = json.loads((summary.target / "config.json").read_text())["mlx_onevision"]
    assert origin["base_model"] == NAME and origin["revision"] == commit
    card = (summary.target / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "mlx" and head["license"] == "apache-2.0"
    assert head["base_model"] == NAME and head["pipeline_tag"] == "image-text-to-text"
    assert head["base_model_relation"] == "quantized"
    assert "mlx" in head["tags"] and "vision" in head["tags"]
    assert commit in card and (summary.target / "LICENSE").read_text() == "Apache"
    # What is made of the converted folder still knows where it came from.
    again = convert(summary.target, tmp_path / "again", dequantize=True)
    assert (again.source, again.revision) == (NAME, commit)


def test_a_download_that_stops_is_taken_up(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    publish(hub, source)
    hub.cuts = {"model-00002-of-00002.safetensors": [50_000] * 20}
    with pytest.raises(ModelNotFoundError):
        convert(NAME, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    hub.cuts.clear()
    hub.requests.clear()
    convert(NAME, tmp_path / "made")
    assert not any("00001-of" in r.path for r in hub.requests if r.method == "GET")


def test_offline(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, source)
    convert(NAME, tmp_path / "first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    convert(NAME, tmp_path / "second")
    assert (tmp_path / "second/model.safetensors").read_bytes() == (
        tmp_path / "first/model.safetensors"
    ).read_bytes()
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        convert("org/other", tmp_path / "third")
    assert hub.requests == []


def test_a_dry_run_knows_every_byte(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    """Without a weight being downloaded, and with nothing in the cache or the target."""
    publish(hub, source)
    wanted = sum(path.stat().st_size for path in source.iterdir())
    with sources.outline(NAME) as outlined:
        planned = prepare(outlined, tmp_path / "made", recipes.uniform())
        assert planned.summary.download == wanted
        scratch = sum(path.stat().st_blocks * 512 for path in outlined.folder.iterdir())
        assert scratch < wanted / 2  # holes where the weights would be
    assert not list((tmp_path / "cache").rglob("*.*")) and not (tmp_path / "made").exists()
    sent = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert sent and all(r.range == "bytes=0-100000" for r in sent)
    summary = convert(NAME, tmp_path / "made", recipe=recipes.uniform())
    assert summary.nbytes == planned.summary.nbytes and summary.specs == planned.summary.specs
    weights = {n: size for n, size in summary.files.items() if n.endswith(".safetensors")}
    assert weights == planned.summary.files
    with sources.outline(NAME) as outlined:
        assert outlined.download == 0  # by now it is all here
    result = run(NAME, tmp_path / "made", "--dry-run", "-q")
    assert result.exit_code == 0 and "download   0 bytes" in result.stdout


def test_without_a_network_the_cache_is_outlined(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the conversion itself does without fit."""
    publish(hub, source)
    convert(NAME, tmp_path / "first")
    for status in (401, 404, 500):  # removed, or a moment in which the Hub is down
        hub.failures[f"models/{NAME}"] = [status] * 9
        with sources.outline(NAME) as outlined:
            assert outlined.download == 0
    hub.failures.clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    convert(NAME, tmp_path / "second")
    result = run(NAME, tmp_path / "third", "--recipe", "fit", "--memory", "8GB")
    assert result.exit_code == 0, result.output
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        with sources.outline("org/other"):
            pass


def test_a_dry_run_of_what_is_not_there(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="neither a folder nor a model"):
        with sources.outline("org/nothing"):
            pass


@pytest.mark.parametrize("memory", ["1MB", "8GB"])
def test_fit_refuses_before_the_download(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """A model that does not fit, and a default folder that is there already."""
    publish(hub, source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture-model-mlx").mkdir()
    (tmp_path / "picture-model-mlx/config.json").write_text("{}")
    result = run(NAME, "--recipe", "fit", "--memory", memory)
    assert result.exit_code == 1
    assert ("nothing fits" if memory == "1MB" else "is there already") in result.stderr
    sent = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert sent and all(r.range == "bytes=0-100000" for r in sent)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_fit_downloads_what_fits(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    commit = publish(hub, source)
    result = run(NAME, tmp_path / "made", "--recipe", "fit", "--memory", "8GB", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["revision"], values["download"], values["recipe"]) == (commit, 0, "bfloat16")
    manifest.check(tmp_path / "made", hashes=True)


@pytest.mark.parametrize("pull", [False, True], ids=["a commit", "a pull request"])
def test_to_the_hub_and_back(hub: FakeHub, source: Path, tmp_path: Path, pull: bool) -> None:
    flags = ["--private", *(["--create-pr"] if pull else [])]
    made = tmp_path / "made"
    stale = "model-00001-of-00003.safetensors"
    hub.add("someone/mine", {stale: b"another model's", "notes.txt": b"kept"})
    result = run(source, made, "-q", "--upload-repo", "someone/mine", "--json", *flags)
    assert result.exit_code == 0, result.output
    (created,), (commit,) = hub.created, hub.commits
    assert created["visibility"] == "private"
    assert (
        commit["gone"] == [stale]
        and commit["pull"] is pull
        and commit["repository"] == "someone/mine"
    )
    assert commit["files"] == {path.name: path.read_bytes() for path in made.iterdir()}
    address = json.loads(result.stdout)["uploaded"]
    assert address.startswith(hub.url) and ("discussions" in address) is pull
    if not pull:
        again = convert("someone/mine", tmp_path / "again")
        manifest.check(again.target, hashes=True)
        both = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("made", "again")]
        assert both[0] == both[1]


@pytest.mark.parametrize(
    ("failures", "wanted"),
    [
        ({"repos/create": [403]}, "does not let you write to someone/mine; sign in"),
        ({"/commit/": [500] * 9}, "answered 500 to the upload; it is whole in"),
    ],
)
def test_an_upload_that_fails_says_where_the_model_is(
    hub: FakeHub, source: Path, tmp_path: Path, failures: dict[str, list[int]], wanted: str
) -> None:
    target = convert(source, tmp_path / "made").target
    hub.failures = failures
    with pytest.raises(OneVisionError, match=wanted) as refused:
        upload(target, "someone/mine")
    assert f"hf upload someone/mine {target}" in str(refused.value)
    with pytest.raises(OneVisionError, match="not a repository's id"):
        upload(target, "../mine")
