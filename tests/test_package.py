"""The package: what importing it costs, what it calls its own, what a wheel of it holds."""

import ast
import importlib.metadata
import inspect
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import textwrap
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

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


def functions() -> Iterator[tuple[str, Callable[..., typing.Any], str]]:
    """Everything that can be called or read of what the package exports: its name, its function,
    and its docstring. Of a class, that of its constructor is the class's own.
    """
    for name in mlx_onevision.__all__:
        value = getattr(mlx_onevision, name)
        if inspect.isfunction(value):
            yield name, value, value.__doc__ or ""
        if not inspect.isclass(value) or issubclass(value, Exception):
            continue
        if not typing.is_typeddict(value):
            yield name, value.__init__, inspect.getdoc(value) or ""
        for own, member in inspect.getmembers_static(value):
            if own.startswith("_"):
                continue
            if isinstance(member, property):
                member = member.fget
            elif isinstance(member, classmethod | staticmethod):
                member = member.__func__
            if inspect.isfunction(member):
                yield f"{name}.{own}", member, member.__doc__ or ""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_public_docstrings_name_parameters_and_errors() -> None:
    """help() is enough to use the library: no parameter and no error of a function is left out."""
    checked = 0
    for name, function, text in functions():
        assert text.strip(), f"{name} has no docstring"
        parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
        assert not parameters - words(text), f"{name}: {sorted(parameters - words(text))}"
        if "/mlx_onevision/" not in inspect.getfile(inspect.unwrap(function)):
            continue  # what dataclass has written
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        raised = {
            node.exc.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and isinstance(node.exc.func, ast.Name)
            and node.exc.func.id in mlx_onevision.__all__
        }
        assert not raised - words(text), f"{name}: {sorted(raised - words(text))}"
        checked += 1
    assert checked > 30
    for name in mlx_onevision.__all__:
        value = getattr(mlx_onevision, name)
        if typing.is_typeddict(value):
            settings = set(typing.get_type_hints(value))
            assert not settings - words(value.__doc__ or ""), name
        elif name != "__version__":
            assert inspect.getdoc(value), name


def test_help_of_the_package_names_what_it_exports() -> None:
    assert not set(mlx_onevision.__all__) - words(mlx_onevision.__doc__ or "") - {"__version__"}


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


Archive = dict[str, bytes]


@dataclass(frozen=True)
class Built:
    """The files of a wheel made from a copy of the checkout, of an sdist, and of the wheel that is
    made from that sdist; the first wheel's size in bytes; and what was printed by all builds of the
    checkout, an editable one among them.
    """

    wheel: Archive
    sdist: Archive
    wheel_of_sdist: Archive
    size: int
    printed: str


def read_wheel(folder: Path) -> Archive:
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "node")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(program: str, folder: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"from setuptools import build_meta as b; {program}"],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    printed = run("b.build_sdist('s'); b.build_wheel('w'); b.build_editable('e')", copy)
    (path,) = (copy / "s").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        sdist = {
            member.name.partition("/")[2]: file.read()
            for member in archive.getmembers()
            if (file := archive.extractfile(member)) is not None
        }
        archive.extractall(place, filter="data")
    unpacked = place / path.name.removesuffix(".tar.gz")
    run("b.build_wheel('w')", unpacked)
    (wheel,) = (copy / "w").glob("*.whl")
    of_sdist = read_wheel(unpacked / "w")
    return Built(read_wheel(copy / "w"), sdist, of_sdist, wheel.stat().st_size, printed)


def held() -> set[str]:
    """The files of the package in the checkout, convert and plugins included."""
    places = (PACKAGE, ROOT / "convert", ROOT / "plugins")
    names = {
        path.relative_to(ROOT).as_posix()
        for place in places
        for path in place.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {
        name if name.startswith("mlx_onevision/") else f"mlx_onevision/{name}" for name in names
    }


def test_builds_warn_of_nothing(built: Built) -> None:
    """Neither of an sdist or a wheel nor an editable one, of package data or of folders of the same
    name.
    """
    assert "warn" not in built.printed.lower()
    assert "!!" not in built.printed  # between which setuptools puts whatever it wants to be read


def test_a_wheel_holds_the_package_and_nothing_beside_it(built: Built) -> None:
    """All of the page and of the demo model, py.typed, and no tests."""
    info = f"mlx_onevision-{mlx_onevision.__version__}.dist-info"
    described = {name.removeprefix(f"{info}/") for name in built.wheel if name.startswith(info)}
    assert described == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "licenses/LICENSE",
        "licenses/NOTICE",
        "licenses/plugins/hosts/http/static/marked.LICENSE.txt",
    }
    files = {name for name in built.wheel if not name.startswith(info)}
    assert files == held()
    assert built.wheel[f"{info}/top_level.txt"] == b"mlx_onevision\n"
    assert files > {
        "mlx_onevision/py.typed",
        "mlx_onevision/demo/config.json",
        "mlx_onevision/demo/model.safetensors",
        "mlx_onevision/convert/__init__.py",
        "mlx_onevision/plugins/hosts/http/static/index.html",
    }


def test_a_wheel_is_the_demo_model_and_little_else(built: Built) -> None:
    """4.9 MB, of which the weights are 4.2: what is beside them may grow by a quarter."""
    weights = len(zlib.compress(built.wheel["mlx_onevision/demo/model.safetensors"]))
    assert built.size - weights < 900_000


def test_an_sdist_makes_the_same_wheel(built: Built) -> None:
    records = {name for name in built.wheel if name.endswith("/RECORD")}
    assert built.wheel_of_sdist.keys() == built.wheel.keys()
    changed = {name for name in built.wheel if built.wheel[name] != built.wheel_of_sdist[name]}
    assert changed <= records


def test_an_sdist_holds_no_tests(built: Built) -> None:
    assert {"pyproject.toml", "setup.py", "LICENSE", "NOTICE", "CITATION.cff"} <= built.sdist.keys()
    assert not [name for name in built.sdist if name.startswith("tests")]


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load(ROOT.joinpath("CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mlx_onevision.__version__


def test_parts_of_others_are_named_with_their_licence(built: Built) -> None:
    """Each has its text in the wheel, stands in NOTICE, and is in the expression of licences."""
    notice = ROOT.joinpath("NOTICE").read_text(encoding="utf-8")
    texts = [path for place in ("plugins", "convert") for path in (ROOT / place).rglob("*LICENSE*")]
    assert [path.name for path in texts] == ["marked.LICENSE.txt"]
    for path in texts:
        part = path.with_name(path.name.replace(".LICENSE.txt", ".js"))
        first = part.read_text(encoding="utf-8").splitlines()[1]  # " * marked v18.2.1 - ..."
        assert part.relative_to(ROOT).as_posix() in notice
        assert " ".join(first.split()[1:3]).replace(" v", " ") in notice
    (metadata,) = (text for name, text in built.wheel.items() if name.endswith("/METADATA"))
    assert b"\nLicense-Expression: Apache-2.0 AND MIT AND BSD-3-Clause\n" in metadata


def test_workflows_pin_actions_to_commits() -> None:
    """With the release behind them, and one commit for one action."""
    pins: dict[str, set[str]] = {}
    for path in ROOT.glob(".github/workflows/*.yml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "uses: " in line and "uses: $/" not in line:
                found = re.search(r"uses: ([\w/-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)$", line)
                assert found, line
                pins.setdefault(found[1], set()).add(f"{found[2]} {found[3]}")
    assert len(pins) == 5
    assert all(len(pin) == 1 for pin in pins.values())
