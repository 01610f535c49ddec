"""The MCP server's tools over the fake backend, asked in this process by the official client."""

import asyncio
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from mcp import Client, MCPError
from mcp_clients import BOTH, asked, backend_for, bad, good

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.conformance.subject import png
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.mcp.allowed_files import AllowedFiles
from mlx_onevision.plugins.interface import Channel, EmbedRequest, EmbedResult, EventStream
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits


def test_what_is_offered(album: Path) -> None:
    async def session(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert list(tools) == [
            *("ask_image", "compare_images", "ask_video", "describe_video_start"),
            *("describe_video_status", "describe_video_cancel", "embed", "find_similar"),
        ]
        for tool in tools.values():
            assert tool.description and tool.title and tool.output_schema and tool.annotations
            assert tool.annotations.open_world_hint is False
            assert tool.annotations.read_only_hint is (tool.name != "describe_video_cancel")
            assert tool.input_schema["additionalProperties"] is False
            for field in tool.input_schema["properties"].values():
                assert "description" in str(field), field
        for name in ("ask_image", "compare_images", "ask_video", "describe_video_status"):
            assert "untrusted" in (tools[name].description or "")
        assert client.instructions and str(album) in client.instructions
        with pytest.raises(MCPError, match="ask_image"):
            await client.call_tool("nothing", {})

    asked(backend_for(album), session, BOTH)


def test_images_and_videos_are_asked_about(album: Path) -> None:
    async def session(client: Client) -> None:
        one, video = str(album / "a.png"), str(album / "film.mp4")
        said = await good(client, "ask_image", path=one, question="What is it?")
        assert said["answer"] == "What is it? [1 image][0 videos]"
        assert said["finish_reason"] == "stop" and "untrusted" in said["caution"]
        said = await good(client, "ask_image", path=one, question="a b c", max_tokens="2")
        assert (said["answer"], said["finish_reason"]) == ("a b ", "length")
        both = [one, str(album / "inner/c.png")]
        said = await good(client, "compare_images", paths=both, question="Which?")
        assert said["answer"] == "Which? [2 images][0 videos]"
        part = {"start": 1, "end": 1.5, "num_frames": 4}
        said = await good(client, "ask_video", path=video, question="Who?", **part)
        assert said["answer"] == "Who? [0 images][1 video]"

    asked(backend_for(album), session, BOTH)


def test_a_long_video_is_described_while_others_ask(album: Path) -> None:
    async def session(client: Client) -> None:
        video = str(album / "film.mp4")
        job = (await good(client, "describe_video_start", path=video, segments=10))["job_id"]
        one = str(album / "a.png")
        first = await good(client, "describe_video_status", job_id=job, wait=0)
        assert first["status"] in ("queued", "running") and "srt" not in first
        assert await good(client, "ask_image", path=one, question="What?")
        told = await good(client, "describe_video_status", job_id=job, wait=30)
        assert told["status"] == "done" and told["summary"] == "A video of 3 parts."
        assert told["srt"].startswith("1\n00:00:00,000 --> 00:00:10,000\nThis is part 1.\n")
        assert [s["start"] for s in told["segments"]] == [0, 10, 20] and not told["more"]
        assert told["chapters"] == [{"start": 0, "title": "All of it"}]
        rest = {"first_segment": 2, "srt": False}
        less = await good(client, "describe_video_status", job_id=job, **rest)
        assert [s["start"] for s in less["segments"]] == [20] and "srt" not in less
        again = (await good(client, "describe_video_start", path=video))["job_id"]
        ended = await good(client, "describe_video_cancel", job_id=again)
        assert ended == {"job_id": again, "status": "cancelled"}
        assert "no such job" in await bad(client, "describe_video_status", job_id="x")

    asked(backend_for(album, delay=0.05), session)


def test_vectors(album: Path) -> None:
    async def session(client: Client) -> None:
        paths = [str(album / name) for name in ("a.png", "film.mp4", "film.mp4", "twin.png")]
        made = await good(client, "embed", paths=paths)
        assert (made["space"], made["dim"]) == ("vision", 16)
        one, video, same_video, twin = made["vectors"]
        assert one == twin != video == same_video and len(one) == 16
        texts = await good(client, "embed", texts=["a", "b"])
        assert texts["space"] == "joint" and len(texts["vectors"]) == 2
        for wrong in ({}, {"texts": []}, {"paths": paths, "texts": ["a"]}):
            assert "either" in await bad(client, "embed", **wrong)
        assert "no place" in await bad(client, "embed", texts=["a"], space="vision")

    asked(backend_for(album), session)


def test_what_looks_alike(album: Path) -> None:
    backend = backend_for(album)
    (album / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")

    async def session(client: Client) -> None:
        one = str(album / "a.png")
        found = await good(client, "find_similar", path=one, folder=str(album), k=2)
        assert Path(found["matches"][0]["path"]).name == "twin.png"
        assert found["matches"][0]["similarity"] == 1 and len(found["matches"]) == 2
        # b, twin, video, broken: to the fake what begins as an image is one. No links, no pipe.
        assert (found["compared"], found["skipped"], found["left"]) == (4, 0, 0)
        steps = backend.steps
        wide = {"folder": str(album), "recursive": True}
        found = await good(client, "find_similar", path=one, **wide)
        assert found["compared"] == 5 and backend.steps <= steps + 1  # only c.png is new
        inner = await good(client, "find_similar", path=one, folder=f"{album}/inner/")
        assert [Path(match["path"]).name for match in inner["matches"]] == ["c.png"]
        (album / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nother")
        await good(client, "find_similar", path=one, folder=str(album))
        assert backend.steps == steps + 2
        (album / "b.png").write_bytes(png(8, 8, (1, 2, 3)))

    async def once(client: Client) -> None:
        for folder in (album / "away", album.parent, album / "nothing", album / "a.png"):
            assert await bad(client, "find_similar", path=str(album / "a.png"), folder=str(folder))
        words = str(album / "words.txt")
        assert "neither" in await bad(client, "find_similar", path=words, folder=str(album))
        await session(client)

    asked(backend, once)


class Picky(FakeBackend):
    """It cannot read files of one name."""

    def stream_embed(self, request: EmbedRequest) -> EventStream[EmbedResult]:
        if all(Path(medium.path or "").name != "broken.png" for medium in request.media):
            return super().stream_embed(request)
        channel = Channel()
        channel.fail(PluginError("unsupported_media", "it is broken"))
        return channel.stream()


def test_files_that_cannot_be_embedded_are_counted(album: Path) -> None:
    shutil.copy(album / "b.png", album / "d.png")
    for name in ("broken.png", "large.png"):
        (album / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    os.truncate(album / "large.png", 40 << 20)
    if sys.platform != "darwin":  # where every name is text
        (album / os.fsdecode(b"\xff.png")).write_bytes(png(8, 8, (7, 7, 7)))

    async def session(client: Client) -> None:
        one = str(album / "a.png")
        found = await good(client, "find_similar", path=one, folder=str(album))
        names = {Path(match["path"]).name for match in found["matches"]}
        assert names == {"b.png", "d.png", "twin.png", "film.mp4"}
        assert (found["compared"], found["skipped"], found["left"]) == (4, 2, 0)
        broken = str(album / "broken.png")
        assert "cannot be read" in await bad(client, "find_similar", path=broken, folder=str(album))

    asked(Picky(policy=MediaPolicy(folders=[album])), session)


def test_the_wrong_tool_for_a_file(album: Path) -> None:
    async def session(client: Client) -> None:
        video, one = str(album / "film.mp4"), str(album / "a.png")
        assert "use ask_video" in await bad(client, "ask_image", path=video, question="What?")
        assert "use ask_image" in await bad(client, "ask_video", path=one, question="What?")
        many = {"path": one, "question": "What?", "max_tokens": 5000}
        shutil.copy(one, album / "named.mp4")  # what it is, its bytes say
        assert await good(client, "ask_image", path=str(album / "named.mp4"), question="What?")
        assert "4096 are allowed" in await bad(client, "ask_image", **many)
        later = {"path": video, "question": "What?", "start": 5, "end": 2}
        assert "not after start" in await bad(client, "ask_video", **later)

    asked(backend_for(album), session)


def test_a_small_limit_is_the_default_too(album: Path) -> None:
    """Of an answer, and of a description, whose tool has no max_tokens."""
    policy, limits = MediaPolicy(folders=[album]), Limits(max_tokens=100)

    async def session(client: Client) -> None:
        one, video = str(album / "a.png"), str(album / "film.mp4")
        long = {"path": one, "question": "word " * 200}
        for default in ({}, {"max_tokens": 256}):  # some clients send a schema's defaults
            said = await good(client, "ask_image", **long, **default)
            assert said["finish_reason"] == "length" and said["completion_tokens"] == 100
        assert "100 are allowed" in await bad(client, "ask_image", **long, max_tokens=257)
        job = (await good(client, "describe_video_start", path=video, segments=10))["job_id"]
        told = await good(client, "describe_video_status", job_id=job, wait=30)
        assert told["status"] == "done"

    asked(FakeBackend(policy=policy, limits=limits), session, max_tokens=100)


def test_a_file_is_not_similar_to_itself(album: Path) -> None:
    (album.parent / "alias").symlink_to(album)
    policy = MediaPolicy(folders=[album, album.parent / "alias"])

    async def session(client: Client) -> None:
        for path, folder in (
            (f"{album}/./a.png", f"{album}"),
            (f"{album}/a.png", f"{album}/."),
            (f"{album}/a.png", f"{album.parent}/alias"),
        ):
            found = await good(client, "find_similar", path=path, folder=folder)
            names = {Path(match["path"]).name for match in found["matches"]}
            assert names == {"b.png", "twin.png", "film.mp4"}, (path, folder)

    asked(FakeBackend(policy=policy), session)


def test_no_tool_waits_for_a_disk_where_others_are_answered(
    album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    path = AllowedFiles.path

    def noted(files: AllowedFiles, given: str) -> str:
        threads.append(threading.current_thread())
        return path(files, given)

    monkeypatch.setattr(AllowedFiles, "path", noted)

    async def session(client: Client) -> None:
        one, video = str(album / "a.png"), str(album / "film.mp4")
        await good(client, "ask_image", path=one, question="What?")
        await good(client, "describe_video_start", path=video)
        await good(client, "embed", paths=[one])
        await good(client, "find_similar", path=one, folder=str(album))
        assert len(threads) == 4 and threading.current_thread() not in threads

    asked(backend_for(album), session)


def test_progress_rises(album: Path) -> None:
    async def session(client: Client) -> None:
        told: list[tuple[float, str | None]] = []

        async def note(progress: float, total: float | None, message: str | None) -> None:
            told.append((progress, message))

        arguments = {"path": str(album / "a.png"), "question": "one two three four"}
        await client.call_tool("ask_image", arguments, progress_callback=note)
        numbers = [progress for progress, _ in told]
        assert numbers == sorted(set(numbers)) and len(numbers) >= 4
        assert [said for _, said in told][-1] == "answering"
        assert {"waiting in line", "reading the file"} <= {said for _, said in told}

    asked(backend_for(album, delay=0.06), session)


def test_the_time_of_a_call_is_kept(album: Path) -> None:
    """Whatever is asked, within the time there is an answer, or what to do instead."""
    one, video = str(album / "a.png"), str(album / "film.mp4")

    async def session(client: Client) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        long = {"path": one, "question": "word " * 100}
        said = await good(client, "ask_image", **long)
        assert said["finish_reason"] == "time" and said["answer"].startswith("word ")
        assert "0.25 s" in said["notes"][0] and loop.time() - began < 0.75
        asking = [
            bad(client, "embed", paths=[one] * 10),
            good(client, "describe_video_start", path=video, segments=0.1),
            good(client, "ask_video", path=video, question="word " * 100),
        ]
        late, started, video_said = await asyncio.gather(*asking)
        assert "no answer after 0.25 s" in str(late)
        assert "num_frames" in video_said["notes"][0]
        job = started["job_id"]
        told = await good(client, "describe_video_status", job_id=job, wait=40)
        assert told["status"] == "running" and loop.time() - began < 4
        await good(client, "describe_video_cancel", job_id=job)

    asked(backend_for(album, delay=0.05), session, timeout=0.25)


def test_a_search_goes_on_where_it_was(album: Path) -> None:
    for number in range(40):
        (album / f"more{number:02}.png").write_bytes(png(8, 8, (50 + number, 0, 0)))
    backend = backend_for(album, delay=0.01)

    async def session(client: Client) -> None:
        arguments = {"path": str(album / "a.png"), "folder": str(album), "k": 100}
        found = await good(client, "find_similar", **arguments)
        left = [found["left"]]
        while left[-1]:
            found = await good(client, "find_similar", **arguments)
            left.append(found["left"])
            assert left[-1] <= left[-2] and len(left) < 40
        assert len(left) > 1 and found["compared"] == 43

    asked(backend, session, timeout=0.25)


@pytest.mark.parametrize("error", [PluginError("busy", "too many", "wait"), ValueError("/secret")])
def test_what_fails_inside_is_said_in_a_sentence(album: Path, error: Exception) -> None:
    async def session(client: Client) -> None:
        text = await bad(client, "ask_image", path=str(album / "a.png"), question="What?")
        assert "secret" not in text
        text = await bad(client, "find_similar", path=str(album / "a.png"), folder=str(album))
        assert "secret" not in text

    asked(backend_for(album, fail_at=0, error=error), session)
