"""``doctor``: what it says, that it says nothing private, and that nothing stops it."""

import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ranks
from click.testing import CliRunner, Result

from mlx_onevision.bench.selftest import reason, run_part
from mlx_onevision.cli import doctor
from mlx_onevision.cli.main import cli

COMMAND = (sys.executable, "-m", "mlx_onevision", "doctor")
SECTIONS = ["platform", "chip", "memory", "mlx", "versions", "ranks", "disk", "cache", "limits"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *arguments])


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the self-test and of MLX's device, which take seconds; the link is measured."""
    known: dict[str, dict[str, Any]] = {
        "device": {"backend": "CPU", "name": "cpu", "usable_bytes": 1 << 34},
        "answer": {"answers": ["Yes", "No"], "seconds": [0.5, 0.01]},
    }
    monkeypatch.setattr(
        doctor, "run_part", lambda part, seconds: known.get(part) or run_part(part, seconds)
    )


# What it says.


def test_json_has_what_a_report_needs_and_the_text_says_the_same() -> None:
    done = run("--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert list(report) == [*SECTIONS, "selftest", "advice"]
    assert report["mlx"]["backend"] in ("Metal", "CUDA", "CPU")
    assert 0 < report["mlx"]["usable_bytes"] <= report["memory"]["bytes"]
    assert report["versions"]["mlx-onevision"] == metadata.version("mlx-onevision")
    assert report["versions"]["mlx-lm"] == metadata.version("mlx-lm")
    assert report["ranks"] == {"count": 1}
    assert report["selftest"]["answers"] == ["Yes", "No"] and report["selftest"]["ok"]
    assert not any("problem" in report[name] for name in SECTIONS)
    text = run()
    assert text.exit_code == 0
    lines = text.stdout.splitlines()
    assert [line.split()[0] for line in lines][: len(SECTIONS) + 1] == [*SECTIONS, "selftest"]
    assert [line.split(maxsplit=1)[1] for line in lines[len(SECTIONS) + 1 :]] == (
        report["advice"] or ["Nothing."]
    )
    assert f"{report['memory']['bytes'] / 2**30:.0f} GiB" in text.stdout


def planted(folder: Path) -> tuple[dict[str, str], list[str]]:
    """An environment full of private names, and these. MLX cannot be imported in it, and the error
    of that names them all.
    """
    home, cache = folder / "plantedhome", folder / "plantedcache"
    environment = {
        "HOME": str(home),
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_plantedtoken",
        "USER": "planteduser",
        "LOGNAME": "planteduser",
        "HOSTNAME": "plantedhost.local",
        "ODD": "planted words of a value",
    }
    blobs = cache / "hub" / "models--plantedowner--plantedmodel" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "whole").write_bytes(b"0" * 100)
    (blobs / "part.incomplete").write_bytes(b"0" * 20)
    broken = folder / "broken" / "mlx"
    broken.mkdir(parents=True)
    names = [*environment.values(), socket.gethostname(), str(folder), f"is/{folder.name}/here"]
    (broken / "__init__.py").write_text(f"raise ImportError({' '.join(names)!r})", encoding="utf-8")
    words = [*names, Path.home().name, folder.name, str(Path.cwd())]
    return environment, words


