"""The caches of several conversations: each goes on where it was, alone and in company, and what is
kept is bounded.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from images import picture

from mlx_onevision.api import Model, load
from mlx_onevision.engine import runner as runner_module
from mlx_onevision.engine.prefix_cache import Kept, PrefixCache
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.network import feature_bank as bank
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.sampling.sampler import RequestSampler

TOKENS = 12
MANY = 5
Conversation = list[dict[str, Any]]


def about(seed: int, text: str = "what is in this picture, and where") -> Conversation:
    content = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def gone_on(conversation: Conversation, answer: str, text: str = "and then") -> Conversation:
    said = [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return [*conversation, *said]


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    model = load(folder)
    yield model
    model.close()


def _nothing(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def cold(folder: Path) -> Iterator[Model]:
    """Keeps nothing from one question to the next."""
    model = load(folder)
    model._engine._worker.call(lambda runner: setattr(runner.prefix, "match", lambda _: 0))
    model._engine._worker.call(lambda runner: setattr(runner.prefix, "store", lambda *_: None))
    model._engine._worker.call(
        lambda runner: setattr(runner.prefix, "store_from_batch", lambda *_: None)
    )
    yield model
    model.close()


def prefix(model: Model) -> tuple[int, int, int]:
    """How many conversations are kept, in how many bytes, of at most how many."""
    return model._engine._worker.call(
        lambda runner: (len(runner.prefix._kept), runner.prefix.nbytes, runner.prefix.capacity)
    )


def set_capacity(model: Model, nbytes: int) -> None:
    model._engine._worker.call(lambda runner: setattr(runner.prefix, "capacity", nbytes))


def test_conversations_that_take_turns_are_each_kept(model: Model, cold: Model) -> None:
    talks = [about(seed) for seed in range(MANY)]
    for turn in range(3):
        for number, talk in enumerate(talks):
            answer = model.generate(messages=talk, max_tokens=TOKENS)
            assert answer.tokens == cold.generate(messages=talk, max_tokens=TOKENS).tokens
            assert answer.usage.encoded_media == (turn == 0)
            if turn:
                assert answer.usage.cached_tokens > answer.usage.prompt_tokens // 2
            talks[number] = gone_on(talk, answer.text)
    assert prefix(model)[0] == MANY  # an earlier turn is part of the later one


def test_what_is_kept_is_bounded_and_the_oldest_goes(model: Model) -> None:
    model.generate(messages=about(0), max_tokens=TOKENS)
    _, one, _ = prefix(model)
    set_capacity(model, 3 * one)
    for seed in range(1, MANY):
        model.generate(messages=about(seed), max_tokens=TOKENS)
        kept, nbytes, most = prefix(model)
        assert nbytes <= most and kept <= 3
    cached = [
        model.generate(messages=about(seed), max_tokens=TOKENS).usage.cached_tokens
        for seed in (MANY - 1, MANY - 2, 0)
    ]
    assert cached[0] > 64 and cached[1] > 64 and cached[2] == 0
    set_capacity(model, 0)  # the last one is kept all the same
    model.generate(messages=about(7), max_tokens=TOKENS)
    assert prefix(model)[0] == 1
    assert model.generate(messages=about(7), max_tokens=TOKENS).usage.cached_tokens > 64


def test_of_two_that_begin_alike_neither_takes_the_other_s(model: Model, cold: Model) -> None:
    system = {"role": "system", "content": "be brief and say only what is to be seen " * 9}
    talks = [[system, *about(seed, "tell me all " * 60)] for seed in range(2)]
    shared = []
    for turn in range(2):
        for number, talk in enumerate(talks):
            answer = model.generate(messages=talk, max_tokens=TOKENS)
            assert answer.tokens == cold.generate(messages=talk, max_tokens=TOKENS).tokens
            shared.append(answer.usage.cached_tokens)
            assert answer.usage.encoded_media == (turn == 0)
            talks[number] = gone_on(talk, answer.text)
    assert shared[0] == 0 and shared[1] >= 64
    assert shared[2] > 2 * shared[1] and shared[3] > 2 * shared[1]


def test_the_next_turns_of_many_are_asked_together(model: Model, cold: Model) -> None:
    """From alone to company and back: whoever answered first, nothing is read again."""
    talks = [about(seed) for seed in range(MANY)]
    first = [model.generate(messages=talk, max_tokens=TOKENS) for talk in talks]
    talks = [gone_on(talk, answer.text) for talk, answer in zip(talks, first, strict=True)]
    for _ in range(2):
        answers = model.generate(batch=talks, max_tokens=TOKENS)
        for number, (talk, answer) in enumerate(zip(talks, answers, strict=True)):
            assert answer.tokens == cold.generate(messages=talk, max_tokens=TOKENS).tokens
            assert answer.usage.encoded_media == 0
            assert answer.usage.cached_tokens > answer.usage.prompt_tokens // 2
            talks[number] = gone_on(talk, answer.text)
    for talk in talks:
        answer = model.generate(messages=talk, max_tokens=TOKENS)
        assert answer.tokens == cold.generate(messages=talk, max_tokens=TOKENS).tokens
        assert answer.usage.encoded_media == 0 and answer.usage.cached_tokens > 64


def test_one_that_had_company_is_kept(model: Model, cold: Model) -> None:
    talk = about(0, "tell a long story " * 20)
    stream = model.stream(messages=talk, max_tokens=80)
    next(stream)
    assert model.generate("company", max_tokens=4).usage.completion_tokens == 4
    answer = stream.result()
    assert answer.tokens == cold.generate(messages=talk, max_tokens=80).tokens
    talk = gone_on(talk, answer.text)
    again = model.generate(messages=talk, max_tokens=TOKENS)
    assert again.tokens == cold.generate(messages=talk, max_tokens=TOKENS).tokens
    assert again.usage.encoded_media == 0 and again.usage.cached_tokens > 64


def test_one_that_had_company_when_the_bank_was_full(model: Model, cold: Model) -> None:
    """Its rows go in the moment in which it is left off; its ids must not."""
    set_capacity(model, 0)
    model._engine._worker.call(lambda runner: setattr(runner.model.bank, "capacity", 1))
    talks = [about(seed, "tell a long story " * 20) for seed in range(3)]
    for talk, other in zip(talks, talks[1:] + talks[:1], strict=True):
        stream = model.stream(messages=talk, max_tokens=80)
        next(stream)
        joined = model.generate(messages=other, max_tokens=TOKENS)
        assert joined.tokens == cold.generate(messages=other, max_tokens=TOKENS).tokens
        assert stream.result().tokens == cold.generate(messages=talk, max_tokens=80).tokens


def test_many_small_ones_are_bounded_in_number(model: Model) -> None:
    """Every one is looked at with every request, so memory must not be the only bound."""
    for number in range(40):
        model.generate(f"{number} is a number " * 20, max_tokens=1)
    assert prefix(model)[0] == 32


@pytest.mark.parametrize("shared", [0, 1, 63, 64, 65, 99, 100])
def test_what_two_have_in_common(shared: int) -> None:
    kept = Kept(list(range(100)), (), [], 0)
    assert kept.common([*range(shared), *range(1000, 1050)]) == shared
    assert kept.common(list(range(shared))) == shared


def test_one_that_a_stop_text_ended_in_company_is_kept(model: Model) -> None:
    talks = [about(seed) for seed in range(3)]
    whole = model.generate(batch=talks, max_tokens=TOKENS)
    model._engine._worker.call(lambda runner: runner.prefix.clear())
    stop = whole[1].text[len(whole[1].text) // 2 :][:3]
    answers = model.generate(batch=talks, max_tokens=TOKENS, stop=(stop,))
    assert answers[1].finish_reason == "stop" and len(answers[1].text) < len(whole[1].text)
    talk = gone_on(talks[1], answers[1].text)
    assert model.generate(messages=talk, max_tokens=1).usage.encoded_media == 0


def test_ids_stay_their_medium_s_while_an_answer_or_a_cache_has_them(
    model: Model, cold: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly more ids than are held at once, and rows that go as soon as they were read: every
    range is used again and again.
    """
    tokens = int((model.prepare(about(0)).input_ids == model.config.image_token_index).sum())
    runner = model._engine._worker
    runner.call(lambda owned: setattr(owned.model.bank, "capacity", 1))
    first = model.config.text_config.vocab_size
    monkeypatch.setattr(bank, "LAST_ID", first + 9 * tokens - 1)
    _, _, most = prefix(model)
    for seed in range(0, 24, 4):
        set_capacity(model, most if seed % 8 else 1 << 20)
        talks = [about(seed + number) for number in range(4)]
        for _ in range(2):
            answers = model.generate(batch=talks, max_tokens=TOKENS)
            for number, (talk, answer) in enumerate(zip(talks, answers, strict=True)):
                expected = cold.generate(messages=talk, max_tokens=TOKENS)
                assert answer.tokens == expected.tokens, (seed, number)
                talks[number] = gone_on(talk, answer.text)
        runner.call(lambda owned: owned.prefix.clear())
    # Nothing is held for ever.
    left = runner.call(lambda owned: list(owned.model.bank._entries.values()))
    assert all(entry.prompts == 0 and entry.requests == 0 for entry in left)


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd")])
def test_an_error_of_a_lone_request_costs_no_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model = load(folder)
    try:
        set_capacity(model, 1 << 30)
        talks = [about(seed) for seed in range(3)]
        answers = [model.generate(messages=talk, max_tokens=4) for talk in talks]
        before, _, _ = prefix(model)
        accept = RequestSampler.accept_token

        def failing(sampler: RequestSampler, token: int) -> None:
            raise error

        monkeypatch.setattr(RequestSampler, "accept_token", failing)
        with pytest.raises(type(error), match=str(error)):
            model.generate(messages=gone_on(talks[0], answers[0].text), max_tokens=4)
        monkeypatch.setattr(RequestSampler, "accept_token", accept)
        assert prefix(model)[0] == before
        fresh = load(folder)
        for talk, answer in zip(talks, answers, strict=True):
            messages = gone_on(talk, answer.text)
            again = model.generate(messages=messages, max_tokens=4)
            assert again.usage.cached_tokens > 0 and again.usage.encoded_media == 0
            assert again.tokens == fresh.generate(messages=messages, max_tokens=4).tokens
        fresh.close()
    finally:
        model.close()


