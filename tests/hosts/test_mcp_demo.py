"""The real command with the demo model, driven by the official client over stdio."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp_types import TextContent
from PIL import Image, ImageDraw
from videos import encode_video

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.hosts.mcp.allowed_files import McpSettings
from mlx_onevision.plugins.hosts.mcp.server import make_server
from mlx_onevision.plugins.service.jobs import Jobs
from mlx_onevision.plugins.service.media_policy import MediaPolicy

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = EXAMPLES / "shapes.png"
CIRCLE = EXAMPLES / "circle.mp4"

Session = Callable[[Client], Coroutine[Any, Any, None]]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    album = tmp_path / "album"
    album.mkdir()
    for source in (SHAPES, CIRCLE, EXAMPLES / "square.png"):
        shutil.copy(source, album)
    return album


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, which does not know how to end an answer."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(EMBEDDED, folder)
    settings = folder / "generation_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**values, "eos_token_id": [0]}), encoding="utf-8")
    return folder


def run(session: Session, *options: str | Path, mode: Any = "auto", **how: Any) -> None:
    arguments = ["-m", "mlx_onevision", "mcp", *map(str, options)]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, cwd="/")

    async def main() -> None:
        with open("/dev/null", "w") as log:
            async with Client(stdio_client(parameters, log), mode=mode, **how) as client:
                await session(client)

    asyncio.run(main())


async def good(client: Client, name: str, **arguments: Any) -> dict[str, Any]:
    """The structure of an answer, which the client has held against the tool's schema."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error and isinstance(result.structured_content, dict), result
    return result.structured_content


async def bad(client: Client, name: str, **arguments: Any) -> str:
    result = await client.call_tool(name, arguments)
    assert result.is_error and isinstance(result.content[0], TextContent)
    return result.content[0].text


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_every_tool(mode: str, album: Path) -> None:
    shapes, circle = str(album / "shapes.png"), str(album / "circle.mp4")

    async def session(client: Client) -> None:
        assert client.protocol_version == ("2026-07-28" if mode == "auto" else "2025-11-25")
        question = "What is in the image?"
        asking = [
            good(client, "ask_image", path=shapes, question=question),
            good(client, "ask_video", path=circle, question="What happens?", num_frames=8),
            good(client, "describe_video_start", path=circle, segments=1),
        ]
        seen, moved, started = await asyncio.gather(*asking)
        assert seen["answer"] == "A red circle, a blue star and an orange triangle."
        assert seen["completion_tokens"] > 5 and seen["prompt_tokens"] > 100
        assert moved["answer"] == "A red circle moves right, and a blue square stays still."
        told = await good(client, "describe_video_status", job_id=started["job_id"], wait=40)
        assert told["status"] == "done" and len(told["segments"]) == 2 and told["summary"]
        assert "00:00:01,000 --> 00:00:02,000" in told["srt"] and told["chapters"]
        both = [shapes, str(album / "square.png")]
        said = await good(
            client, "compare_images", paths=both, question="Which image has the star?"
        )
        assert said["answer"] == "The first image has the star."
        vectors = await good(client, "embed", paths=[shapes, circle])
        assert len(vectors["vectors"]) == 2 and vectors["model"] == "demo"
        words = await good(client, "embed", texts=["a red circle"])
        assert words["space"] == "joint" and len(words["vectors"][0]) == words["dim"]
        gone = (await good(client, "describe_video_start", path=circle))["job_id"]
        assert (await good(client, "describe_video_cancel", job_id=gone))["status"] == "cancelled"

    run(session, "--allow-dir", album, mode=mode)


def test_the_right_neighbour(tmp_path: Path) -> None:
    """Of drawn images, the ones that show the same thing; of two videos, the one with it."""
    colours = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 230)}

    def drawn(colour: str, shape: str, shift: int) -> Image.Image:
        picture = Image.new("RGB", (160, 160), (245, 242, 235))
        pen = ImageDraw.Draw(picture)
        box = (30 + shift, 34, 110 + shift, 114)
        (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colours[colour])
        return picture

    for shape in ("circle", "square"):
        for colour in colours:
            drawn(colour, shape, 4).save(tmp_path / f"{colour}-{shape}.png")
    (tmp_path / "wanted.jpg").write_bytes(b"")
    drawn("blue", "circle", 12).save(tmp_path / "wanted.jpg", quality=95)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(SHAPES.read_bytes()[:300])
    import numpy as np

    frames = [np.asarray(drawn("blue", "circle", 12)) for _ in range(10)]
    (tmp_path / "film.mp4").write_bytes(encode_video(frames))

    async def session(client: Client) -> None:
        arguments = {"path": str(tmp_path / "wanted.jpg"), "folder": str(tmp_path), "k": 10}
        found = await good(client, "find_similar", **arguments)
        names = [Path(match["path"]).name for match in found["matches"]]
        assert set(names[:2]) == {"film.mp4", "blue-circle.png"} and len(names) == 7
        assert found["skipped"] == 1 and found["left"] == 0
        scores = [match["similarity"] for match in found["matches"]]
        assert scores == sorted(scores, reverse=True) and scores[0] > 0.9
        began = time.monotonic()
        assert await good(client, "find_similar", **arguments) == found
        assert time.monotonic() - began < 2

    run(session, "--allow-dir", tmp_path)