@pytest.mark.parametrize(
    ("option", "broken"), [((), False), (("--json",), False), (("--json",), True)]
)
def test_nothing_private_is_in_it(tmp_path: Path, option: tuple[str, ...], broken: bool) -> None:
    environment, private = planted(tmp_path)
    if broken:
        environment["PYTHONPATH"] = str(tmp_path / "broken")
    done = subprocess.run(
        [*COMMAND, *option],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == int(broken), done.stderr
    said = done.stdout + done.stderr
    assert ("ImportError" in said) == broken
    assert not [word for word in private if re.search(rf"\b{re.escape(word)}\b", said)]
    assert "planted" not in said
    if option:
        report = json.loads(done.stdout)["cache"]
        assert report == {"models": 1, "bytes": 120, "incomplete": 1, "incomplete_bytes": 20}
    else:
        assert "1 models" in said and "1 incomplete downloads" in said
    if broken:
        assert done.stderr.startswith("error: the self-test failed: the demo model does not answer")
        assert len(done.stderr.splitlines()) == 1


def test_an_error_keeps_its_words_and_loses_what_is_private(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/Users/Jo Q Public")
    monkeypatch.setenv("SECRET", "abc123")
    error = OSError("dlopen(/opt/x.so): wrong type; /Users/Jo Q Public/a, abc123, me@there")
    assert reason(error) == "OSError: … wrong type; … …, …"


# What it does where something is wrong.


@pytest.mark.usefixtures("answered")
def test_a_wrong_answer_is_a_sentence_and_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWERS", {"a": "Yes", "b": "Yes"})
    done = run("--json")
    assert done.exit_code == 1
    assert done.stderr == (
        "error: the self-test failed: the demo model says ['Yes', 'No'] instead of ['Yes', 'Yes']\n"
    )
    assert json.loads(done.stdout)["selftest"]["ok"] is False


@pytest.mark.usefixtures("answered")
def test_a_check_that_cannot_be_made_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    done = run()
    assert done.exit_code == 0
    [line] = [line for line in done.stdout.splitlines() if line.startswith("disk")]
    assert "cannot be checked: PermissionError: [Errno 13] Permission denied" in line
    assert "/" not in line


def test_little_disk_few_files_and_old_packages_have_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage("/")._replace(free=3_200_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    [sentence] = doctor.check_disk().advice
    assert "has 3.2 GB left" in sentence and "HF_HOME" in sentence

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = doctor.check_limits()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.line == "256 open files" and found.facts["open_files"] == 256
    assert found.advice[0].endswith("type: ulimit -n 4096.")

    version = metadata.version
    odd = {"mlx-lm": "0.31.0", "numpy": "2.9.0+somebody.local", "mcp": "2.0"}
    monkeypatch.setattr(metadata, "version", lambda name: odd.get(name) or version(name))
    found = doctor.check_versions()
    assert found.facts["numpy"] == "2.9.0"
    assert found.advice == [
        "mlx-lm is 0.31.0; type: pip install 'mlx-lm>=0.32.2'.",
        "mcp is 2.0; type: pip install 'mcp>=2.3'.",
    ]
    cpu = doctor.check_mlx({"backend": "CPU", "name": "x"})
    assert "no GPU" in cpu.advice[0]
    assert "pip install" in doctor.check_mlx({"problem": "x"}).advice[0]


# A Mac, by a sysctl of our own that answers as macOS's does.


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    values = {
        "hw.memsize": "34359738368",
        "machdep.cpu.brand_string": "Apple M2 Max",
        "iogpu.wired_limit_mb": "0",
        "sysctl.proc_translated": "0",
    }
    program = tmp_path / "sysctl"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = -n ] || exit 64\ncat "{tmp_path}/$2" 2>/dev/null && exit 0\n'
        "echo \"sysctl: unknown oid '$2'\" >&2\nexit 1\n",
        encoding="utf-8",
    )
    program.chmod(0o755)

    class Values(dict[str, str]):
        def __setitem__(self, name: str, value: str) -> None:
            (tmp_path / name).write_text(value + "\n", encoding="utf-8")

        def __delitem__(self, name: str) -> None:
            (tmp_path / name).unlink()

    there = Values()
    for name, value in values.items():
        there[name] = value
    monkeypatch.setattr(doctor, "SYSCTL", str(program))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    yield there


def test_a_mac_is_described(mac: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.check_platform()
    assert found.line.startswith("macOS 15.5, arm64, Python 3.") and not found.advice
    assert doctor.check_chip().facts["name"] == "Apple M2 Max"
    memory = doctor.check_memory({"usable_bytes": 22_906_503_168})
    assert memory.line == "32 GiB, of which MLX should use 21.3"
    assert doctor.check_limits().line.endswith("wired memory: the default")
    mac["iogpu.wired_limit_mb"] = "28672"
    assert doctor.check_limits().line.endswith("wired memory: 28672 MB")
    del mac["iogpu.wired_limit_mb"]
    assert doctor.check_limits().facts["wired_limit_mb"] is None
    del mac["sysctl.proc_translated"]  # on a Mac with an Intel processor
    assert doctor.check_platform().facts["rosetta"] is False
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.7.1", ("", "", ""), "arm64"))
    assert "macOS 15" in doctor.check_platform().advice[0]


def test_a_python_under_rosetta_is_told(
    mac: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac["sysctl.proc_translated"] = "1"
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    found = doctor.check_platform()
    assert found.line.endswith("under Rosetta") and "arm64" in found.advice[0]


# Ranks.


@pytest.mark.usefixtures("answered")
def test_a_rank_that_never_comes_ends_the_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:35617"], ["127.0.0.1:35618"]]', encoding="utf-8")
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setattr(doctor, "LINK_SECONDS", 2)
    started = time.monotonic()
    done = run("--json")
    assert time.monotonic() - started < 30
    report = json.loads(done.stdout)
    assert report["ranks"] == {"backend": "ring", "problem": "no end after 2 s"}
    assert done.exit_code == 0 and report["selftest"]["ok"]
    assert any("hostfile" in sentence for sentence in report["advice"])
    monkeypatch.setenv("MLX_RANK", "1")
    assert run().output == ""


def test_two_ranks_have_a_measured_link_and_one_of_them_prints(tmp_path: Path) -> None:
    command = ["-m", "mlx_onevision", "doctor", "--json"]
    with ranks.running(command, command, folder=tmp_path) as started:
        first, second = ranks.ended(started, seconds=180)
    report = json.loads(first[1])
    assert second == (0, "", "")
    assert report["ranks"].get("count") == 2, report["ranks"]
    assert report["ranks"]["backend"] == "ring"
    assert 0 < report["ranks"]["latency_seconds"] < 10
    assert report["ranks"]["bytes_per_second"] > 1e6
    assert first[0] == 0 and report["selftest"]["ok"]


def test_the_page_says_how_long_it_waits_and_what_it_sums() -> None:
    page = Path(__file__).parents[2].joinpath("docs/several-macs.md").read_text(encoding="utf-8")
    assert f"ends after {doctor.LINK_SECONDS} seconds" in page
    assert f"a sum of {doctor.PROMPT:,} tokens" in page
    config = Path(sys.executable).with_name("mlx.distributed_config")
    done = subprocess.run([config, "--help"], capture_output=True, text=True, timeout=60)
    commands = re.findall(r"mlx\.distributed_config (--.*)", page)
    assert len(commands) == 2
    assert set(re.findall(r"--[a-z-]+", " ".join(commands))) <= set(
        re.findall(r"--[a-z-]+", done.stdout)
    )
