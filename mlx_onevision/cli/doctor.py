"""``mlx-onevision doctor``: what a bug report has to say about a machine, and what to do about it.

It is pasted in public: no path, token, user or host name may get into it. So facts are numbers, or
names of hardware, systems and packages; the text of an error goes through ``reason``. A check that
cannot be made says so in its line.

Sources: sysctl(3) of macOS for ``hw.memsize``; Apple, "About the Rosetta translation environment",
for ``sysctl.proc_translated``; MLX's ``set_wired_limit`` for ``iogpu.wired_limit_mb``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from mlx_onevision.bench.selftest import ANSWERS, HIDDEN, PROMPT, reason, run_part
from mlx_onevision.cli.options import option
from mlx_onevision.distributed import RANKS

PACKAGE = "mlx-onevision"
# Extras whose packages are listed where they are installed, and MLX's backends.
EXTRAS = ("cpu", "cuda13", "heic", "server", "mcp", "llm", "structured", "scenes")
BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
MEETING = {"MLX_HOSTFILE": "ring", "MLX_IBV_DEVICES": "jaccl", "NCCL_HOST_IP": "nccl"}

SYSCTL = "/usr/sbin/sysctl"
SELFTEST_SECONDS = 120
LINK_SECONDS = 45  # MLX itself tries for half a minute to reach the next rank
FILES = 1024  # open at once; macOS gives a shell 256
ROOM = 20 * 10**9  # bytes; the 7B model in 16 bit has 16 GB


class Finding(NamedTuple):
    """What one check found: a line of text, the same for JSON, and what to do about it."""

    line: str
    facts: dict[str, Any]
    advice: Sequence[str] = ()


@click.command()
@option("as_json")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what a bug report needs to know about this machine, test it, and give advice.

    No path, token, user or host name is in it. The exit code is 1 where the demo model does not
    answer as it should. Under mlx.launch, the link between the ranks is measured, too.

    \b
    mlx-onevision doctor
    mlx.launch --hostfile hosts.json -- mlx-onevision doctor
    """
    rank = next((os.environ[name] for name in RANKS if name in os.environ), None)
    link = None if rank is None else run_part("link", LINK_SECONDS)
    if rank not in (None, "0"):
        return  # rank 0 prints
    device = run_part("device", SELFTEST_SECONDS)
    checks: dict[str, Callable[[], Finding]] = {
        "platform": check_platform,
        "chip": check_chip,
        "memory": lambda: check_memory(device),
        "mlx": lambda: check_mlx(device),
        "versions": check_versions,
        "ranks": lambda: check_ranks(link),
        "disk": check_disk,
        "cache": check_cache,
        "limits": check_limits,
        "selftest": check_selftest,
    }
    found = {name: attempt(check) for name, check in checks.items()}
    advice = [sentence for finding in found.values() for sentence in finding.advice]
    if as_json:
        facts: dict[str, Any] = {name: finding.facts for name, finding in found.items()}
        click.echo(json.dumps({**facts, "advice": advice}, indent=1))
    else:
        for name, finding in found.items():
            click.echo(f"{name:<9} {finding.line}")
        for sentence in advice or ["Nothing."]:
            click.echo(f"{'advice':<9} {sentence}")
    if not found["selftest"].facts.get("ok"):
        click.echo(f"error: the self-test failed: {found['selftest'].line}", err=True)
        ctx.exit(1)


def attempt(check: Callable[[], Finding]) -> Finding:
    """What the check finds, or that it cannot be made."""
    try:
        return check()
    except Exception as error:
        return Finding(f"cannot be checked: {reason(error)}", {"problem": reason(error)})


