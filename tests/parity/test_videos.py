"""Videos and videos beside images, stage by stage, against transformers.

Most are arrays: the processor decodes files with torchcodec alone, which is not installed here.
Files go through the reader that transformers has for PyAV, with the reference's own choice of
frames.
"""

# pyright: reportMissingImports=false
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity.cases import Size, footage, picture, said
from parity.checkpoints import Tiny
from parity.compare import assert_same, assert_same_media, assert_same_tokens
from parity.oracle import Oracle
from parity.ours import Ours
from parity.pairs import Checkpoints
from transformers.video_utils import load_video
from videos import encode_video

KINDS = [Tiny(template=template) for template in ("space", "newline")]


def assert_same_videos(
    ours: Ours, oracle: Oracle, messages: list[dict], tokens: int = 32, **options: Any
) -> None:
    """Ids, pixels, packed rows of every video and image, logits, greedy tokens."""
    theirs = oracle.run_media(messages, tokens, **options)
    assert ours.model.render(messages) == oracle.render(messages)
    assert_same_media(ours, theirs, messages, **options)
    answer = ours.model.generate(messages=messages, max_tokens=tokens, **options)
    assert_same_tokens(list(answer.tokens), theirs)


@pytest.mark.parametrize("size", [(337, 511), (61, 241), (56, 56)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("frames", [1, 5, 8, 32])
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_video(checkpoints: Checkpoints, tiny: Tiny, frames: int, size: Size) -> None:
    ours, oracle = checkpoints.pair(tiny)
    assert_same_videos(ours, oracle, [said("user", footage(frames, size), "What happens?")])


CONVERSATIONS = {
    "two videos": [said("user", footage(5, (61, 241)), footage(5, (241, 61), 9), "Which?")],
    "image and video": [said("user", picture((337, 511)), footage(8, (97, 53)), "Is it there?")],
    "video before two images": [
        said("user", footage(3, (40, 70)), picture((61, 241)), picture((30, 30)), "What is it?")
    ],
    "video in the second turn": [
        said("user", picture((127, 509)), "What is this?"),
        said("assistant", "A blue square."),
        said("user", footage(4, (53, 31)), "And this?"),
    ],
    "frames as pictures": [said("user", [picture((41, 67), n) for n in range(4)], "What is it?")],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_conversation(checkpoints: Checkpoints, tiny: Tiny, name: str) -> None:
    ours, oracle = checkpoints.pair(tiny)
    assert_same_videos(ours, oracle, CONVERSATIONS[name])


@pytest.mark.parametrize("axis", ["first", "last"])
@pytest.mark.parametrize("wanted", [1, 3, 7, 8])
def test_sampling(checkpoints: Checkpoints, wanted: int, axis: str) -> None:
    """The reference's own sampling of an array, by number of frames."""
    ours, oracle = checkpoints.pair(KINDS[0])
    video = footage(8, (45, 67))
    video = video.transpose(0, 3, 1, 2) if axis == "first" else video
    assert_same_videos(ours, oracle, [said("user", video, "What?")], 4, num_frames=wanted)


@pytest.mark.parametrize("wanted", [{"num_frames": 8}, {"num_frames": 5}, {"fps": 4}], ids=str)
@pytest.mark.parametrize("kind", ["mp4", "mov"])
def test_a_file(
    checkpoints: Checkpoints, tmp_path: Path, kind: str, wanted: dict[str, Any]
) -> None:
    """The same frames of a file, decoded to the same pixels."""
    ours, oracle = checkpoints.pair(KINDS[1])
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encode_video(list(footage(53, (96, 160))), kind))
    frames, about = load_video(str(path), backend="pyav", **wanted)
    theirs = oracle.run_media([said("user", frames, "What happens?")], 32)
    messages = [{"role": "user", "content": [{"type": "video", "path": str(path), **wanted}]}]
    messages[0]["content"].append({"type": "text", "text": "What happens?"})
    (medium,) = ours.model.prepare(messages).media
    assert medium.video is not None and list(medium.video.indices) == list(about.frames_indices)
    assert_same_media(ours, theirs, messages)
    answer = ours.model.generate(messages=messages, max_tokens=32)
    assert_same_tokens(list(answer.tokens), theirs)


def test_the_comparison_would_notice(checkpoints: Checkpoints) -> None:
    """One other frame moves the logits far beyond the tolerance."""
    ours, _ = checkpoints.pair(KINDS[0])
    video = footage(8, (45, 67))
    other = video.copy()
    other[3] = np.asarray(picture((45, 67), 99))
    one, two = (
        ours.model.logits(ours.model.prepare([said("user", clip, "What?")]))
        for clip in (video, other)
    )
    assert abs(one[-1] - two[-1]).max() > 0.01


def test_text_only_after_a_video(checkpoints: Checkpoints) -> None:
    ours, oracle = checkpoints.pair(KINDS[1])
    messages = [said("user", footage(5, (61, 241)), "What happens?")]
    assert_same_videos(ours, oracle, messages, 8)
    assert_same(ours, oracle, [said("user", "And without a video?")], tokens=8)
