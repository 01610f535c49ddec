"""Speculative decoding: the same greedy answers in fewer steps."""

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Sizes, arrays, write

from mlx_onevision.api import Model, load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.engine.speculation import ModelDraft, PromptLookup, ProposalLength
from mlx_onevision.errors import OneVisionError, OutOfMemoryError, RequestError
from mlx_onevision.network.memory_sizes import SMALLEST, RequestSize
from mlx_onevision.network.onevision import OneVision

SIZES = Sizes(hidden=128)  # heads wide enough for quantized keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), sizes=SIZES, tied=False)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without its last layer: some of what it says is right."""
    weights = arrays(SIZES, tied=False)
    weights = {name: w for name, w in weights.items() if "language_model.layers.1." not in name}
    folder = tmp_path_factory.mktemp("smaller")
    return write(folder, sizes=replace(SIZES, layers=1), tied=False, weights=weights)


@pytest.fixture(scope="module")
def model(folder: Path, smaller: Path) -> Iterator[Model]:
    loaded = load(folder, draft_model=smaller)
    yield loaded
    loaded.close()


class Steps:
    """Tokens of each step of each model, by its number of layers; and the most rows of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: dict[int, list[int]] = {}
        self.rows = 0
        called = OneVision.__call__

        def counting(model: OneVision, inputs: mx.array, *args: Any, **options: Any) -> mx.array:
            self.taken.setdefault(len(model.layers), []).append(inputs.shape[1])
            self.rows = max(self.rows, inputs.shape[0])
            return called(model, inputs, *args, **options)

        monkeypatch.setattr(OneVision, "__call__", counting)


def settings(option: str, most: int) -> Any:
    return {option: most}


def conversations(count: int) -> Iterator[Any]:
    """Text, an image, several, and a video, in turn."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    video = rng.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    words = ["one", "two", "three", "red", "blue", "where is", "hello"]
    media: list[dict[str, Any]] = [
        {},
        {"images": [image]},
        {"images": [image, image[::-1]]},
        {"videos": [video]},
    ]
    for number in range(count):
        prompt = " ".join(rng.choice(words, 3)) * int(rng.integers(1, 8))
        yield {"prompt": prompt, **media[number % 4], "max_tokens": 40}


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_answers_are_the_same(folder: Path, smaller: Path, kv_bits: int | None) -> None:
    model = load(folder, draft_model=smaller, kv_bits=kv_bits)
    for conversation in conversations(12):
        plain = model.generate(**conversation)
        for option in ("prompt_lookup", "draft_tokens"):
            for most in (1, 16):
                found = model.generate(**conversation, **settings(option, most))
                assert (found.tokens, found.finish_reason) == (plain.tokens, plain.finish_reason)
    model.close()


@pytest.mark.parametrize("option", ["prompt_lookup", "draft_tokens"])
def test_a_conversation_goes_on(folder: Path, smaller: Path, option: str) -> None:
    model = load(folder, draft_model=smaller)
    settings: Any = {"max_tokens": 24, option: 8}
    question = "one two three " * 9 + "and what else is there to be seen?"
    messages = [{"role": "user", "content": question}]
    first = model.generate(messages=messages, **settings)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "why"}]
    cold = load(folder).generate(messages=messages, max_tokens=24)
    warm = model.generate(messages=messages, **settings)
    assert warm.tokens == cold.tokens and warm.usage.cached_tokens > 0
    model.close()


def test_prompt_lookup_takes_fewer_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = load(folder), Steps(monkeypatch)
    answer = model.generate("hello", max_tokens=60)
    repeated = f"{answer.text} {answer.text}"
    counts = []
    for most in (0, 8):
        steps.taken.clear()
        found = model.generate(repeated, max_tokens=60, prompt_lookup=most)
        counts.append((found.tokens, len(steps.taken[2])))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] < counts[0][1]
    model.close()