def check_platform() -> Finding:
    """System, machine and Python, and whether Rosetta translates it."""
    mac = platform.mac_ver()[0]
    # A kernel's release may be named by whoever built it; its number is enough.
    system = f"macOS {mac}" if mac else f"{platform.system()} {_number(platform.release())}"
    python, machine = _number(platform.python_version()), platform.machine()
    translated = _sysctl("sysctl.proc_translated") == "1"
    facts = {"system": system, "machine": machine, "python": python, "rosetta": translated}
    advice: list[str] = []
    if translated:
        advice.append(
            "This Python is built for Intel and runs under Rosetta, where there is no MLX; install "
            "one for arm64, as 'brew install python' does in a terminal without Rosetta."
        )
    elif mac and int(mac.partition(".")[0]) < 15:
        advice.append("MLX can keep a model's memory wired from macOS 15 on; update the system.")
    line = f"{system}, {machine}, Python {python}{' under Rosetta' if translated else ''}"
    return Finding(line, facts, advice)


def check_chip() -> Finding:
    """The processor's name, and its cores."""
    name = _sysctl("machdep.cpu.brand_string")
    if name is None:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        named = re.search(r"^model name\s*: (.*)$", about, re.MULTILINE)
        name = named[1].strip() if named else platform.machine()
    cores = os.cpu_count()
    return Finding(f"{name}, {cores} cores", {"name": name, "cores": cores})


def check_memory(device: dict[str, Any]) -> Finding:
    """Bytes of memory, and how many of them MLX should use."""
    stated = _sysctl("hw.memsize")
    nbytes = int(stated) if stated else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = device.get("usable_bytes")
    line = f"{nbytes / 2**30:.0f} GiB"
    line += f", of which MLX should use {usable / 2**30:.1f}" if usable else ""
    return Finding(line, {"bytes": nbytes, "usable_bytes": usable})


def check_mlx(device: dict[str, Any]) -> Finding:
    """MLX's version, backend and device, or why it does not start."""
    version = _installed("mlx")
    facts = {"version": version, **device}
    if "problem" in device:
        name = "mlx" if platform.system() == "Darwin" else "'mlx[cpu]'"
        way = f"MLX does not start; type: pip install --force-reinstall {name}."
        return Finding(f"{version}, does not start: {device['problem']}", facts, [way])
    advice: list[str] = []
    if device["backend"] == "CPU":
        way = "with an NVIDIA GPU, type: pip install 'mlx[cuda13]'"
        if platform.system() == "Darwin":
            way = "in a virtual machine Metal is missing, so use the Mac itself"
        advice.append(f"MLX has no GPU here, and is many times slower without; {way}.")
    return Finding(f"{version}, {device['backend']}, {device['name']}", facts, advice)


def check_versions() -> Finding:
    """Versions of what is required, of installed extras, and of the backends of MLX."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    versions: dict[str, str | None] = {PACKAGE: _installed(PACKAGE)}
    advice: list[str] = []
    for text in metadata.requires(PACKAGE) or []:
        wanted = Requirement(text)
        applies = {extra for extra in ("", *EXTRAS) if _holds(wanted, extra)}
        version = _installed(wanted.name)
        if not applies or (version is None and "" not in applies):
            continue
        versions[wanted.name] = version
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            has = f"{wanted.name} is {version or 'missing'}"
            advice.append(f"{has}; type: pip install '{wanted.name}{wanted.specifier}'.")
    versions |= {name: version for name in BACKENDS if (version := _installed(name))}
    python, needed = platform.python_version(), metadata.metadata(PACKAGE)["Requires-Python"]
    if not SpecifierSet(needed).contains(_number(python)):
        advice.append(f"Python is {_number(python)}; install one that is {needed}.")
    line = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    return Finding(line, versions, list(dict.fromkeys(advice)))


def check_ranks(link: dict[str, Any] | None) -> Finding:
    """How many processes mlx.launch has started, and how fast they exchange arrays."""
    if link is None:
        return Finding("one; mlx.launch did not start it", {"count": 1})
    backend = next((name for key, name in MEETING.items() if key in os.environ), "mpi")
    facts = {"backend": backend, **link}
    if "problem" in link:
        advice = "See that every host in the hostfile reaches the others, and has this version."
        return Finding(f"{backend}, did not meet: {link['problem']}", facts, [advice])
    return Finding(
        f"{link['count']}, {backend}; one token's {HIDDEN:,} values summed in "
        f"{link['latency_seconds'] * 1e6:.0f} us, those of {PROMPT:,} tokens with "
        f"{link['bytes_per_second'] / 1e9:.2f} GB/s from each rank",
        facts,
    )


def check_disk() -> Finding:
    """Free bytes where the Hub's cache is, or will be."""
    place = _hub_cache().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    advice: list[str] = []
    if free < ROOM:
        advice.append(
            f"The disk of the Hub's cache has {_gb(free)} left, and 7b takes 16 GB; make room, or "
            "set HF_HOME to a folder on another disk."
        )
    return Finding(f"{_gb(free)} free where the Hub's cache is", {"free_bytes": free}, advice)


