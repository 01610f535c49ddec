"""Every way to write a conversation, and what is refused."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_onevision.errors import MediaError, OneVisionError, RequestError
from mlx_onevision.prompt.messages import normalise_messages, sources


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(source: object) -> dict[str, Any]:
    return {"type": "image", "image": source}


def user(*blocks: object) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


BARE = {"type": "image"}


def test_a_prompt_is_one_user_turn() -> None:
    assert normalise_messages("Hi <image>") == [user(text("Hi <image>"))]


def test_a_plain_string_is_text() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert normalise_messages(messages=messages) == [
        {"role": "system", "content": [text("S")]},
        user(text("Q")),
    ]


def test_the_system_message_comes_first() -> None:
    assert normalise_messages("Q", system="S")[0] == {"role": "system", "content": [text("S")]}


def test_images_of_a_prompt_stand_before_its_words() -> None:
    expected = [user(image("a"), image("b"), text("Q"))]
    assert normalise_messages("Q", images=["a", "b"]) == expected


def test_images_fill_the_blocks_that_wait_for_them() -> None:
    messages = [user(BARE, text("1")), user(text("2"), {"type": "image", "image": None})]
    expected = [user(image("a"), text("1")), user(text("2"), image("b"))]
    assert normalise_messages(messages=messages, images=["a", "b"]) == expected


def test_images_without_a_block_go_to_the_first_user_turn() -> None:
    messages = [{"role": "system", "content": "S"}, user(image("own"), text("Q")), user(text("R"))]
    conversation = normalise_messages(messages=messages, images=iter(["a"]))
    assert conversation[1] == user(image("a"), image("own"), text("Q"))
    assert sources(conversation, "image") == ["a", "own"]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_every_key_of_the_reference_names_a_source(kind: str) -> None:
    for key in (kind, "url", "path"):
        given, expected = {"type": kind, key: "x"}, {"type": kind, kind: "x"}
        assert normalise_messages(messages=[user(given)]) == [user(expected)]
        assert normalise_messages(messages=[user({**given, "base64": None})]) == [user(expected)]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_openai_blocks_are_media(kind: str) -> None:
    expected = {"type": kind, kind: "http://x/y"}
    for address in ("http://x/y", {"url": "http://x/y", "detail": "low"}):
        block = {"type": f"{kind}_url", f"{kind}_url": address}
        assert normalise_messages(messages=[user(block)]) == [user(expected)]
        assert normalise_messages(messages=[user({**block, "detail": "low"})]) == [user(expected)]
        with pytest.raises(RequestError, match="url and path"):
            normalise_messages(messages=[user({**block, "path": "x"})])


def test_a_video_url_may_say_which_frames() -> None:
    block = {"type": "video_url", "video_url": {"url": "v"}, "fps": 2}
    expected = {"type": "video", "video": "v", "fps": 2}
    assert normalise_messages(messages=[user(block)]) == [user(expected)]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "DATA:;base64,"])
def test_base64_is_decoded(head: str, kind: str) -> None:
    encoded = base64.b64encode(b"pixels!").decode()
    data = f"{head}{encoded[:4]}\n {encoded[4:]}\n"
    expected = {"type": kind, kind: b"pixels!"}
    assert normalise_messages(messages=[user({"type": kind, "base64": data})]) == [user(expected)]


def test_one_form_comes_back_equal_and_the_callers_is_left_alone() -> None:
    block = {"type": "image", "path": "x"}
    messages = [user(block, text("Q")), {"role": "assistant", "content": "A", "tool_calls": None}]
    once = normalise_messages(messages=messages)
    assert normalise_messages(messages=once) == once
    assert messages[0] == user({"type": "image", "path": "x"}, text("Q"))
    normalise_messages(messages=once, images=["y"])
    assert len(once[0]["content"]) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "either a prompt or messages"),
        ({"prompt": "Q", "messages": [user(text("Q"))]}, "either"),
        ({"prompt": ""}, "empty"),
        ({"prompt": " \n"}, "empty"),
        ({"prompt": "", "images": ["a"]}, "empty"),
        ({"prompt": 3}, "int"),
        ({"prompt": "\udcff"}, "surrogate"),
        ({"messages": []}, "empty"),
        ({"messages": [user()]}, "empty"),
        ({"messages": [user(text(" "))]}, "empty"),
        ({"messages": "Q"}, "list"),
        ({"messages": {"role": "user"}}, "list"),
        ({"messages": ["Q"]}, "message 1"),
        ({"messages": [{"content": "Q"}]}, "no role"),
        ({"messages": [{"role": "user", "content": None}]}, "no content"),
        ({"messages": [user(text("Q")), {"role": "tool", "content": "x"}]}, "message 2.*'tool'"),
        ({"messages": [{"role": "user", "content": "Q", "name": "Ann"}]}, "'name'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 1"),
        ({"messages": [user("Q")]}, "with a type"),
        ({"messages": [user({"text": "Q"})]}, "with a type"),
        ({"messages": [user({"type": "audio", "audio": "a"})]}, "'audio'"),
        ({"messages": [user({"type": "text"})]}, "text"),
        ({"messages": [user({"type": "text", "text": 3})]}, "int"),
        ({"messages": [user({"type": "text", "text": "Q", "cache": 1})]}, "'cache'"),
        ({"messages": [user({"type": "image", "file": "a"})]}, "'file'"),
        ({"messages": [user({"type": "image", "url": "a", "path": "b"})]}, "url and path"),
        ({"messages": [user({"type": "image_url", "image_url": {}})]}, "no url in its image_url"),
        ({"messages": [user({"type": "video_url", "video_url": 3})]}, "no url in its video_url"),
        ({"messages": [user({"type": "image_url", "image_url": "a", "id": 1})]}, "'id'"),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "a"}, "url": "b"})]},
            "two sources: image_url and url",
        ),
        ({"messages": [user({"type": "image", "base64": 3})]}, "base64"),
        ({"messages": [user(BARE, BARE, text("Q"))], "images": ["a"]}, "2 image.*1 image"),
        ({"messages": [user(BARE, text("Q"))]}, "1 image.*0 image"),
        ({"messages": [user({"type": "video"}, text("Q"))]}, "1 video.*0 video"),
        ({"messages": [{"role": "system", "content": "S"}], "images": ["a"]}, "user message"),
        ({"messages": [{"role": "system", "content": "S"}], "system": "T"}, "two system"),
        ({"prompt": "Q", "system": 3}, "system"),
        ({"prompt": "Q", "images": "a.png"}, "list of images"),
        ({"prompt": "Q", "images": Path("a.png")}, "list of images"),
        ({"prompt": "Q", "images": np.zeros((2, 2, 3))}, "list of images"),
        ({"prompt": "Q", "images": 3}, "list of images"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        normalise_messages(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_base64_is_the_images_fault() -> None:
    with pytest.raises(MediaError, match="message 1"):
        normalise_messages(messages=[user({"type": "image", "base64": "a!b"})])


@pytest.mark.parametrize("junk", [None, 0, "", b"x", [], {}, [[]], [None], [{}], object()])
def test_junk_never_ends_in_anything_but_our_own_error(junk: Any) -> None:
    blocks = (
        {"type": junk},
        {"type": "text", "text": junk},
        {"type": "image_url", "image_url": junk},
        {"type": "video_url", "video_url": junk},
    )
    messages = (junk, [junk], [{"role": junk, "content": junk}], [user(junk)])
    for given in (*messages, *([user(block)] for block in blocks)):
        with pytest.raises(OneVisionError):
            normalise_messages(messages=given)


def test_videos_stand_behind_images() -> None:
    conversation = normalise_messages("Q", images=["a"], videos=["v", "w"])
    expected = [{"type": "video", "video": name} for name in ("v", "w")]
    assert conversation == [user(image("a"), *expected, text("Q"))]


def test_a_video_block_may_say_which_frames() -> None:
    block = {"type": "video", "path": "v", "num_frames": 4, "start": 1, "fps": None}
    expected = {"type": "video", "video": "v", "num_frames": 4, "start": 1}
    assert normalise_messages(messages=[user(block)]) == [user(expected)]
    with pytest.raises(RequestError, match="num_frames"):
        normalise_messages(messages=[user({**block, "num_frames": 0})])
    with pytest.raises(RequestError, match="num_frames"):
        normalise_messages(messages=[user({"type": "image", "path": "v", "num_frames": 4})])


def test_videos_and_blocks_must_match() -> None:
    with pytest.raises(RequestError, match=r"1 video block\(s\).* 2 video\(s\)"):
        normalise_messages(messages=[user({"type": "video"})], videos=["a", "b"])
    with pytest.raises(RequestError, match="videos is one str"):
        normalise_messages("Q", videos="a.mp4")
