"""Backends by name, those of other packages too; and the programs that use them."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from mlx_onevision.plugins import backends, discovery, open_backend
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed and brings backends, good and bad."""
    module = tmp_path / "brings_backends.py"
    module.write_text(
        "from mlx_onevision.plugins.adapters.fake import FakeBackend\n"
        "def good(*, word='hi'):\n    return FakeBackend(pieces=[word])\n"
        "def nothing():\n    return object()\n"
    )
    metadata = tmp_path / "brings_backends-1.0.dist-info"
    metadata.mkdir()
    metadata.joinpath("METADATA").write_text("Name: brings-backends\nVersion: 1.0\n")
    metadata.joinpath("entry_points.txt").write_text(
        f"[{discovery.GROUP}]\n"
        "good = brings_backends:good\n"
        "nothing = brings_backends:nothing\n"
        "missing = brings_nothing:at_all\n"
        "fake = brings_backends:nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_its_own_are_in_the_metadata_too() -> None:
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"][discovery.GROUP] == discovery.BUILT_IN
    for location in discovery.BUILT_IN.values():
        module, _, name = location.partition(":")
        assert callable(getattr(import_module(module), name))
    assert backends().items() >= discovery.BUILT_IN.items()


def test_a_backend_of_another_package(brought: None) -> None:
    assert backends()["good"] == "brings_backends:good"
    with open_backend("good", word="ho") as backend:
        assert isinstance(backend, FakeBackend)


def test_nobody_takes_the_place_of_its_own(brought: None) -> None:
    assert backends()["fake"] == discovery.BUILT_IN["fake"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody", "no backend 'nobody'"),
        ("missing", "brings_nothing:at_all"),
        ("nothing", "is no backend"),
    ],
)
def test_what_cannot_be_opened_is_said(brought: None, name: str, said: str) -> None:
    with pytest.raises(PluginError) as raised:
        open_backend(name)
    assert said in str(raised.value) and raised.value.hint
    with pytest.raises(PluginError, match="wrong"):
        open_backend("fake", wrong=1)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def test_the_host_app() -> None:
    done = run("host_app.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "A red circle, a blue star and an orange triangle.\n"
    assert done.stderr.split() == ["[queued]", "[loading]", "[preparing]", "[answering]"]
    lines = ROOT.joinpath("examples/host_app.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    refused = run("host_app.py", str(ROOT / "README.md"), "What?", "fake")
    assert refused.returncode == 1 and refused.stderr.splitlines()[-1].startswith("unsupported")


def test_the_host_on_asyncio() -> None:
    done = run("asyncio_host.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("A red circle, a blue star and an orange triangle.")
    assert len(done.stdout.splitlines()) == 4 and "vision" in done.stdout
    fake = run("asyncio_host.py", str(ROOT / "examples/shapes.png"), "fake")
    assert fake.returncode == 0 and "How many shapes are there?" in fake.stdout
