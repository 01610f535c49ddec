"""Lines on stdin, and what becomes of those that are no message."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import mcp_types as types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings
from mlx_onevision.plugins.hosts.mcp.pipes import Pipes, TooLong, lines
from mlx_onevision.plugins.hosts.mcp.transport import parse, serialize


def read(pieces: list[bytes], most: int) -> list[bytes | TooLong]:
    """What lines come of pieces that are written one after another."""
    source, target = os.pipe()

    def write() -> None:
        with os.fdopen(target, "wb", buffering=0) as file:
            for piece in pieces:
                Pipes(-1, file.fileno()).write(piece)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return list(lines(source, most))
    finally:
        writer.join()
        os.close(source)


@given(st.lists(st.binary(max_size=12)), st.data())
def test_lines_are_lines_however_they_come(whole: list[bytes], data: st.DataObject) -> None:
    whole = [line.replace(b"\n", b"") for line in whole]
    sent = b"".join(line + b"\n" for line in whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=5)))
    pieces = [sent[a:b] for a, b in pairwise([0, *cuts, len(sent)])]
    wanted: list[Any] = [line if len(line) <= 8 else TooLong(None) for line in whole]
    assert read(pieces, 8) == [line for line in wanted if isinstance(line, TooLong) or line.strip()]


@pytest.mark.parametrize(
    ("start", "id"),
    [
        (b'{"jsonrpc":"2.0","id":7,"method":"x"', 7),
        (b' { "jsonrpc" : "2.0" , "id" : "a-b" , "method":"x"', "a-b"),
        (b'{"method":"x","id":7', None),
        (b'{"jsonrpc":"2.0","id":{"id":7},"x":', None),
        (b'{"jsonrpc":"2.0","id":"a\\"b","x":', None),
    ],
)
def test_nothing_of_a_long_line_is_kept_but_who_waits(start: bytes, id: int | str | None) -> None:
    pieces = [start, *[b"x" * 70_000] * 40, b"\nnext\n", b"cut off"]
    assert read(pieces, 1 << 20) == [TooLong(id), b"next"]


def refusal(line: bytes | TooLong, **settings: Any) -> tuple[int, Any]:
    message = parse(line, McpSettings(**settings))
    assert isinstance(message, types.JSONRPCError), message
    sent = json.loads(serialize(message))
    assert sent["error"]["message"] and "\n" not in sent["error"]["message"]
    assert sent["error"]["data"]["code"] in ("bad_request", "too_large")
    return message.error.code, message.id


@pytest.mark.parametrize(
    ("line", "code", "id"),
    [
        (b"hello", types.PARSE_ERROR, None),
        (b"{", types.PARSE_ERROR, None),
        (b"\0", types.PARSE_ERROR, None),
        (b"\xff\xfe{}", types.PARSE_ERROR, None),
        (b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}', types.PARSE_ERROR, 1),
        (b"[" * 10_000 + b"]" * 10_000, types.PARSE_ERROR, None),
        (b"[]", types.INVALID_REQUEST, None),
        (b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]', types.INVALID_REQUEST, None),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', types.INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":"a","method":5}', types.INVALID_REQUEST, "a"),
        (b'{"jsonrpc":"2.0","id":true,"method":"ping"}', types.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}', types.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":null,"method":"ping"}', types.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}', types.INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":1,"result":5}', types.INVALID_REQUEST, None),
        (TooLong(7), types.INVALID_REQUEST, 7),
        (TooLong("a"), types.INVALID_REQUEST, "a"),
        (TooLong(None), types.INVALID_REQUEST, None),
    ],
)
def test_what_is_no_message_is_answered(line: Any, code: int, id: Any) -> None:
    assert refusal(line) == (code, id)


def test_a_message_of_very_many_values_is_not_read() -> None:
    line = b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":[' + b"1," * 200 + b"1]}}"
    assert isinstance(parse(line, McpSettings()), types.JSONRPCRequest)
    assert refusal(line, max_json_values=100)[0] == types.INVALID_REQUEST


def test_good_messages_are_messages() -> None:
    settings = McpSettings()
    request = parse(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{}}\r', settings)
    assert isinstance(request, types.JSONRPCRequest) and request.id == 1
    told = parse(b'{"jsonrpc":"2.0","method":"notifications/initialized"}', settings)
    assert isinstance(told, types.JSONRPCNotification)


def test_an_answer_that_is_no_text_becomes_an_error() -> None:
    answer = types.JSONRPCResponse(jsonrpc="2.0", id=3, result={"path": "\udcff"})
    sent = json.loads(serialize(answer))
    assert sent["id"] == 3 and sent["error"]["code"] == types.INTERNAL_ERROR


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """It takes the pipes, lets everybody print, and then says one line itself."""
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(
        "import ctypes, os, subprocess, sys\n"
        "from mlx_onevision.plugins.hosts.mcp import pipes\n"
        "taken = pipes.take_stdio()\n"
        "print('noise of Python', flush=True)\n"
        "os.write(1, b'noise of a descriptor\\n')\n"
        "library = ctypes.CDLL(None)\n"
        "library.puts(b'noise of C'); library.fflush(None)\n"
        "subprocess.run([sys.executable, '-c', 'print(\"noise of a child\", input())'])\n"
        "assert sys.stdin.read() == ''\n"
        "(line,) = pipes.lines(taken.source, 100)\n"
        "taken.write(line + b'\\n')\n"
    )
    yield path


def test_only_the_protocol_reaches_stdout(program: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(program)], input=b"protocol\n", capture_output=True, timeout=30
    )
    assert done.stdout == b"protocol\n", done.stderr
    for noise in (b"of Python", b"of a descriptor", b"of C", b"EOFError"):
        assert noise in done.stderr