def test_a_conversation_is_kept_whose_next_image_cannot_be_encoded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, encode = about(1), OneVision.encode_groups
    answer = model.generate(messages=first, max_tokens=4)

    def failing(
        network: OneVision, media: Sequence[Any], launched: Callable[[], None]
    ) -> Iterator[Any]:
        for group in encode(network, media, launched):
            yield group
            raise RuntimeError("odd")

    monkeypatch.setattr(OneVision, "encode_groups", failing)
    with pytest.raises(RuntimeError, match="odd"):
        model.generate(messages=[*gone_on(first, answer.text)[:2], *about(2)], max_tokens=4)
    monkeypatch.undo()
    again = model.generate(messages=gone_on(first, answer.text), max_tokens=4)
    assert again.usage.cached_tokens > 64 and again.usage.encoded_media == 0


def test_the_next_turn_finds_room_in_the_cache(model: Model) -> None:
    """A cache that has to grow is copied before anything else is done."""

    def room() -> int:
        return model._engine._worker.call(lambda r: r.prefix._kept[-1].cache[0].keys.shape[2])

    first = about(1)
    answer = model.generate(messages=first, max_tokens=4)
    before = room()
    again = model.generate(messages=gone_on(first, answer.text, "and " * 100), max_tokens=4)
    assert again.usage.cached_tokens > 64 and room() == before


