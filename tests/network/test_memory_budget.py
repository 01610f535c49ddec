"""The memory model, tried for machines and checkpoints that are not here."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hostile.sizes import cases

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.networks import TextConfig
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.media.anyres import VideoPacking, plan_packing
from mlx_onevision.network.memory_budget import (
    LEAST_SCRATCH,
    MAX_PREFILL_BATCH_SIZE,
    MEGABYTE,
    MOST_SCRATCH,
    MemoryModel,
    scratch_bytes,
    tail,
)
from mlx_onevision.network.memory_sizes import (
    CHUNKS,
    DENSE_ROWS,
    SMALLEST,
    Budget,
    MediumSize,
    RequestSize,
)


def published(
    hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool = False
) -> OneVisionConfig:
    return OneVisionConfig(
        text_config=TextConfig(
            vocab_size=152128,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=hidden // heads,
            layer_types=("full_attention",) * layers,
            tie_word_embeddings=tied,
        )
    )


HALF_B = published(896, 4864, 24, 14, 2, tied=True)
SEVEN_B = published(3584, 18944, 28, 28, 4)
# As published: 1.79 and 16.06 GB; 4-bit, projector and tower 8-bit.
MODELS = {
    "0.5b": MemoryModel(HALF_B, 1_790_000_000),
    "7b": MemoryModel(SEVEN_B, 16_060_000_000),
    "7b 4-bit": MemoryModel(SEVEN_B, 4_810_000_000, dense_rows=DENSE_ROWS),
}


def image(config: OneVisionConfig, height: int, width: int) -> MediumSize:
    vision = config.vision_config
    packing = plan_packing(
        (height, width),
        config.image_grid_pinpoints,
        vision.image_size,
        vision.patches_per_side,
        config.max_tiles,
    )
    return MediumSize(packing.tiles, packing.tokens, packing)


def test_more_memory_never_means_smaller_steps() -> None:
    model = MODELS["7b"]
    budgets = [model.plan(size * MEGABYTE) for size in (1, 64, 256, 1024, 4096, 16384)]
    for smaller, larger in pairwise(budgets):
        assert smaller.chunk <= larger.chunk
        assert smaller.tile_group <= larger.tile_group
    assert budgets[0] == SMALLEST == Budget(1, 1, CHUNKS[-1], 1)
    assert budgets[-1] == Budget(10, 4, CHUNKS[0], 4)


def test_half_precision_goes_further() -> None:
    single = replace(MODELS["7b"], itemsize=4)
    assert MODELS["7b"].plan(512 * MEGABYTE).chunk > single.plan(512 * MEGABYTE).chunk


@pytest.mark.parametrize("gigabytes", [8, 16, 24, 64, 512])
@pytest.mark.parametrize("weights", [1, 5, 15, 140])
def test_scratch_stays_in_bounds(gigabytes: int, weights: int) -> None:
    assert LEAST_SCRATCH <= scratch_bytes(gigabytes << 30, weights << 30) <= MOST_SCRATCH


def test_a_batch_reads_no_more_at_once_than_a_lone_prompt() -> None:
    for chunk in CHUNKS:
        assert 0 < tail(chunk) * MAX_PREFILL_BATCH_SIZE <= chunk


def test_short_steps_hold_no_more_than_a_chunk() -> None:
    for budget in (SMALLEST, Budget(10, 4, 8192, 2), Budget(10, 1, 2048, 1)):
        for tokens in (2, 30, 100, 256, 257, 5000):
            interval = budget.interval_for(tokens)
            assert interval >= budget.interval
            assert interval * tokens <= budget.interval * max(budget.chunk, tokens)
    budget = MODELS["7b 4-bit"].plan(MOST_SCRATCH)
    dense = DENSE_ROWS  # from here on each layer's matrices are dequantized
    assert budget.interval_for(dense) == budget.interval < budget.interval_for(dense - 1)


def test_what_is_held_by_published_shapes() -> None:
    # 28 layers, 4 heads of 128, keys and values, 2 bytes: 57,344 bytes a position.
    model = MODELS["7b"]
    assert model.cache(1) == model.cache(256) == 57_344 * 256 and model.cache(257) == 57_344 * 512
    for bits, bytes_a_group in ((8, 64 + 4), (4, 32 + 4)):
        assert replace(model, kv_bits=bits).position == 57_344 // 128 * bytes_a_group
    tiled = image(SEVEN_B, 1152, 1152)
    assert (tiled.tiles, tiled.tokens) == (10, 7371)
    assert model.features(tiled.tokens) == 7371 * 3584 * 2


def test_one_image_of_ten_tiles_takes_little_beside_the_weights() -> None:
    """At full steps at most 1.6 GB, within a limit of 0.8 GB over the weights still less."""
    model, size = MODELS["7b"], RequestSize(7386, 256, (image(SEVEN_B, 1152, 1152),))
    full = model.plan(MOST_SCRATCH)
    assert full.chunk == 4096 and model.request(size, full).beyond_weights <= 1.6e9
    limit = model.weights + 800_000_000
    fitted = model.fitted([size], full, limit)
    assert fitted.chunk >= 1024 and model.request(size, fitted).total <= limit


def needed(model: MemoryModel, size: RequestSize, chunk: int = 256) -> float:
    """What a request takes, counted anew and without what could be done otherwise: the weights,
    keys and values, features, and the MLP of a chunk, its weights dequantized.
    """
    text = model.config.text_config
    positions = -(-(size.prompt + size.answer) // 256) * 256
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * positions
    rows = sum(medium.tokens for medium in size.media) + min(chunk, size.prompt)
    dense = text.hidden_size if size.prompt >= model.dense_rows else 0
    mlp = 2 * 3 * text.intermediate_size * (min(chunk, size.prompt) + dense)
    return model.weights + cache + 2 * rows * text.hidden_size + mlp


def check_what_would_fit(refusal: str, model: MemoryModel, size: RequestSize, limit: int) -> None:
    """Each way that a refusal names is one, and the number it names is the largest."""
    assert len(refusal) < 320 and "would fit" in refusal
    way = refusal.partition("; ")[2]

    def fits(model: MemoryModel = model, **changed: Any) -> bool:
        return model.request(size._replace(**changed), SMALLEST).total <= limit

    def first(count: int) -> bool:
        tokens = sum(medium.tokens for medium in size.media[:count])
        text = size.prompt - sum(medium.tokens for medium in size.media)
        return fits(prompt=text + tokens, media=size.media[:count])

    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", way)]
    if way.startswith("an answer of"):
        assert fits(answer=numbers[0]) and not fits(answer=numbers[0] + 1)
    elif way.startswith("the first"):
        assert first(numbers[0]) and not first(numbers[0] + 1) and not fits(answer=1)
    else:
        assert way.startswith("a prompt of")
        assert fits(prompt=numbers[0], answer=1, media=())
        assert numbers[0] == size.prompt or not fits(prompt=numbers[0] + 1, answer=1, media=())
    for setting in re.findall(r"with ((?:quantize 4 and )?kv_bits \d|quantize 4)", way):
        smaller = model
        if "quantize" in setting:
            assert model.dense_rows != DENSE_ROWS
            weights = model.weights_in_4_bits()
            assert weights is not None
            smaller = replace(smaller, weights=weights, dense_rows=DENSE_ROWS, dense_tower=True)
        if "kv_bits" in setting:
            smaller = replace(smaller, kv_bits=int(setting[-1]))
        assert fits(smaller)


@pytest.mark.parametrize("gigabytes", [8, 16, 64])
@pytest.mark.parametrize("name", MODELS)
def test_mixes_on_pretend_machines(gigabytes: int, name: str) -> None:
    """Of all mixes, none is over-committed, and none is refused that would have fitted with 15 % to
    spare. 2/3 or 3/4 of a Mac's memory are the GPU's.
    """
    limit = (gigabytes << 30) * (3 if gigabytes > 36 else 2) // (4 if gigabytes > 36 else 3)
    model, rng = MODELS[name], np.random.default_rng(gigabytes)
    if name == "7b" and gigabytes < 64:
        with pytest.raises(
            OutOfMemoryError,
            match=r"needs 16\.\d+ GB .* 16\.06 GB for its weights, .* 4 bits it would need 5\.",
        ):
            model.admit_model(limit)
        return
    model.admit_model(limit)
    budget = model.plan(scratch_bytes(limit, model.weights))
    refused = joined = waited = 0
    for _ in range(cases(60, 500)):
        running: list[RequestSize] = []
        steps = budget
        for _ in range(int(rng.integers(1, 9))):
            media = []
            for kind in rng.integers(0, 4, rng.integers(0, 9) if rng.random() < 0.6 else 0):
                if kind == 0:
                    frames = int(rng.integers(1, 129))
                    media.append(MediumSize(frames, VideoPacking(27).tokens(frames), video=True))
                elif kind == 1:
                    media.append(image(model.config, *rng.integers(50, 4000, 2).tolist()))
                else:
                    media.append(MediumSize(1, 730))
            text = int(10 ** rng.uniform(1, 6))
            prompt = text + sum(medium.tokens for medium in media)
            size = RequestSize(prompt, int(10 ** rng.uniform(0, 7)), tuple(media))
            try:
                model.admit(size, limit)
            except OutOfMemoryError as error:
                check_what_would_fit(str(error), model, size, limit)
                assert needed(model, size) > limit / 1.15
                refused += 1
                continue
            if not running:
                steps = model.fitted([size], budget, limit)
                assert needed(model, size, steps.chunk) <= limit
                running.append(size)
            elif model.batch([*running, size], steps).total <= limit:
                running.append(size)
                joined += 1
                longest = max(size.prompt + size.answer for size in running)
                held = sum(medium.tokens for size in running for medium in size.media) * 2
                held *= model.config.text_config.hidden_size
                assert len(running) * model.cache(longest) + held <= limit - model.weights
            else:
                waited += 1
    assert joined and waited and refused


def test_a_refusal_says_what_would_fit() -> None:
    model = MODELS["7b"]
    limit = 17 * 10**9
    with pytest.raises(
        OutOfMemoryError, match=r"needs .* limit is 17\.00 GB; an answer of [\d,]+ "
    ):
        model.admit(RequestSize(1000, 100_000), limit)
    with pytest.raises(
        OutOfMemoryError, match=r"a prompt of [\d,]+ tokens of text would fit; use fewer"
    ):
        model.admit(RequestSize(2**31, 1), limit)
    photos = (image(SEVEN_B, 1152, 1152),) * 8
    prompt = sum(photo.tokens for photo in photos) + 20
    with pytest.raises(
        OutOfMemoryError,
        match=r"58,988 tokens and 8 images and videos .*; the first 3 of them would fit, "
        r"and so would this with quantize 4$",
    ):
        model.admit(RequestSize(prompt, 1000, photos), limit + 10**9)
    with pytest.raises(OutOfMemoryError, match=r"fewer or smaller media .* so would this with q"):
        model.admit(RequestSize(prompt, 1, photos), model.weights + 400_000_000)
    with pytest.raises(OutOfMemoryError, match=r"; no prompt fits; use a smaller model$"):
        MODELS["7b 4-bit"].admit(RequestSize(100, 1), 4 * 10**9)
    answer = 3000
    while model.request(RequestSize(1000, answer), SMALLEST).total <= limit:
        answer += 256
    with pytest.raises(OutOfMemoryError, match="so would this with kv_bits 8"):
        model.admit(RequestSize(1000, answer), limit)


@pytest.mark.parametrize(("name", "gigabytes"), [("7b", 4.81), ("0.5b", 0.70)])
def test_weights_in_4_bits(name: str, gigabytes: float) -> None:
    """As the converter makes them: what it makes of the published shapes was measured."""
    weights = MODELS[name].weights_in_4_bits()
    assert weights is not None and weights / 1e9 == pytest.approx(gigabytes, rel=0.03)
    assert MODELS["7b 4-bit"].weights_in_4_bits() is None


def test_a_model_that_does_not_fit_is_refused_with_what_would() -> None:
    model = MODELS["7b"]
    with pytest.raises(OutOfMemoryError, match=r"so load it with quantize 4$"):
        model.admit_model(8 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"4 bits it would need .* GB; use a smaller model$"):
        model.admit_model(4 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"its draft model's, .*; leave its draft model out"):
        model.with_draft(MODELS["0.5b"]).admit_model(17 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"4\.00 GB; use a smaller model$"):
        MODELS["7b 4-bit"].admit_model(4 * 10**9)


def test_the_longest_prompt_is_the_longest_that_is_admitted() -> None:
    model, limit = MODELS["7b 4-bit"], 8 * 10**9
    longest = model.longest(1 << 24, limit)
    assert model.longest(1000, limit) == 1000 and model.longest(1000, 10**9) == 0
    model.admit(RequestSize(longest, 1), limit)
    with pytest.raises(OutOfMemoryError):
        model.admit(RequestSize(longest + 1, 1), limit)
    other = (replace(model, weights=7 * 10**9), limit)
    assert replace(model, others=(other,)).longest(1 << 24, limit) < longest
