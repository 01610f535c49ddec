"""The embedded demo model on drawn videos: files in, text out."""

from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from videos import encode_video

from examples.demo_model.drawing import draw_scene
from examples.demo_model.narrating import caption_text, scene_caption
from examples.demo_model.questions import ask_video
from examples.demo_model.scenes import sample_video
from examples.demo_model.world import MOTIONS
from mlx_onevision.api import Model, load
from mlx_onevision.describe.outline import SEGMENT


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    model = load("demo")
    yield model
    model.close()


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.parametrize("motion", MOTIONS)
def test_it_sees_how_things_move(demo: Model, kind: str, motion: str) -> None:
    """Videos of 8 to 64 frames, drawn from seeds that training does not use."""
    rng = Random(f"test film {kind} {motion}")
    scene = sample_video(rng, (120, 160), 2)
    while any(shape.motion not in (motion, None) for shape in scene.shapes):
        scene = sample_video(rng, (120, 160), 2)
    count = rng.choice((8, 16, 40, 64))
    frames = [
        np.asarray(draw_scene(scene, rng, time / (count - 1), smooth=True)) for time in range(count)
    ]
    turn = ask_video(rng, scene, "motion")
    assert turn is not None
    data = encode_video(frames, kind, rate=12)
    assert demo.generate(turn[1], videos=[data], max_tokens=60).text == turn[2]
    if caption := scene_caption(scene):
        caption_answer = demo.generate(SEGMENT, videos=[data], max_tokens=60)
        assert caption_answer.text == caption_text(caption)


def test_a_video_beside_a_picture(demo: Model) -> None:
    """Not what it was trained on, but what it is asked must reach it."""
    rng = Random("both")
    scene = sample_video(rng, (96, 96), 1)
    frames = np.stack([np.asarray(draw_scene(scene, rng, t / 7)) for t in range(8)])
    both = demo.generate("What is in this video?", videos=[frames], images=[frames[0]])
    assert both.usage.encoded_media == 2
    again = demo.generate("What is in this video?", videos=[frames], images=[frames[0]])
    assert again.usage.encoded_media == 0 and again.tokens == both.tokens


def test_a_number_of_frames_and_a_part(demo: Model) -> None:
    rng = Random("part")
    scene = sample_video(rng, (96, 96), 1)
    count = 24
    frames = [np.asarray(draw_scene(scene, rng, t / (count - 1))) for t in range(count)]
    data = encode_video(frames, rate=12)
    four = demo.generate("What is in this video?", videos=[data], num_frames=4)
    assert four.usage.media_tokens == 4 * 4 + 1
    part = demo.generate("What is in this video?", videos=[data], start=1.0, fps=6)
    assert part.usage.media_tokens == 6 * 4 + 1
    assert demo.generate("What is in this video?", videos=[data], num_frames=30).notes
