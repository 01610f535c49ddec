"""The command ``mlx-onevision mcp``: what it loads, and what it refuses to start with."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcp import Client

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings
from mlx_onevision.plugins.hosts.mcp.command import mcp
from mlx_onevision.plugins.hosts.mcp.server import make_server
from mlx_onevision.plugins.service.jobs import Jobs
from mlx_onevision.plugins.service.media_policy import MediaPolicy

HEAVY = ("mcp", "mcp_types", "pydantic", "mlx", "mlx_lm", "transformers", "av", "starlette")


def run(*arguments: str, **how: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        **{"input": "", **how},
    )


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    program = (
        "import sys\n"
        "from mlx_onevision.__main__ import cli\n"
        "import mlx_onevision.plugins.hosts.mcp.allowed_files\n"
        "import mlx_onevision.plugins.hosts.mcp.pipes\n"
        "for words in (['--help'], ['mcp', '--help']):\n"
        "    cli(words, standalone_mode=False)\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert "--allow-dir" in done.stdout and done.stdout.endswith("\n[]\n")


def test_what_it_cannot_start_with_is_said(tmp_path: Path) -> None:
    command = ("-m", "mlx_onevision", "mcp")
    done = run(*command, "--allow-dir", str(tmp_path / "nothing"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith("is no folder; name one that exists")
    shell = 'exec "$0" -m mlx_onevision mcp <&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable], capture_output=True, timeout=60)
    assert done.returncode == 1 and b"open stdin" in done.stderr and b"Trace" not in done.stderr


def test_the_page_names_everything() -> None:
    page = (Path(__file__).parents[3] / "docs/mcp.md").read_text(encoding="utf-8")
    options = [name for parameter in mcp.params for name in parameter.opts]
    assert len(options) >= 7 and all(f"`{name}" in page for name in options if name != "--help")
    policy = MediaPolicy()
    with FakeBackend() as backend, Jobs(backend) as jobs:
        server = make_server(backend, jobs, McpSettings(policy))

        async def names() -> list[str]:
            async with Client(server) as client:
                return [tool.name for tool in (await client.list_tools()).tools]

        for name in asyncio.run(names()):
            assert f"`{name}`" in page
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (entry,) = json.loads(block)["mcpServers"].values()
    assert Path(entry["command"]).is_absolute()
    mcp.make_context("mcp", entry["args"][1:])
