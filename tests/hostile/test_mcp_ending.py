"""The end of the MCP server: of stdin, by a signal, while it answers; and what reaches stdout."""

import fcntl
import signal
import sys
import termios
import time
from pathlib import Path

import pytest
from hostile.sizes import cases
from mcp_clients import SERVER, Piped, decoders, fake, processes
from videos import encode_video, numbered

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = str(EXAMPLES / "shapes.png")

SOON = 2.0  # seconds


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "stderr.txt"


def answering(server: Piped) -> None:
    """Until an answer is under way."""
    server.waited(lambda m: m.get("params", {}).get("message") == "answering")


def unread(pipe: int) -> int:
    """Bytes that wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def end(server: Piped, how: str) -> None:
    if how == "EOF":
        assert server.process.stdin is not None
        server.process.stdin.close()
    else:
        server.process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("how", ["EOF", "SIGTERM"])
def test_it_ends_while_it_answers(how: str, log: Path) -> None:
    """An answer by a fake that would take minutes, and four others in line."""
    command = fake(folders=[str(EXAMPLES)], fake={"delay": 0.05})
    for _ in range(cases(2, 20)):
        with Piped(command, log) as server:
            server.begin()
            for number in range(5):
                question = "word " * 2000
                server.call(
                    "ask_image", number == 0, path=SHAPES, question=question, max_tokens=4000
                )
            answering(server)
            end(server, how)
            assert server.ended_after(10) <= SOON and server.process.returncode == 0
            server.check_protocol()
        assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("how", ["EOF", "SIGTERM"])
def test_no_decoder_is_left(how: str, log: Path, tmp_path: Path) -> None:
    """The real server, in the middle of a video that takes long to decode."""
    path = tmp_path / "film.mp4"
    path.write_bytes(encode_video((numbered(n % 1000) for n in range(3000)), options={"g": "3000"}))
    command = [*SERVER, "--allow-dir", str(tmp_path)]
    with Piped(command, log) as server:
        server.begin()
        started = server.waited(server.call("describe_video_start", path=str(path), segments=1.0))[
            "result"
        ]
        assert not started["isError"], started
        job = started["structuredContent"]["job_id"]
        until = time.monotonic() + 30
        while not (ours := decoders(server.process.pid)):
            told = server.waited(server.call("describe_video_status", job_id=job, wait=0))
            assert time.monotonic() < until, told
            time.sleep(0.02)
        end(server, how)
        assert server.ended_after(10) <= SOON and server.process.returncode == 0
        server.check_protocol()
    until = time.monotonic() + SOON
    while ours & set(processes()):
        assert time.monotonic() < until, "a decoder is left"
        time.sleep(0.02)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("how", ["EOF", "SIGTERM"])
def test_it_ends_while_the_model_loads(how: str, log: Path) -> None:
    with Piped(fake(folders=[str(EXAMPLES)], fake={"load_seconds": 60}), log) as server:
        server.begin()
        server.call("ask_image", True, path=SHAPES, question="What is it?")
        server.waited(lambda m: m.get("params", {}).get("message") == "loading the model")
        end(server, how)
        assert server.ended_after(10) <= SOON


def test_it_ends_when_nobody_reads(log: Path) -> None:
    """A host that has stopped reading: half an answer fills the pipe, which holds 64 KB."""
    command = fake(folders=[str(EXAMPLES)], fake={"pieces": ["x" * 16_000] * 7})
    with Piped(command, log, reads=False) as server:
        server.hello()
        server.call("ask_image", True, path=SHAPES, question="What is it?", max_tokens=4000)
        assert server.process.stdout is not None
        until = time.monotonic() + 60
        while unread(server.process.stdout.fileno()) < 1 << 15:  # the answer fills the pipe
            assert time.monotonic() < until
            time.sleep(0.1)
        end(server, "EOF")
        assert server.ended_after(10) <= SOON and server.process.returncode == 0


def test_it_ends_when_stdout_is_closed(log: Path) -> None:
    with Piped(fake(), log, reads=False) as server:
        assert server.process.stdout is not None
        server.process.stdout.close()
        server.hello()
        server.ended_after(20)
        assert server.process.returncode == 0
    assert "Traceback" not in log.read_text()


def test_what_a_library_prints_is_no_protocol(log: Path) -> None:
    with Piped(fake(folders=[str(EXAMPLES)], noisy=True), log) as server:
        server.begin()
        answer = server.waited(server.call("ask_image", path=SHAPES, question="What is it?"))
        assert answer["result"]["structuredContent"]["answer"].startswith("What is it?")
        end(server, "EOF")
        server.ended_after(10)
        server.check_protocol()
    for noise in ("of Python", "of a descriptor", "of C", "of a child"):
        assert f"noise {noise}" in log.read_text()