def check_cache() -> Finding:
    """Models and incomplete downloads in the Hub's cache, in bytes."""
    models = list(_hub_cache().glob("models--*"))
    blobs = [(b.suffix, b.lstat().st_size) for model in models for b in model.glob("blobs/*")]
    partial = [size for suffix, size in blobs if suffix == ".incomplete"]
    facts = {
        "models": len(models),
        "bytes": sum(size for _, size in blobs),
        "incomplete": len(partial),
        "incomplete_bytes": sum(partial),
    }
    advice: list[str] = []
    if partial:
        advice.append(
            f"The Hub's cache has {len(partial)} incomplete downloads of {_gb(sum(partial))}; "
            "the command that began one goes on with it."
        )
    line = f"{len(models)} models, {_gb(facts['bytes'])}; incomplete downloads: {len(partial)}"
    return Finding(line, facts, advice)


def check_limits() -> Finding:
    """Limits of open files, and of memory that macOS lets a GPU wire."""
    import resource

    soft, hard = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    wired = _sysctl("iogpu.wired_limit_mb")
    facts = {"open_files": soft, "most_open_files": hard, "wired_limit_mb": wired and int(wired)}
    line = f"{'any number of' if soft is None else soft} open files"
    if wired:
        line += f", wired memory: {'the default' if wired == '0' else f'{wired} MB'}"
    advice: list[str] = []
    if soft is not None and soft < FILES:
        most = 4096 if hard is None else min(hard, 4096)
        advice.append(f"{soft} open files at once are few for a server; type: ulimit -n {most}.")
    return Finding(line, facts, advice)


def check_selftest() -> Finding:
    """Whether the demo model answers as it should, and how fast."""
    from mlx_onevision.checkpoint import hub

    facts, expected = run_part("answer", SELFTEST_SECONDS), list(ANSWERS.values())
    facts |= {"demo": hub.identify(hub.EMBEDDED)[1], "ok": facts.get("answers") == expected}
    if "problem" in facts:
        return Finding(f"the demo model does not answer: {facts['problem']}", facts)
    if not facts["ok"]:
        return Finding(f"the demo model says {facts['answers']} instead of {expected}", facts)
    first, second = facts["seconds"]
    return Finding(f"right; a token after {first:.2f} s, and the next after {second:.3f} s", facts)


def _sysctl(name: str) -> str | None:
    """A value of macOS's kernel; None where it has none of that name, and on other systems."""
    if platform.system() != "Darwin":
        return None
    command = [SYSCTL, "-n", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603 (ours)
    return (done.stdout.strip() or None) if done.returncode == 0 else None


def _holds(wanted: Any, extra: str) -> bool:
    """Whether a requirement is one of the package's (""), or of an extra."""
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _installed(name: str) -> str | None:
    """A package's version, without what whoever built it adds after a plus sign."""
    from importlib import metadata

    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _number(version: str) -> str:
    """The number that a version or release begins with."""
    return re.split(r"[^\d.]", version, maxsplit=1)[0].rstrip(".")


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
