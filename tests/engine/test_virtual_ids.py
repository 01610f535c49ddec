"""Images as ids above the vocabulary: every way that mlx-lm has of generating from ids gives the
same answer, and no image is ever mistaken for another.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from parity.cases import ask, picture, recorded_conversations
from PIL import Image

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.request import ActiveRequest, Counters, PromptRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import RequestError
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Inputs, Processor
from mlx_onevision.sampling.sampler import RequestSampler, Sampling

FOLDER = Path(__file__).parents[1] / "reference" / "model"
PROMPTS = recorded_conversations()
TOKENS = 24


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(FOLDER, load_checkpoint(FOLDER).config)


@pytest.fixture(scope="module")
def prompts(processor: Processor) -> list[Inputs]:
    return [processor.prepare(messages) for messages in PROMPTS.values()]


@pytest.fixture(scope="module")
def model() -> OneVision:
    return load_checkpoint(FOLDER).model


def virtual_ids(model: OneVision, inputs: Inputs) -> list[int]:
    """The prompt with its media in the model's bank, and their ids in place of placeholders."""
    ids = inputs.input_ids.copy()
    numbers: list[int] = []
    for medium in inputs.media:
        (rows,) = model.encode_media([medium])
        numbers += model.bank.reserve(medium.key, medium.tokens)
        model.bank.store(medium.key, rows)
    ids[ids == model.config.image_token_index] = numbers
    return ids.tolist()


def step_by_step(model: OneVision, ids: Sequence[int], **options: Any) -> list[int]:
    """mlx-lm's generate_step, the way of a lone request."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(list(ids)), model, max_tokens=TOKENS, **options)
    return [int(token) for token, _ in steps]


def test_media_stand_above_the_vocabulary(model: OneVision, prompts: list[Inputs]) -> None:
    vocabulary = model.config.text_config.vocab_size
    for inputs in prompts:
        ids = np.array(virtual_ids(model, inputs))
        media = inputs.input_ids == model.config.image_token_index
        assert (ids[media] >= vocabulary).all()
        assert (ids[~media] == inputs.input_ids[~media]).all()
        assert len(set(ids[media])) == sum({m.key: m.tokens for m in inputs.media}.values())


def test_explicit_embeddings(model: OneVision, prompts: list[Inputs]) -> None:
    for inputs in prompts:
        ids = virtual_ids(model, inputs)
        words = np.where(np.array(ids) < model.config.text_config.vocab_size, ids, 0)
        rows = np.array(model.language_model.embed_tokens(mx.array(words)))
        for medium in inputs.media:
            numbers = model.bank.reserve(medium.key, medium.tokens)
            there = np.isin(ids, list(numbers))
            rows[there] = np.array(model.bank.look_up(numbers[0], numbers[-1] + 1))
        given = step_by_step(model, words.tolist(), input_embeddings=mx.array(rows))
        assert step_by_step(model, ids) == given


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prompt_in_chunks(model: OneVision, prompts: list[Inputs], chunk: int) -> None:
    """Wherever the prompt is cut, within an image too."""
    for inputs in prompts[:2] if chunk == 1 else prompts:
        ids = virtual_ids(model, inputs)
        assert step_by_step(model, ids, prefill_step_size=chunk) == step_by_step(model, ids)


def test_while_decoding(model: OneVision, prompts: list[Inputs]) -> None:
    """The short way for sampled ids looks the same words up."""
    from mlx_lm.generate import generate_step

    ids = virtual_ids(model, prompts[0])
    steps = generate_step(mx.array(ids), model, max_tokens=TOKENS)
    tokens = [int(next(steps)[0])]
    with model.decoding():
        tokens += [int(token) for token, _ in steps]
    assert tokens == step_by_step(model, ids)


def test_batch(model: OneVision, prompts: list[Inputs]) -> None:
    """Text, one image and two images in one batch of mlx-lm's, begun at different times."""
    from mlx_lm.generate import BatchGenerator

    requests = [virtual_ids(model, inputs) for inputs in prompts]
    batch = BatchGenerator(model, max_tokens=TOKENS, prefill_batch_size=3)
    answers: dict[int, list[int]] = {}
    for uid in batch.insert(requests[:5]):
        answers[uid] = []
    for step in range(1000):
        if step == 6:
            answers |= {uid: [] for uid in batch.insert(requests[5:])}
        for response in batch.next_generated():
            answers[response.uid].append(response.token)
        if step >= 6 and all(len(answer) == TOKENS for answer in answers.values()):
            break
    batch.close()
    assert list(answers.values()) == [step_by_step(model, ids) for ids in requests]


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_speculation(model: OneVision, prompts: list[Inputs], noise: float) -> None:
    """A draft model has its own rows under the same ids; how well it guesses only costs time."""
    from mlx_lm.generate import speculative_generate_step

    draft = load_checkpoint(FOLDER).model
    mx.random.seed(0)
    projector = draft.multi_modal_projector.linear_2
    projector.weight = projector.weight + noise * mx.random.normal(projector.weight.shape)
    guessed = []
    whole = load_checkpoint(FOLDER).model  # a fresh bank, filled in the same order as the draft's
    for inputs in prompts:
        ids = virtual_ids(whole, inputs)
        assert virtual_ids(draft, inputs) == ids
        steps = list(speculative_generate_step(mx.array(ids), whole, draft, max_tokens=TOKENS))
        assert [token for token, _, _ in steps] == step_by_step(whole, ids)
        guessed.append(np.mean([by_draft for _, _, by_draft in steps]))
    assert np.mean(guessed) > (0.6 if noise == 0.0 else 0.0)


