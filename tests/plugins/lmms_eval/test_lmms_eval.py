"""What the adapter of lmms-eval makes of a task, without lmms-eval: prompts, settings, likelihoods.
tests/parity/test_lmms_eval.py holds it against the real one.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write
from PIL import Image

from mlx_onevision.api import load
from mlx_onevision.errors import RequestError
from mlx_onevision.plugins.hosts.lmms_eval.prompts import (
    CHAT_TEMPLATE,
    Visuals,
    answer_loss,
    answered,
    conversation,
    options,
    shown,
    unknown,
)
from mlx_onevision.prompt.chat_template import ChatTemplate

CIRCLE = Path(__file__).parents[3] / "examples/circle.mp4"
WIDE, TALL = Image.new("RGB", (80, 40), "red"), Image.new("RGB", (40, 80), "blue")
BEGIN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"


def rendered(context: str, about: Visuals) -> str:
    return ChatTemplate(CHAT_TEMPLATE).render(conversation(context, about))


@pytest.mark.parametrize(
    ("context", "visuals", "said"),
    [
        ("What?", None, "What?"),
        ("What?", [], "What?"),
        ("What?", [WIDE], "<image>\nWhat?"),
        ("What?", [WIDE, TALL, WIDE], "<image> <image> <image>\nWhat?"),
        ("Is <image> or <image> red?", [WIDE, TALL], "Is <image> or <image> red?"),
        ("What?", ["a.mp4", "b.srt"], "<video>\nWhat?"),
        ("Of <image>: what?", ["a.mp4"], "Of <video>: what?"),
        ("What is <image>?", None, "What is <image>?"),
        ("7", None, "7"),
        ('["a"]', None, '["a"]'),
    ],
)
def test_prompts(context: str, visuals: Any, said: str) -> None:
    assert rendered(context, shown(visuals, {})) == BEGIN + said + END


def test_a_conversation_as_json() -> None:
    turns = [{"from": "human", "value": "Is <image> red?"}, {"value": "Yes."}, {"value": "Really?"}]
    about = shown([WIDE], {})
    assert rendered(json.dumps(turns), about) == (
        BEGIN + "Is <image> red?" + END + "Yes.<|im_end|>\n<|im_start|>user\nReally?" + END
    )
    with pytest.raises(RequestError, match="2 turns does not end with a question"):
        conversation(json.dumps(turns[:2]), about)
    # With its marks in front it is no JSON any more; so it is in the reference.
    assert rendered('[{"value": "Red?"}]', about) == f'{BEGIN}<image>\n[{{"value": "Red?"}}]{END}'


def test_one_image_is_tiled_and_several_are_not() -> None:
    assert [shown([WIDE] * n, {}).tiling for n in (1, 2, 3)] == ["always", "never", "never"]


def test_marks_and_images_that_do_not_match() -> None:
    """The last one again for marks too many; images too many are left out."""

    def pictures(context: str, *visuals: Image.Image) -> list[Any]:
        (turn,) = conversation(context, shown(visuals, {}))
        return [block["image"] for block in turn["content"] if block["type"] == "image"]

    assert pictures("<image> <image> <image>", WIDE, TALL) == [WIDE, TALL, TALL]
    assert pictures("<image>", WIDE, TALL) == [WIDE]


def test_images_that_are_a_video() -> None:
    frames = [Image.new("RGB", (20, 10), (n, n, n)) for n in range(9)]
    about = shown(frames, {"task_type": "video", "sample_frames": 3})
    ((block),) = about.blocks
    assert [frame.size for frame in block["video"]] == [(20, 20)] * 3
    assert [frame.getpixel((10, 10)) for frame in block["video"]] == [(n, n, n) for n in (0, 4, 8)]
    assert block["video"][2].getpixel((10, 1)) == (127, 127, 127)
    assert rendered("What?", about) == f"{BEGIN}<video>\nWhat?{END}"


def test_what_is_neither_image_nor_path_is_refused() -> None:
    for visuals in ([{"array": [0.0]}], [WIDE, "a.mp4"], "a.mp4", [None]):
        with pytest.raises(RequestError):
            shown(visuals, {})


def test_settings() -> None:
    greedy = {"max_tokens": 1024, "temperature": 0.0}
    assert options({}, until=False) == greedy
    given = {
        "until": ["\n\n"],
        "do_sample": False,
        "temperature": 0.7,
        "top_p": 0.5,
        "num_beams": 1,
    }
    assert options(given, until=False) == greedy
    assert options(given, until=True) == {**greedy, "stop": ("\n\n",)}
    assert options({"until": "x"}, until=True) == {**greedy, "stop": ("x",)}
    sampled = {**given, "do_sample": True, "max_new_tokens": 16, "top_k": 5}
    wanted = {"max_tokens": 16, "temperature": 0.7, "top_p": 0.5, "top_k": 5}
    assert options(sampled, until=False) == wanted
    own = {"max_tokens": 1024, "temperature": None}  # the checkpoint's
    assert options({"do_sample": True, "top_p": None}, until=False) == own
    with pytest.raises(RequestError, match="num_beams=5"):
        options({"num_beams": 5}, until=False)
    assert unknown({**sampled, "image_aspect_ratio": "pad", "frames": 3}) == ["frames"]


def test_likelihood() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.5, 0.25]])
    logits = np.log(probabilities) + np.array([[5.0], [-700.0], [900.0]])
    measured = answer_loss(logits, np.array([0, 1, 2]), own=2)
    assert measured.loss == pytest.approx(-math.log(0.5 * 0.8 * 0.25) / 3)
    assert measured.greedy
    assert not answer_loss(logits, np.array([0, 1, 2]), own=3).greedy


def test_frames_are_decoded_once_for_all_answers(tmp_path: Path) -> None:
    model = load(write(tmp_path / "model"), chat_template=CHAT_TEMPLATE)
    about = shown([str(CIRCLE)], {}, frames=6)
    prompt = model.prepare(conversation("How?", about))
    assert [medium.video.indices for medium in prompt.media if medium.video] == [
        (0, 9, 18, 28, 37, 47)
    ]
    again = model.prepare(answered("How?", about.read(prompt.media), "So."))
    assert again.media[0].key == prompt.media[0].key
    assert again.prompt == prompt.prompt + "So.<|im_end|>\n"
    np.testing.assert_array_equal(again.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    model.close()
