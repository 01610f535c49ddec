"""The demo model's trainer sees what the package would show: the same rows, the same token ids."""

from random import Random

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from examples.demo_model.answering import conversation
from examples.demo_model.buffers import Buffers
from examples.demo_model.cases import make_cases
from examples.demo_model.drawing import draw_scene
from examples.demo_model.layouts import layout_number, make_layouts
from examples.demo_model.packing import (
    PATCHES,
    TILE,
    TOKENS,
    Rows,
    image_rows,
    images_rows,
    plan,
    tile_windows,
    video_rows,
)
from examples.demo_model.samples import (
    GROUPS,
    LABELS,
    TURNS,
    Medium,
    ask,
    sample_medium,
    scene_numbers,
)
from examples.demo_model.scenes import sample_scene, sample_size
from examples.demo_model.tiling import CONFIG, exact_tiles
from examples.demo_model.words import Words
from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.media.anyres import VideoPacking
from mlx_onevision.media.tiles import tile_image
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.packing import pack_image, pack_tile, pack_video, pool_frames
from mlx_onevision.prompt.processor import Processor

WIDTH = 192
DEMO = hub.resolve("demo")


@pytest.fixture(scope="module")
def network() -> OneVision:
    return load_checkpoint(DEMO, dtype="float32").model


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(Tokenizer.from_file(str(DEMO / "tokenizer.json")))


@pytest.fixture(scope="module")
def processor(network: OneVision) -> Processor:
    return Processor.from_folder(DEMO, network.config)


def features(tiles: int) -> mx.array:
    made = np.random.default_rng(tiles).standard_normal((tiles, TOKENS, WIDTH), np.float32)
    return mx.array(made)


def packed(rows: Rows, given: mx.array, network: OneVision) -> np.ndarray:
    flat = np.array(given).reshape(-1, WIDTH)
    made = (flat[rows.index] * rows.weight[..., None]).sum(1)
    made[rows.newline] = np.array(network.image_newline)
    return made


@pytest.mark.parametrize("number", range(12))
def test_a_tiled_image_is_packed_as_the_network_packs_it(network: OneVision, number: int) -> None:
    packing = plan(sample_size(Random(number)))
    given = features(packing.tiles)
    expected = np.array(pack_image(given, packing, network.image_newline))
    # The network, as the reference, finds its fractions in float32: 1e-6 off at token 24 of a row.
    np.testing.assert_allclose(packed(image_rows(packing), given, network), expected, atol=2e-5)


@pytest.mark.parametrize("count", (2, 3, 4))
def test_untiled_images_are_packed_as_the_network_packs_them(
    network: OneVision, count: int
) -> None:
    given = features(count)
    expected = np.concatenate(
        [np.array(pack_tile(given[i : i + 1], network.image_newline)) for i in range(count)]
    )
    np.testing.assert_array_equal(packed(images_rows(count), given, network), expected)


@pytest.mark.parametrize("frames", (1, 2, 7, 48))
def test_a_video_is_packed_as_the_network_packs_it(network: OneVision, frames: int) -> None:
    given = features(frames)
    expected = np.array(
        pack_video(pool_frames(given, VideoPacking(PATCHES)), "one_token", network.image_newline)
    )
    np.testing.assert_allclose(packed(video_rows(frames), given, network), expected, atol=2e-6)


@pytest.mark.parametrize("number", range(6))
def test_a_drawn_tile_looks_where_the_exact_one_does(number: int) -> None:
    """Each tile pixel's window, looked up in the full drawing, against the resampled tile."""
    rng = Random(number)
    scene = sample_scene(rng, sample_size(rng, 200, 900), 3)
    drawn = np.asarray(draw_scene(scene, rng, smooth=True)).astype(np.float32)
    tiles = tile_image(drawn.astype(np.uint8), CONFIG).astype(np.float32)
    windows = tile_windows(scene.size, plan(scene.size))
    high, wide = scene.size
    centre = np.arange(TILE) + 0.5
    for tile, (x0, dx, y0, dy, fill) in zip(tiles, windows, strict=True):
        x, y = x0 + dx * centre, y0 + dy * centre
        inside = ((y >= 0) & (y < high))[:, None] & ((x >= 0) & (x < wide))[None]
        at = np.ix_(np.clip(y, 0, high - 1).astype(int), np.clip(x, 0, wide - 1).astype(int))
        looked = np.where(inside[..., None], drawn[at], fill)
        # Edges differ, as resampling softens them; a shifted window would differ all over.
        assert np.median(np.abs(looked - tile)) <= 12
        assert np.mean(np.abs(looked - tile) > 60) < 0.08


def test_numbered_layouts_are_the_media_they_name() -> None:
    layouts = make_layouts(0, 5)
    rng = Random(1)
    for group in GROUPS:
        for _ in range(5):
            image = rng.choice(layouts.groups[group.name]) if group.media == "image" else 0
            size = layouts.sizes[image] if group.media == "image" else None
            medium = sample_medium(rng, group, size, 4, largest=100)
            number = layout_number(layouts, group, medium, image)
            assert layouts.rows[number] == rows_of(medium)