# One after another, as a user asks: through the runner, with its prefix cache.


class Watched(RequestSampler):
    """Greedy, and keeps the logits of every step."""

    def __init__(self) -> None:
        super().__init__(Sampling())
        self.seen: list[np.ndarray] = []

    def logits_processors(
        self, vocab_size: int, prompt: Iterable[int]
    ) -> list[Callable[[Any, Any], Any]]:
        def watch(tokens: mx.array, logits: mx.array) -> mx.array:
            self.seen.append(np.array(logits))
            return logits

        return [watch]


@dataclass
class Answer:
    tokens: list[int]
    logits: np.ndarray
    counters: Counters


def answer(runner: Runner, inputs: Inputs) -> Answer:
    request = PromptRequest(inputs, Sampling(), TOKENS)
    active = ActiveRequest(request, NoText(), TOKENS, (), threading.Event())
    active.sampler = sampler = Watched()
    assert runner.run_alone(active)
    tokens = [item.token for item in active if item.token is not None]
    return Answer(tokens, np.concatenate(sampler.seen[: len(tokens)]), active.counters)


class NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""


def cold(inputs: Inputs) -> Answer:
    """The answer of a model that has seen nothing yet."""
    return answer(Runner(load_checkpoint(FOLDER)), inputs)


def one_pixel_off(image: Image.Image) -> Image.Image:
    pixels = np.array(image)
    pixels[20:22, 30:32] ^= 0xFF
    return Image.fromarray(pixels)


SIZE = (337, 511)
PAIRS = {
    "other pictures": (picture(SIZE), picture(SIZE, 1)),
    "a speck's difference": (picture((56, 56)), one_pixel_off(picture((56, 56)))),
    "turned by half": (picture(SIZE), picture(SIZE).rotate(180)),
    # As many tiles, all black, and as many rows: only the places of the newlines differ.
    "black in another grid": (Image.new("RGB", (286, 104)), Image.new("RGB", (174, 125))),
}


@pytest.mark.parametrize("name", PAIRS)
def test_no_image_is_taken_for_another(processor: Processor, name: str) -> None:
    """Two images with the same text, in turn: to the bit what a cold start answers to each."""
    first, second = (processor.prepare(ask(image)) for image in PAIRS[name])
    assert first.input_ids.shape == second.input_ids.shape
    runner = Runner(load_checkpoint(FOLDER))
    runner.prefix.capacity = 0  # the last conversation alone
    for inputs in (first, second, first):
        warm, fresh = answer(runner, inputs), cold(inputs)
        assert warm.counters.cached_tokens == 0
        assert warm.tokens == fresh.tokens
        assert np.array_equal(warm.logits, fresh.logits)
    assert not np.array_equal(cold(first).logits, cold(second).logits)
    if name.startswith("black"):
        assert np.array_equal(first.media[0].tiles, second.media[0].tiles)