class Told:
    """The progress of a call."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.answering = asyncio.Event()

    async def note(self, progress: float, total: float | None, message: str | None) -> None:
        self.numbers.append(progress)
        if message == "answering" and progress >= 1:
            self.answering.set()


def test_a_cancelled_call_ends_the_work(album: Path, endless: Path) -> None:
    """The engine is idle within a second, and the next call is served."""
    policy = MediaPolicy(folders=[album])
    backend = open_engine(str(endless), policy=policy)

    def idle() -> bool:
        info = backend.info()
        return info.active == info.waiting == 0

    async def session(client: Client) -> None:
        arguments = {"path": str(album / "shapes.png"), "question": "Tell.", "max_tokens": 3000}
        for _ in range(5):
            told = Told()
            call = asyncio.create_task(
                client.call_tool("ask_image", arguments, progress_callback=told.note)
            )
            await asyncio.wait_for(told.answering.wait(), 40)
            assert not idle()
            assert told.numbers == sorted(set(told.numbers)) and len(told.numbers) > 2
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            began = time.monotonic()
            while not idle():
                assert time.monotonic() - began < 1
                await asyncio.sleep(0.01)
        short = {**arguments, "max_tokens": 5}
        assert (await good(client, "ask_image", **short))["finish_reason"] == "length"

    async def here() -> None:
        with Jobs(backend) as jobs:
            async with Client(make_server(backend, jobs, McpSettings(policy))) as client:
                await session(client)

    with backend:
        asyncio.run(here())


def test_cancelled_calls_leave_their_places(album: Path, endless: Path) -> None:
    """Of more calls than it takes on, each is cancelled; the next one is not refused as busy."""

    async def session(client: Client) -> None:
        arguments = {"path": str(album / "shapes.png"), "question": "Tell.", "max_tokens": 3000}
        for _ in range(20):
            told = Told()
            call = asyncio.create_task(
                client.call_tool("ask_image", arguments, progress_callback=told.note)
            )
            await asyncio.wait_for(told.answering.wait(), 40)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        short = {**arguments, "max_tokens": 5}
        assert (await good(client, "ask_image", **short))["finish_reason"] == "length"

    run(session, "--allow-dir", album, "--model", endless)


def test_long_answers_come_in_time(album: Path, endless: Path) -> None:
    async def session(client: Client) -> None:
        arguments = {"path": str(album / "shapes.png"), "question": "Tell.", "max_tokens": 4000}
        # While the model loads there is nothing to answer with, which is said, too.
        until = time.monotonic() + 60
        while (await client.call_tool("ask_image", {**arguments, "max_tokens": 1})).is_error:
            assert time.monotonic() < until
        began = time.monotonic()
        said = await good(client, "ask_image", **arguments)
        assert said["finish_reason"] == "time" and time.monotonic() - began < 4.5
        assert len(said["answer"]) > 10 and "max_tokens" in said["notes"][0]

    run(session, "--allow-dir", album, "--model", endless, "--timeout", "3")


def test_folders_are_closed_unless_they_are_opened(album: Path) -> None:
    """Whatever the host offers as its roots."""

    async def roots(context: Any) -> Any:
        raise AssertionError("the server has asked for roots")

    async def session(client: Client) -> None:
        asked = {"path": str(album / "shapes.png"), "question": "What?"}
        assert "--allow-dir" in await bad(client, "ask_image", **asked)

    run(session, list_roots_callback=roots)

    async def other(client: Client) -> None:
        asked = {"path": str(SHAPES), "question": "What?"}
        assert "is not below a folder" in await bad(client, "ask_image", **asked)
        link = album / "link.png"
        link.symlink_to(SHAPES)
        for path in (
            link,
            f"{album}/../album/shapes.png",
            "/dev/stdin",
            f"file://{album}/shapes.png",
        ):
            assert await bad(client, "ask_image", path=str(path), question="What?")

    run(other, "--allow-dir", album, list_roots_callback=roots)


def test_the_installed_command(album: Path) -> None:
    """As a host's configuration names it, in a folder and an environment of the host's."""
    command = Path(sys.executable).with_name("mlx-onevision")
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "host", "version": "1"},
        },
    }
    process = subprocess.Popen(
        [command, "mcp", "--allow-dir", album],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "HOME": str(album)},
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(hello).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert answer["result"]["protocolVersion"] == "2025-06-18"
        process.stdin.close()
        assert process.wait(5) == 0
