"""The package: what importing it costs, what it calls its own, what a wheel of it holds."""

import ast
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlx_onevision

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_onevision"


def imported(statement: str) -> set[str]:
    """The modules that are there after ``statement`` in a fresh interpreter."""
    program = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def microseconds(statement: str) -> int:
    """What ``statement`` costs in a fresh interpreter beyond starting it."""
    program = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return round(float(done.stdout) * 1e6)


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = imported("import mlx_onevision")
    assert "mlx_onevision" in loaded
    for name in ("mlx_lm", "transformers", "torch", "av", "PIL", "mlx", "numpy", "click", "jinja2"):
        assert name not in loaded
    loaded = imported("from mlx_onevision import load, Model, Generation, Inputs")
    assert {"mlx_onevision.api", "numpy"} <= loaded
    for name in ("mlx_lm", "transformers", "torch", "av", "PIL", "huggingface_hub", "jinja2"):
        assert name not in loaded
    assert not [name for name in loaded if name.endswith("ImagePlugin")]


def test_importing_costs_at_most_twice_mlx_and_numpy() -> None:
    """Medians of runs that take turns, so that a slow moment of the machine meets both."""
    ours, theirs = [], []
    for _ in range(8):
        theirs.append(microseconds("import mlx.core, numpy"))
        ours.append(microseconds("import mlx_onevision"))
    # The first of each brought files into the page cache.
    assert statistics.median(ours[1:]) <= 2 * statistics.median(theirs[1:])


def test_all_is_what_the_package_holds() -> None:
    names = mlx_onevision.__all__
    assert names == sorted(names)
    assert dir(mlx_onevision) == names
    for name in names:
        assert getattr(mlx_onevision, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mlx_onevision.nonsense


def test_the_version_is_the_metadatas() -> None:
    assert mlx_onevision.__version__ == importlib.metadata.version("mlx-onevision")


def test_the_changelog_knows_the_version() -> None:
    changelog = ROOT.joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{mlx_onevision.__version__}]" in changelog


def test_no_module_imports_the_package_itself() -> None:
    """``from mlx_onevision import name`` would go through the roof, or hide which file it needs."""
    public = set(mlx_onevision.__all__)
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("convert/*.py"), *ROOT.glob("plugins/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and path.name != "__init__.py":
                names = {alias.name for alias in node.names}
                assert node.module != "mlx_onevision" or not names & public, path
                assert node.level == 0, path


def test_the_links_are_relative() -> None:
    for name in ("convert", "plugins"):
        link = PACKAGE / name
        assert link.is_symlink() and link.readlink() == Path("..") / name
        assert link.resolve() == ROOT / name


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], str]:
    """The names in a wheel built from a copy of what git would hold, and what was printed on stderr
    by that build and by an editable one.
    """
    copy = tmp_path_factory.mktemp("wheel") / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    program = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_editable('e')"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=copy, env=environment
    )
    assert done.returncode == 0, done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist()), done.stdout + done.stderr


@pytest.fixture
def wheel(build: tuple[set[str], str]) -> set[str]:
    return build[0]


def test_builds_warn_of_nothing(build: tuple[set[str], str]) -> None:
    """Neither an ordinary nor an editable one, of package data or of folders of the same name."""
    assert "warn" not in build[1].lower()
    assert "!!" not in build[1]  # between which setuptools puts whatever it wants to be read


def test_a_wheel_holds_the_package_and_nothing_beside_it(wheel: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    version = mlx_onevision.__version__
    assert tops == {"mlx_onevision", f"mlx_onevision-{version}.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    for folder in ("convert", "plugins"):
        paths = (ROOT / folder).rglob("*.py")
        modules |= {f"mlx_onevision/{path.relative_to(ROOT).as_posix()}" for path in paths}
    assert {name for name in wheel if name.endswith(".py")} == modules
    assert {"mlx_onevision/convert/__init__.py", "mlx_onevision/py.typed"} <= wheel
    assert f"mlx_onevision-{version}.dist-info/licenses/LICENSE" in wheel


def test_a_wheel_holds_the_whole_page(wheel: set[str]) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("plugins/hosts/http/static/*")}
    assert "plugins/hosts/http/static/index.html" in files
    assert {f"mlx_onevision/{file}" for file in files} <= wheel


def test_a_wheel_holds_the_whole_demo_model(wheel: set[str]) -> None:
    demo = PACKAGE / "demo"
    files = {f"mlx_onevision/demo/{path.relative_to(demo).as_posix()}" for path in demo.rglob("*")}
    assert {"mlx_onevision/demo/config.json", "mlx_onevision/demo/model.safetensors"} <= files
    assert files <= wheel
