"""Whatever comes on stdin: an error or silence, never anything else, and then a good answer."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hostile.sizes import cases
from mcp_clients import Piped, fake

from mlx_onevision.plugins.conformance.subject import png
from mlx_onevision.plugins.hosts.mcp.transport import is_text

SHAPES = Path(__file__).parents[2] / "examples/shapes.png"
LINES = cases(1000, 10_000) // 2

METHODS = (
    *("initialize", "tools/call", "tools/list", "ping", "resources/read", "prompts/get"),
    *("logging/setLevel", "server/discover", "notifications/cancelled", "nothing/at/all", ""),
)
TOOLS = (
    *("ask_image", "compare_images", "ask_video", "describe_video_start", "embed"),
    *("describe_video_status", "describe_video_cancel", "find_similar", "nothing"),
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Piped]:
    (tmp_path / "a.png").write_bytes(png(8, 8, (1, 2, 3)))
    with Piped(fake(folders=[str(tmp_path)]), tmp_path / "stderr.txt") as server:
        yield server


def value(dice: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say."""
    plain = (
        *(None, True, 0, -1, 1e308, 2**63, 0.5, "", "x", "/etc/passwd", "\0", "🙂", "a" * 5000),
        *("\ud800", "a\udfffb", float("nan"), 10**30),
        *("../..", "~", "http://127.0.0.1:9/", {}, [], "describe", 1, 5),
    )
    if depth > 3 or dice.random() < 0.7:
        return dice.choice(plain)
    if dice.random() < 0.5:
        return [value(dice, depth + 1) for _ in range(dice.randrange(4))]
    names = (
        "path",
        "question",
        "paths",
        "texts",
        "job_id",
        "messages",
        "api_version",
        "_meta",
        "x",
    )
    return {dice.choice(names): value(dice, depth + 1) for _ in range(dice.randrange(5))}


def line(dice: random.Random) -> bytes:
    message: dict[Any, Any] = {"jsonrpc": "2.0"}
    if dice.random() < 0.8:
        message["id"] = dice.choice([dice.randrange(10_000, 20_000), value(dice), "id"])
    message["method"] = dice.choice(METHODS) if dice.random() < 0.9 else value(dice)
    params = value(dice)
    if message["method"] == "tools/call" and dice.random() < 0.8:
        params = {"name": dice.choice(TOOLS), "arguments": value(dice), "_meta": value(dice)}
    if message["method"] == "notifications/cancelled":
        params = {"requestId": dice.choice([dice.randrange(30_000), value(dice)])}
    if dice.random() < 0.9:
        message["params"] = params
    if dice.random() < 0.1:
        message[dice.choice(["jsonrpc", "result", "error"])] = value(dice)
    text = json.dumps([message] if dice.random() < 0.05 else message).encode()
    kind = dice.random()
    if kind < 0.1:
        return text[: dice.randrange(len(text))]
    if kind < 0.25:
        place = dice.randrange(len(text))
        return (text[:place] + dice.randbytes(3) + text[place + 1 :]).replace(b"\n", b" ")
    return text


def check(server: Piped) -> None:
    """It still answers as it should, and has said nothing but messages."""
    picture = server.stderr.with_name("a.png")
    answer = server.waited(server.call("ask_image", path=str(picture), question="Still there?"))
    assert answer["result"]["structuredContent"]["answer"] == "Still there? [1 image][0 videos]"
    server.check_protocol()
    text = b"".join(server.said)
    assert b"Traceback" not in text and b"root:x:0" not in text


def request_id(sent: bytes) -> int | str | None:
    """Of a line that is a request, whatever else is wrong with it, and whose id is text."""
    try:
        message = json.loads(sent)
    except ValueError:
        return None
    if not isinstance(message, dict) or "method" not in message:
        return None
    id = message.get("id")
    return id if type(id) in (int, str) and is_text(str(id)) else None


@pytest.mark.parametrize("begun", [True, False])
def test_fuzzed_lines(begun: bool, server: Piped) -> None:
    """Every request is answered, under its id, unless it is cancelled."""
    if begun:
        server.begin()
    dice = random.Random(5)
    asked: Counter[int | str] = Counter()
    cancelled: list[Any] = []
    for _ in range(LINES):
        sent = line(dice)
        id = request_id(sent)
        if id is not None:
            asked[id] += 1
        if b"notifications/cancelled" in sent:
            with suppress(ValueError, TypeError, LookupError):
                cancelled.append(json.loads(sent)["params"]["requestId"])
        server.send(sent)
    if not begun:
        server.hello()
    check(server)
    answered = Counter(json.loads(said).get("id") for said in list(server.said))
    assert asked.total() > LINES / 3
    unanswered = {id: n for id, n in asked.items() if answered[id] < n and id not in cancelled}
    assert unanswered == {}
    assert "Traceback" not in server.stderr.read_text()


def test_lines_of_every_bad_kind(server: Piped) -> None:
    server.begin()
    for bad, code in (
        (b"{" * 1000, -32700),
        (b"\0\0\0", -32700),
        (b"\xff\xfe\xfd", -32700),
        (b"[1,2,3]", -32600),
        (b'{"jsonrpc":"2.0","id":{},"method":"ping"}', -32600),
        (b'{"jsonrpc":"2.0","id":1e5,"method":"tools/list"}', -32600),
    ):
        before = len(server.said)
        server.send(bad)
        answer = server.waited(lambda m, b=before: "error" in m and server.said[b:])
        assert answer["id"] is None
        assert json.loads(server.said[before])["error"]["code"] == code
    # Cancelled before it was asked, after it was answered, and never asked at all.
    for id in (1, 2, 999, "x", None, [], {}):
        server.tell("notifications/cancelled", {"requestId": id})
    server.send(b"")
    server.send(b"   ")
    server.send(b"\r")
    check(server)


def test_a_line_of_33_megabytes(server: Piped) -> None:
    """It is refused, and passes without being kept."""
    server.begin()
    huge = b"x" * (33 << 20)
    server.send(b'{"jsonrpc":"2.0","id":7000,"method":"tools/list","params":{"x":"' + huge)
    error = server.waited(7000)["error"]
    assert error["code"] == -32600 and error["data"]["code"] == "too_large"
    server.send(huge)
    check(server)


def test_a_crowd_of_calls_at_once(server: Piped) -> None:
    """More than it takes on: each is answered, some as busy."""
    server.begin()
    picture = str(server.stderr.with_name("a.png"))
    ids = [server.call("ask_image", path=picture, question=f"number {n}") for n in range(100)]
    for number, id in enumerate(ids):
        result = server.waited(id)["result"]
        if result["isError"]:
            assert "requests are under way" in result["content"][0]["text"]
        else:
            assert result["structuredContent"]["answer"].startswith(f"number {number} ")
    check(server)