def test_a_draft_that_is_right_takes_few_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft has the model's weights, so that every proposal is taken: 1, 5, 7, 9, 9... tokens a
    step of the larger one.
    """
    sizes = replace(SIZES, layers=3)
    weights = arrays(sizes, tied=False)
    last = {name: 0 * value for name, value in weights.items() if "layers.2." in name}
    weights = {**weights, **arrays(SIZES, tied=False), **last}  # the last layer adds nothing
    larger = write(tmp_path, sizes=sizes, weights=weights, tied=False)
    model, steps = load(larger, draft_model=folder), Steps(monkeypatch)
    image = np.zeros((40, 60, 3), np.uint8)
    for media in ([], [image]):
        plain = model.generate("hello", images=media, max_tokens=57)
        steps.taken.clear()
        found = model.generate("hello", images=media, max_tokens=57, draft_tokens=8)
        assert found.tokens == plain.tokens
        verified = [tokens for tokens in steps.taken[3] if 1 < tokens <= 9]
        assert verified[:3] == [5, 7, 9] and len(verified) <= 8
        assert len(steps.taken[3]) <= 10
    model.close()


def test_what_is_looked_up() -> None:
    lookup = PromptLookup([1, 2, 3, 9, 4, 100, 5, 1, 2, 3], vocab_size=100)
    assert lookup.propose(8) == [9, 4]  # up to an image
    lookup.extend([7])
    assert not lookup.is_ready() and lookup.propose(8) == []
    lookup.extend([2, 3])
    assert lookup.propose(3) == [7, 2, 3]
    lookup.extend([6, 8, 6, 8])
    assert lookup.propose(5) == [6, 8, 6, 8, 6]


def test_what_was_not_taken_is_forgotten(smaller: Path) -> None:
    from mlx_lm.models.cache import KVCache

    model = load_checkpoint(smaller).model

    def drafting(ids: list[int]) -> ModelDraft:
        cache = [KVCache() for _ in model.layers]
        return ModelDraft(model, cache, ids, 384, chunk=4, check=lambda: None)

    ids, draft = [*range(5, 20)], drafting([*range(5, 20)])
    draft.extend([7])
    for agreed in (0, 1, 3, 6, 2):
        proposed = draft.propose(6)
        new = [*proposed[:agreed], (proposed[agreed] + 1) % 384 if agreed < 6 else 9]
        draft.extend(new)
        ids += [7, *new] if len(ids) == 15 else new
        assert draft.ids == ids
        again = drafting(ids[:-1])
        again.extend(ids[-1:])
        assert again.propose(6) == draft.propose(6)
        draft.extend([11])
        ids.append(11)


def test_a_draft_that_is_wrong_is_asked_less_and_less() -> None:
    length, asked = ProposalLength(8), 0
    for _ in range(1000):
        if tokens := length.tokens:
            asked += 1
            length.record(tokens, 0)
        else:
            length.skip()
    assert asked < 40
    while not (tokens := length.tokens):
        length.skip()
    for _ in range(12):
        length.record(length.tokens or 1, length.tokens or 1)
    assert length.tokens == 8


def test_a_request_that_gets_company_goes_on_without_its_draft(
    folder: Path, smaller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, draft_model=smaller)
    settings: Any = {"max_tokens": 60, "draft_tokens": 4}
    expected = [model.generate(prompt, max_tokens=60).tokens for prompt in ("hello", "blue " * 40)]
    stream = model.stream("hello", **settings)
    next(stream)
    steps = Steps(monkeypatch)
    other = model.stream("blue " * 40, **settings)
    assert [other.result().tokens, stream.result().tokens] == expected[::-1]
    assert steps.rows == 2 and len(steps.taken.get(1, ())) < 60
    model.close()


def test_cancelling_and_closing_free_a_draft(folder: Path, smaller: Path) -> None:
    model = load(folder, draft_model=smaller)
    draft = model._engine._worker.call(lambda runner: weakref.ref(runner.draft.model))  # pyright: ignore
    stream = model.stream("hello", max_tokens=4000, draft_tokens=4)
    next(stream)
    stream.cancel()
    assert stream.result().finish_reason == "cancelled"
    plain = model.generate("hello", max_tokens=20)
    assert model.generate("hello", max_tokens=20, draft_tokens=4).tokens == plain.tokens
    model.close()
    del stream
    gc.collect()
    assert draft() is None


def test_a_draft_counts_as_memory(folder: Path, smaller: Path) -> None:
    alone, both = load(folder), load(folder, draft_model=smaller)
    ours, theirs = alone._engine.memory, both._engine.memory
    small = load(smaller)._engine.memory
    assert theirs.weights == ours.weights + small.weights
    plain = RequestSize(1000, 100)
    drafted = plain._replace(drafted=True)
    cache = theirs.request(drafted, SMALLEST).cache
    assert cache == ours.request(plain, SMALLEST).cache + small.request(plain, SMALLEST).cache
    limit = theirs.request(drafted, SMALLEST).total - 1
    theirs.admit(plain, limit)
    with pytest.raises(OutOfMemoryError):
        theirs.admit(drafted, limit)
    for model in (alone, both):
        model.close()


def test_what_cannot_be_a_draft_is_refused(folder: Path, tmp_path: Path) -> None:
    tiles = write(tmp_path / "tiles", sizes=Sizes(image_size=56))
    with pytest.raises(RequestError, match=f"^{tiles} cuts images into other tiles than {folder}"):
        load(folder, draft_model=tiles)
    words = write(tmp_path / "words")
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RequestError, match=f"^{words} has another vocabulary than {folder}"):
        load(folder, draft_model=words)
    plain = tmp_path / "qwen2"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(OneVisionError, match="qwen2"):
        load(folder, draft_model=plain)
    model = load(folder)
    with pytest.raises(RequestError, match="draft_tokens needs a draft model"):
        model.generate("hello", draft_tokens=4)


@pytest.mark.parametrize(
    "other", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {"logprobs": 1}]
)
def test_speculation_is_for_greedy_answers(model: Model, other: dict[str, Any]) -> None:
    for option in ("prompt_lookup", "draft_tokens"):
        settings: Any = {option: 4, **other}
        with pytest.raises(RequestError, match=f"{option} .* {next(iter(other))}"):
            model.generate("hello", **settings)


def test_one_draft_at_a_time_and_of_some_length(model: Model) -> None:
    with pytest.raises(RequestError, match=r"prompt_lookup .* draft_tokens"):
        model.generate("hello", prompt_lookup=4, draft_tokens=4)
    for option in ("prompt_lookup", "draft_tokens"):
        settings: Any = {option: 65}
        with pytest.raises(RequestError, match=f"{option} must be"):
            model.generate("hello", **settings)
