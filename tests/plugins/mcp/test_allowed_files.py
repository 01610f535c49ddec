"""Which files tools may read, and which not; which arguments they refuse."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile.addresses import Watch, corpus
from mcp import Client
from mcp_clients import asked, backend_for, bad

from mlx_onevision.plugins.conformance.subject import png
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.mcp.allowed_files import AllowedFiles
from mlx_onevision.plugins.service.media_policy import MediaPolicy


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{out}/secret.png", "--allow-dir"),
        ("{in}/../secret.png", "--allow-dir"),
        ("{in}-2/a.png", "--allow-dir"),
        ("/etc/passwd", "--allow-dir"),
        ("/dev/zero", "--allow-dir"),
        ("/dev/stdin", "--allow-dir"),
        ("//etc/passwd", "--allow-dir"),
        ("{in}", "is a folder"),
        ("{in}/", "is a folder"),
        ("{in}/inner", "it is a folder"),
        ("{in}/link.png", "link"),
        ("{in}/away/secret.png", "link"),
        ("{in}/pipe.png", "no ordinary file"),
        ("{in}/nothing.png", "no such file"),
        ("{in}/\0.png", "NUL"),
        ("a.png", "absolute"),
        ("../album/a.png", "absolute"),
        ("file://{in}/a.png", "address"),
        ("http://127.0.0.1:9/a.png", "address"),
        ("concat:{in}/a.png", "address"),
        ("data:image/png;base64,AAAA", "address"),
        ("~/a.png", "--allow-dir"),
        ("~root/a.png", "absolute"),
        ("-", "absolute"),
    ],
)
def test_nothing_else_is_read(album: Path, path: str, said: str) -> None:
    path = path.replace("{in}", str(album)).replace("{out}", str(album.parent))
    opened = watched()

    async def session(client: Client) -> None:
        for name in ("ask_image", "ask_video"):
            assert said in await bad(client, name, path=path, question="What?")
        good_one = str(album / "a.png")
        both = {"paths": [good_one, path], "question": "Which?"}
        assert said in await bad(client, "compare_images", **both)
        assert said in await bad(client, "embed", paths=[path])
        assert said in await bad(client, "describe_video_start", path=path)
        assert await bad(client, "find_similar", path=path, folder=str(album))

    asked(backend_for(album), session)
    secret = os.path.realpath(album.parent / "secret.png")
    assert not [one for one in opened if one in ("/etc/passwd", "/dev/zero", secret)]


def test_nothing_of_the_corpus_is_read_or_reached(album: Path) -> None:
    watch = Watch()

    async def session(client: Client) -> None:
        await bad(client, "ask_image", path="a.png", question="What?")  # imports
        for path in corpus(9, album):
            with watch.watching() as events:
                for tool in ("ask_image", "ask_video"):
                    await bad(client, tool, path=path, question="What?")
                await bad(client, "embed", paths=[path])
                await bad(client, "describe_video_start", path=path)
                await bad(client, "find_similar", path=path, folder=str(album))
            # The folders on the way to a link may be opened, and what is refused there.
            assert not [
                event for event in events if not event.startswith(f"open {str(album)!r}"[:-1])
            ]

    asked(backend_for(album), session)


_opened: list[list[str]] = []


def watched() -> list[str]:
    """Every path that this process opens from now on."""
    if not _opened:
        sys.addaudithook(
            lambda event, a: _opened[-1].append(str(a[0])) if event == "open" else None
        )
    _opened.append([])
    return _opened[-1]


def test_without_a_folder_the_option_is_named(album: Path) -> None:
    async def session(client: Client) -> None:
        path = str(album / "a.png")
        for name, more in (
            ("ask_image", {"question": "What?"}),
            ("describe_video_start", {}),
            ("find_similar", {"folder": str(album)}),
        ):
            assert "no folder is open" in await bad(client, name, path=path, **more)
            assert "--allow-dir" in await bad(client, name, path=path, **more)
        assert client.instructions and "--allow-dir" in client.instructions

    asked(backend_for(None), session)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("ask_image", {}, "path"),
        ("ask_image", {"path": "/x", "question": ""}, "question"),
        ("ask_image", {"path": 5, "question": "What?"}, "path"),
        ("ask_image", {"path": "/x", "question": "What?", "max_tokens": 0}, "max_tokens"),
        ("ask_image", {"path": "/x", "question": "What?", "tokens": 5}, "'tokens'"),
        ("compare_images", {"paths": ["/x"], "question": "What?"}, "paths"),
        ("compare_images", {"paths": ["/x"] * 17, "question": "What?"}, "paths"),
        ("compare_images", {"paths": ["/x", None], "question": "What?"}, "paths[1]"),
        ("ask_video", {"path": "/x", "question": "What?", "start": -1}, "start"),
        ("ask_video", {"path": "/x", "question": "What?", "end": "later"}, "end"),
        ("describe_video_start", {"path": "/x", "segments": 0}, "segments"),
        ("describe_video_start", {"path": "/x", "segments": "words"}, "segments"),
        ("describe_video_status", {"job_id": "x", "wait": 100}, "wait"),
        ("find_similar", {"path": "/x", "folder": "/y", "k": 1000}, "k"),
        ("embed", {"texts": ["a"], "space": "sound"}, "space"),
    ],
)
def test_wrong_arguments_are_named(name: str, arguments: dict[str, Any], said: str) -> None:
    async def session(client: Client) -> None:
        text = await bad(client, name, **arguments)
        assert text.startswith(said) or f"argument {said}" in text

    asked(backend_for(None), session)


def test_a_name_that_looks_the_same_is_found_below_the_allowed_folders_only(tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "Shot 3.07\u202fPM.png").write_bytes(png(8, 8, (1, 2, 3)))
    files = AllowedFiles(MediaPolicy(folders=(allowed,)))
    assert files.path(f"{allowed}/Shot 3.07 PM.png") == f"{allowed}/Shot 3.07\u202fPM.png"
    assert files.medium(f"{allowed}/Shot 3.07 PM.png").path == f"{allowed}/Shot 3.07\u202fPM.png"
    with pytest.raises(PluginError, match="is not below a folder that is open"):
        files.path(f"{other}/Shot 3.07 PM.png")