@pytest.mark.parametrize("place", ["room", "tiles", "prefill"])
def test_kept_caches_go_where_memory_runs_out(
    model: Model, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """So that the next request has it, whatever of a request it was that took too much."""
    set_capacity(model, 1 << 30)
    for seed in range(2):
        model.generate(messages=about(seed), max_tokens=4)
    assert prefix(model)[0] == 2

    def failing(*_: Any) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    if place == "room":
        monkeypatch.setattr(runner_module, "reserve", failing)
    elif place == "tiles":
        monkeypatch.setattr(OneVision, "encode_groups", failing)
    else:
        monkeypatch.setattr(OneVision, "embed", failing)
    with pytest.raises(OutOfMemoryError):
        model.generate(messages=about(2), max_tokens=4)
    assert prefix(model)[0] == 0


def test_a_cache_too_large_for_what_is_kept_is_not_computed(folder: Path) -> None:
    asked: list[str] = []

    class Layer:
        nbytes = 100

        @property
        def state(self) -> tuple[Any, Any, int]:
            asked.append("its state")
            raise RuntimeError("[malloc] unable to allocate")

    model = load(folder)
    try:
        kept = PrefixCache(model._engine._worker.call(lambda runner: runner.model), capacity=199)
        kept.store_from_batch(range(99), (), [Layer(), Layer()])
        assert kept.nbytes == 0 and not asked
        kept.capacity = 200
        kept.store_from_batch(
            range(99), (), [Layer(), Layer()]
        )  # and where there is no memory, neither
        assert kept.nbytes == 0 and asked
    finally:
        model.close()


def test_what_goes_wrong_with_a_cache_leaves_nobody_waiting(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("gone")

    alone = model.generate(messages=about(0), max_tokens=TOKENS).text
    monkeypatch.setattr(PrefixCache, "store_from_batch", fail)
    with pytest.raises(KeyError):  # told, not left waiting
        model.generate(batch=[about(0), about(1)], max_tokens=TOKENS)
    monkeypatch.undo()
    assert model.generate(messages=about(0), max_tokens=TOKENS).text == alone
