"""The backend over MCP where the server is not as it should be, or ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from piped import SERVER, children, fake, processes

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.adapters.mcp import McpBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.interface import (
    EmbedRequest,
    GenerateRequest,
    Media,
    ProgressEvent,
    TextEvent,
)

CONTRACT = {"contract": True}


def opened(**asked: object) -> tuple[McpBackend, int]:
    """A backend that has answered, and its server's process."""
    before = children()
    backend = McpBackend(command=fake(settings=CONTRACT, **asked))
    backend.info()
    (pid,) = children() - before
    return backend, pid


def test_a_server_without_the_contract() -> None:
    with open_backend("mcp", command=SERVER) as backend:
        with pytest.raises(PluginError, match="does not offer the contract"):
            backend.info()
        with pytest.raises(PluginError, match="--contract"):
            backend.generate(GenerateRequest.ask("hello")).result()


def test_a_server_that_is_killed_while_it_answers() -> None:
    backend, pid = opened(fake={"delay": 0.02})
    with backend:
        stream = backend.generate(GenerateRequest.ask("word " * 500, max_tokens=1000))
        assert any(isinstance(event, TextEvent) for event in stream)
        assert backend.info().healthy
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(PluginError) as raised:
            stream.result()
        assert raised.value.code == "internal" and "open" in raised.value.hint
        info = backend.info()
        assert not info.healthy and not info.loaded and info.active == 0
        with pytest.raises(PluginError, match="has ended"):
            backend.embed(EmbedRequest(["hello"], space="joint"))
        with pytest.raises(PluginError, match="has ended"):
            backend.unload()


def test_nothing_is_left_of_a_closed_one() -> None:
    backend, pid = opened(fake={"delay": 0.02})
    before = threading.active_count()
    stream = backend.generate(GenerateRequest.ask("word " * 500, max_tokens=1000))
    next(stream)
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 2 and pid not in children()
    assert threading.active_count() < before
    assert not backend.info().healthy
    with pytest.raises(PluginError, match="has been closed"):
        backend.unload()


def test_closed_while_it_starts() -> None:
    before = children()
    for seconds in (0, 0.3, 0.7):
        backend = open_backend("mcp", command=fake(settings=CONTRACT))
        stream = backend.generate(GenerateRequest.ask("hello"))
        time.sleep(seconds)
        began = time.monotonic()
        backend.close()
        assert time.monotonic() - began < 5 and stream.ended
    assert children() <= before


def test_a_host_that_forgets_to_close_it() -> None:
    """The server ends with its host, whatever way that goes."""
    command = fake(settings=CONTRACT, fake={"delay": 0.05})
    program = (
        "import os, sys\n"
        "from mlx_onevision.plugins import open_backend\n"
        "from mlx_onevision.plugins.interface import GenerateRequest\n"
        "from piped import children\n"
        f"backend = open_backend('mcp', command={command!r})\n"
        "stream = backend.generate(GenerateRequest.ask('word ' * 500, max_tokens=1000))\n"
        "backend.info()\n"
        "print(*children(), flush=True)\n"
        "if sys.argv[1] == 'kill': os.kill(os.getpid(), 9)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for how in ("end", "kill"):
        host = [sys.executable, "-c", program, how]
        done = subprocess.run(host, capture_output=True, timeout=60, env=env)
        pid = int(done.stdout)
        until = time.monotonic() + 3
        while pid in processes():
            assert time.monotonic() < until, done.stderr
            time.sleep(0.02)


def test_events_come_in_order_and_all_of_them() -> None:
    pieces = [f"{number} " for number in range(1000)]
    backend, _ = opened(fake={"pieces": pieces})
    with backend:
        streams = [
            backend.generate(GenerateRequest.ask("count", max_tokens=4000)) for _ in range(4)
        ]
        for stream in streams:
            events = list(stream)
            assert [e.delta for e in events if isinstance(e, TextEvent)] == pieces
            stages = [e.stage for e in events if isinstance(e, ProgressEvent)]
            assert stages[0] == "queued" and stages[-1] == "answering"
            assert stream.result().text == "".join(pieces)


def test_a_request_that_is_too_long_for_the_pipe() -> None:
    backend, _ = opened()
    with backend:
        large = Media("image", data=b"\x89PNG\r\n\x1a\n" + bytes(60 << 20))
        with pytest.raises(PluginError) as raised:
            backend.embed(EmbedRequest([large]))
        assert raised.value.code == "too_large"
        small = Media("image", data=b"\x89PNG\r\n\x1a\n")
        assert len(backend.embed(EmbedRequest([small])).vectors) == 1


def test_the_environment_and_the_folder_are_the_hosts(tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text(
        "import os, sys\n"
        "open('seen', 'w').write(os.environ['ONE'] + os.environ['TWO'])\n"
        f"os.execv(sys.executable, {fake(settings=CONTRACT)!r})\n"
    )
    os.environ["ONE"] = "1"
    try:
        command = [sys.executable, str(program)]
        with McpBackend(command=command, env={"TWO": "2"}, folder=tmp_path) as backend:
            assert json.dumps(backend.info().to_dict())
        assert (tmp_path / "seen").read_text() == "12"
    finally:
        del os.environ["ONE"]
