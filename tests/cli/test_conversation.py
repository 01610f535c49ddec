"""A conversation: what it remembers, and what it computes again."""

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

import pytest
from images import picture_file
from videos import counting, written

from mlx_onevision.api import Model, load
from mlx_onevision.cli.conversation import Conversation
from mlx_onevision.cli.paths import parse_path
from mlx_onevision.engine.generation import Generation
from mlx_onevision.engine.options import Options
from mlx_onevision.errors import MediaError, RequestError

LONG = "one two three four five six seven eight nine ten " * 4


def quiet(_: str) -> None: ...


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two prompts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), len(first))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_second_turn_reads_only_what_is_new(folder: Path, tmp_path: Path, kind: str) -> None:
    model = load(folder)
    talk = Conversation(model, max_tokens=8, num_frames=6)
    gone = tmp_path / "gone"
    picture_file(gone.with_suffix(".png"), 3).rename(gone)
    if kind == "video":
        gone.write_bytes(counting(24))
    talk.attach(kind, str(gone))
    gone.unlink()  # it has been read
    read: list[list[int]] = []
    for words in (LONG, "and now", "and then"):
        usage = talk.say(words, quiet).usage
        prompt = model.prepare(talk.messages[:-1]).input_ids.tolist()
        known = max((shared(ids, prompt) for ids in read), default=0)
        assert usage.prompt_tokens == len(prompt) and usage.cached_tokens == known
        assert usage.encoded_media == (not read)
        assert (
            not read or known >= len(read[-1]) - 5
        )  # the template ends an answered turn otherwise
        read.append(prompt)
    model.close()


def test_another_picture_of_the_same_size_gets_the_cold_answer(
    folder: Path, model: Model, pictures: tuple[Path, Path]
) -> None:
    talk = Conversation(model, max_tokens=12)
    answers: list[Generation] = []
    for picture in pictures:
        talk.reset()
        talk.attach("image", str(picture))
        answers.append(talk.say("what is in this image", quiet))
    assert answers[1].usage.encoded_media == 1
    for picture, answer in zip(pictures, answers, strict=True):
        cold = load(folder)
        expected = cold.generate("what is in this image", images=[picture], max_tokens=12)
        cold.close()
        assert answer.tokens == expected.tokens
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_what_was_said_is_what_the_library_is_asked(
    model: Model, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    options: Options = {"max_tokens": 6, "system": "be brief", "temperature": 1.5, "seed": 4}
    talk = Conversation(model, **options)
    talk.attach("image", str(pictures[0]))
    talk.say("what is it", quiet)
    talk.attach("image", str(pictures[1]))
    talk.say("and this", quiet)
    talk.save(tmp_path / "talk.json")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"][0] == {"type": "image", "path": str(pictures[1])}
    asked = model.generate(messages=messages[:3], **options)
    assert asked.text == messages[3]["content"][0]["text"]


def test_an_image_in_the_home_folder_or_in_an_address(
    model: Model, pictures: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = pictures[0]
    monkeypatch.setenv("HOME", str(picture.parent))
    data = f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
    expected = model.generate("what is it", images=[picture], max_tokens=6)
    for source, kept in (
        (f"~/{picture.name}", {"path": str(picture)}),
        (parse_path(data), {"url": data}),
    ):
        talk = Conversation(model, max_tokens=6)
        assert len(talk.attach("image", source)) < 200
        assert talk.say("what is it", quiet).tokens == expected.tokens
        assert talk.record[0]["content"][0] == {"type": "image", **kept}
        again = model.generate(messages=talk.record[:1], max_tokens=6)
        assert again.tokens == expected.tokens


def test_a_video_is_read_once_as_it_was_asked_for(model: Model, tmp_path: Path) -> None:
    video = written(tmp_path / "film.mp4", counting(50))  # two seconds
    talk = Conversation(model, max_tokens=6, fps=4, start=0.5)
    assert talk.attach("video", str(video)) == f"6 frames of {video}, from 0.5 to 1.7 s"
    video.rename(tmp_path / "moved.mp4")
    answer = talk.say("what moves", quiet)
    (tmp_path / "moved.mp4").rename(video)
    assert answer.usage.media_tokens == 6 * 1 + 1 and answer.usage.encoded_media == 1
    asked = model.generate("what moves", videos=[video], max_tokens=6, fps=4, start=0.5)
    assert asked.tokens == answer.tokens
    # What is saved says which frames it was.
    talk = Conversation(model, max_tokens=6)
    assert talk.attach("video", str(video)).startswith("32 frames of ")
    answer = talk.say("what moves", quiet)
    block = talk.record[0]["content"][0]
    assert block == {"type": "video", "path": str(video), "num_frames": 32}
    assert model.generate(messages=talk.record[:1], max_tokens=6).tokens == answer.tokens
    with pytest.raises(RequestError, match="not both"):
        Conversation(model, num_frames=3, fps=1)


def test_a_failure_leaves_the_conversation_as_it_was(
    model: Model, pictures: tuple[Path, Path]
) -> None:
    talk = Conversation(model, max_tokens=4)
    with pytest.raises(MediaError):
        talk.attach("image", "no/such/file.png")
    talk.attach("image", str(pictures[0]))
    with pytest.raises(RequestError):
        talk.say("\ud800", quiet)
    assert talk.messages == talk.record == []
    assert talk.say("what is it", quiet).usage.media_tokens > 0  # it is still attached