def rows_of(medium: Medium) -> int:
    if medium.video:
        return len(video_rows(len(medium.times)).index)
    if len(medium.scenes) == 1:
        return plan(medium.scenes[0].size).tokens
    return (TOKENS + 1) * len(medium.scenes)


def test_tiles_and_rows_are_as_many_as_in_use(processor: Processor) -> None:
    for case in [*make_cases("several", 2), *make_cases("pictures", 2)]:
        question = case.questions[0]
        blocks = [{"type": "image", "image": picture} for picture in case.draw()]
        inputs = processor.prepare(conversation(question, blocks))
        tiles = np.concatenate([medium.tiles for medium in inputs.media])
        assert tiles.shape == exact_tiles(case.medium, Random(0)).shape
        assert sum(medium.tokens for medium in inputs.media) == rows_of(case.medium)


def test_questions_are_tokenised_as_a_conversation_is(processor: Processor, words: Words) -> None:
    """Turns included: a buffer's prompt and answers are the ids of the rendered chat template."""
    config: OneVisionConfig = processor.config
    checked = 0
    for case in make_cases("pictures", 6):
        for question in case.questions:
            blocks = [{"type": "image", "image": picture} for picture in case.draw()]
            ids = processor.prepare(conversation(question, blocks)).input_ids.tolist()
            mine = [*words.prefix, *[config.image_token_index] * rows_of(case.medium)]
            for asked, answered in question.history:
                mine += [*words.encode("\n" + asked), *words.replied, *words.encode(answered)]
                mine += words.next[:-1]
            mine += [*words.encode("\n" + question.text), *words.reply]
            assert mine == ids
            checked += bool(question.history)
    assert checked


def answers_in(buffers: Buffers, words: Words, group: int) -> list[str]:
    """The answers of one conversation, in order; each is said where it stands."""
    (at,) = np.nonzero(buffers.group[0] == group)
    assert buffers.place[0, at].tolist() == list(range(len(at)))
    target, turn = buffers.target[0, at], buffers.turn[0, at]
    (spoken,) = np.nonzero(target[:-1] >= 0)
    # What is to be said next is what stands next.
    assert (buffers.ids[0, at][spoken + 1] == target[spoken]).all()
    turns = sorted(set(turn[target >= 0].tolist()))
    said = [target[(turn == number) & (target >= 0)].tolist() for number in turns]
    return [words.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]


def labels_in(buffers: Buffers, group: int) -> list[str]:
    """What each answer of a conversation counts as, in order."""
    there = (buffers.group[0] == group) & (buffers.target[0] >= 0)
    pairs = zip(buffers.turn[0, there].tolist(), buffers.label[0, there].tolist(), strict=True)
    return [LABELS[label] for _, label in sorted(set(pairs))]


@pytest.fixture(scope="module")
def turns() -> list[tuple[str, str, str]]:
    return ask(Random(2), next(iter(make_cases("pictures", 1))).medium)


def test_a_buffer_asks_each_question_on_its_own(
    words: Words, turns: list[tuple[str, str, str]]
) -> None:
    buffers = Buffers.empty(1)
    buffers.fill(0, turns, words, Random(3), chained=0)
    count = int(buffers.group.max())
    assert count > 4
    for group, (kind, _, answer) in zip(range(1, count + 1), turns, strict=False):
        assert answers_in(buffers, words, group) == [answer]
        assert labels_in(buffers, group) == [kind]
    assert buffers.turn.max() == count


def test_a_buffer_holds_a_conversation_of_four_turns(
    words: Words, turns: list[tuple[str, str, str]]
) -> None:
    for seed in range(30):
        buffers = Buffers.empty(1)
        buffers.fill(0, turns, words, Random(seed), chained=1)
        said = answers_in(buffers, words, 1)
        assert len(said) >= 2 and set(said) <= {answer for *_, answer in turns}
        assert labels_in(buffers, 1)[1:] == list(TURNS[: len(said) - 1])
        others = [answers_in(buffers, words, n) for n in range(2, int(buffers.group.max()) + 1)]
        assert all(len(alone) == 1 for alone in others)
        if len(said) == 4:
            break
    else:
        pytest.fail("no conversation had four turns")


def test_scene_numbers_are_pixels() -> None:
    rng = Random(4)
    scene = sample_scene(rng, (300, 500), 2)
    shapes, back = scene_numbers(scene)
    first = scene.shapes[0]
    np.testing.assert_allclose(
        shapes[0, :3], (first.x * 500, first.y * 300, first.radius * 300), rtol=1e-6
    )
    np.testing.assert_allclose(shapes[0, 12:16], (*first.rgb, 1))
    assert shapes[:, 15].tolist() == [1, 1, 0, 0]
    assert back[-2:].tolist() == [500, 300]