def test_shares_of_the_same_image_do_not_mix(processor: Processor) -> None:
    """Requests with other numbers of visual tokens, in turn and together: to the bit what each is
    answered by itself; and a share of 1 is what it is without one.
    """
    image = picture((350, 500))
    shares = (None, 0.5, 0.25, 1.0, 0.5)
    whole, half, quarter, full, again = (
        processor.prepare(ask(image), visual_tokens=share) for share in shares
    )
    assert np.array_equal(whole.input_ids, full.input_ids) and whole.media == full.media
    assert half.media == again.media  # from the cache of tiles
    kept = [inputs.media[0] for inputs in (whole, half, quarter)]
    assert len({medium.key for medium in kept}) == 3
    assert kept[0].tokens > kept[1].tokens > kept[2].tokens
    runner = Runner(load_checkpoint(FOLDER))
    runner.prefix.capacity = 0  # the last conversation alone
    for inputs in (whole, half, quarter, full, again):
        warm, fresh = answer(runner, inputs), cold(inputs)
        assert warm.counters.prompt_tokens == len(inputs.input_ids)
        assert warm.tokens == fresh.tokens
        assert np.array_equal(warm.logits, fresh.logits)
        assert warm.counters.encoded_media == (inputs in (whole, half, quarter))
    with pytest.raises(RequestError, match="visual_tokens must be above 0 and at most 1, not 0"):
        processor.prepare(ask(image), visual_tokens=0)


def test_the_shared_beginning_is_reused(processor: Processor) -> None:
    """A long text before two images is read once; what was cached ends where the image begins."""
    text = "How many are there, which colour, left or right? " * 4
    system = {"role": "system", "content": [{"type": "text", "text": text}]}
    first, second = (processor.prepare([system, *ask(image)]) for image in PAIRS["other pictures"])
    start = int(np.argmax(first.input_ids == processor.config.image_token_index))
    runner = Runner(load_checkpoint(FOLDER))
    answer(runner, first)
    warm, fresh = answer(runner, second), cold(second)
    assert warm.counters.cached_tokens == start > 64
    assert warm.tokens == fresh.tokens
    # Sums of other lengths round differently; another image moves them by more than 0.1.
    assert np.abs(warm.logits - fresh.logits).max() <= 5e-5
    assert np.abs(cold(first).logits - fresh.logits).max() > 0.1


def test_the_same_image_is_encoded_once(processor: Processor) -> None:
    inputs = processor.prepare(ask(picture(SIZE)))
    runner = Runner(load_checkpoint(FOLDER))
    fresh = answer(runner, inputs)
    again = answer(runner, processor.prepare(ask(picture(SIZE))))
    assert fresh.counters.encoded_media == 1 and again.counters.encoded_media == 0
    assert again.counters.cached_tokens == len(inputs.input_ids) - 1
    assert again.tokens == fresh.tokens
    other = answer(runner, processor.prepare(ask(picture(SIZE), text="Which colour is it?")))
    assert other.counters.encoded_media == 0
    assert (
        other.tokens
        == cold(processor.prepare(ask(picture(SIZE), text="Which colour is it?"))).tokens
    )


def test_rows_that_were_dropped_come_back(processor: Processor) -> None:
    """A bank too small for any image: each is encoded anew, and the answers stay the same."""
    runner = Runner(load_checkpoint(FOLDER))
    runner.model.bank.capacity, runner.prefix.capacity = 1, 0
    prompts = [processor.prepare(ask(picture(SIZE, seed))) for seed in (0, 1, 0, 2, 1)]
    for inputs in prompts:
        warm, fresh = answer(runner, inputs), cold(inputs)
        assert warm.counters.encoded_media == 1
        assert warm.tokens == fresh.tokens
        assert np.array_equal(warm.logits, fresh.logits)
        assert runner.model.bank.nbytes == 0
