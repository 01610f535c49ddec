"""The MCP server of the tests as a host sees it: by the official client in this process, and as a
process that is spoken to in raw lines.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Self

from mcp import Client
from mcp_types import CallToolResult, TextContent

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings
from mlx_onevision.plugins.hosts.mcp.server import make_server
from mlx_onevision.plugins.service.jobs import Jobs
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits

BOTH = ("auto", "legacy")  # the newest protocol, and that of older hosts

Session = Callable[[Client], Coroutine[Any, Any, None]]


def backend_for(album: Path | None, **fake: Any) -> FakeBackend:
    policy = MediaPolicy(folders=[] if album is None else [album])
    return FakeBackend(policy=policy, limits=Limits(timeout=None), **fake)


def asked(
    backend: FakeBackend, session: Session, modes: Sequence[Any] = ("auto",), **settings: Any
) -> None:
    """Runs a session with the official client."""

    async def main(mode: Any) -> None:
        with Jobs(backend) as jobs:
            server = make_server(backend, jobs, McpSettings(backend.policy, **settings))
            async with Client(server, mode=mode) as client:
                await session(client)

    for mode in modes:
        asyncio.run(main(mode))


async def good(client: Client, name: str, **arguments: Any) -> dict[str, Any]:
    """The structure of an answer, which the client has held against the tool's schema."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error and isinstance(result.structured_content, dict), result
    return result.structured_content


async def bad(client: Client, name: str, **arguments: Any) -> str:
    return refusal(await client.call_tool(name, arguments))


def refusal(result: CallToolResult) -> str:
    """What a refused call is answered: one sentence, with the way out."""
    assert result.is_error and result.structured_content is None
    (block,) = result.content
    assert isinstance(block, TextContent) and "\n" not in block.text and len(block.text) < 700
    assert "Traceback" not in block.text and not block.text.endswith(".")
    return block.text


SERVER = [sys.executable, "-m", "mlx_onevision", "mcp"]
PROGRAM = [sys.executable, str(Path(__file__).parent / "hosts/mcp_server.py")]

VERSION = "2025-06-18"


def fake(**asked: Any) -> list[str]:
    """The command of a server over the fake backend; see ``hosts/mcp_server.py``."""
    return [*PROGRAM, json.dumps(asked)]


class Piped:
    """stderr : a file for the server's messages. reads : whether its answers are read."""

    def __init__(self, command: Sequence[str], stderr: Path, reads: bool = True) -> None:
        self.stderr = stderr
        self.said: list[bytes] = []
        """Every line of its stdout, whatever it is."""
        self._changed = threading.Condition()
        self._ids = iter(range(1, 1 << 30))
        with stderr.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self._reader = threading.Thread(target=self._read)
        if reads:
            self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.said.append(line)
                self._changed.notify_all()

    def send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def ask(self, method: str, params: dict[str, Any] | None = None) -> int:
        """Sends a request, and returns its id."""
        id = next(self._ids)
        message = {"jsonrpc": "2.0", "id": id, "method": method, "params": params or {}}
        self.send(json.dumps(message).encode())
        return id

    def tell(self, method: str, params: dict[str, Any] | None = None) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        self.send(json.dumps(message).encode())

    def call(self, tool: str, progress: bool = False, **arguments: Any) -> int:
        meta = {"_meta": {"progressToken": "token"}} if progress else {}
        return self.ask("tools/call", {"name": tool, "arguments": arguments, **meta})

    def waited(self, wanted: Any, seconds: float = 30.0) -> dict[str, Any]:
        """The first message for which ``wanted`` holds; or the answer to a request's id."""
        test = (lambda m: m.get("id") == wanted) if isinstance(wanted, int) else wanted
        until = time.monotonic() + seconds
        place = 0
        with self._changed:
            while True:
                while place < len(self.said):
                    message = json.loads(self.said[place])
                    if test(message):
                        return message
                    place += 1
                left = until - time.monotonic()
                assert left > 0, f"it did not come; stderr: {self.stderr.read_text()[-2000:]}"
                self._changed.wait(left)

    def begin(self) -> Self:
        """The handshake of hosts that are not of this year."""
        answer = self.waited(self.hello())
        assert answer["result"]["serverInfo"]["name"] == "mlx-onevision"
        self.tell("notifications/initialized")
        return self

    def hello(self) -> int:
        client = {"name": "test", "version": "1"}
        hello = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": client}
        return self.ask("initialize", hello)

    def check_protocol(self) -> None:
        """Nothing but messages has come."""
        for line in self.said:
            assert line.endswith(b"\n") and json.loads(line)["jsonrpc"] == "2.0", line

    def ended_after(self, seconds: float) -> float:
        """Waits for the process to end; how long that took."""
        began = time.monotonic()
        self.process.wait(seconds)
        return time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self._reader.ident is not None:
            self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what it had not read
                    pass


def processes() -> dict[int, tuple[int, str]]:
    """Those of this machine that run: their parent and their command."""
    columns = ["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="]
    listed = subprocess.run(columns, capture_output=True, text=True).stdout.splitlines()
    rows = (line.split(None, 3) for line in listed)
    return {
        int(pid): (int(parent), args)
        for pid, parent, state, args in rows
        if not state.startswith("Z") and not args.startswith("ps ")
    }


def children(parent: int | None = None) -> set[int]:
    """Those that a process has started; this one, where none is named."""
    wanted = os.getpid() if parent is None else parent
    return {pid for pid, (its_parent, _) in processes().items() if its_parent == wanted}


def decoders(server: int) -> set[int]:
    """Those that decode videos for a server."""
    running = processes()
    return {pid for pid in children(server) if "decoder_process.py" in running.get(pid, (0, ""))[1]}
