"""Streams of ids and of text against the same thing done in one go."""

import json
import random
from pathlib import Path

import pytest
from hostile.sizes import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import checkpoint

from mlx_onevision.errors import RequestError
from mlx_onevision.prompt.tokenizer import Tokenizer
from mlx_onevision.sampling.detokenizer import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint(tmp_path_factory.mktemp("checkpoint")))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def test_random_ids_equal_the_full_decode(tokenizer: Tokenizer) -> None:
    """Any ids: lone bytes, special tokens, ids that no token has."""
    draw = random.Random(0)
    for _ in range(3000):
        ids = draw.choices(range(len(tokenizer) + 20), k=draw.randint(0, 30))
        ids += draw.choices(range(256), k=draw.randint(0, 8))
        ids.insert(draw.randint(0, len(ids)), 2**33)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_added_words_that_are_not_in_byte_letters(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    word = {"content": "two words 中", "special": False, "normalized": False, "single_word": False}
    word |= {"lstrip": False, "rstrip": False, "id": whole["added_tokens"][-1]["id"] + 1}
    whole["added_tokens"].append(word)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("a two words 中 b")
    assert word["id"] in ids
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "a two words 中 b"


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=cases(300, 10_000), deadline=None)
def test_deltas_are_whole_characters(text: str) -> None:
    class Bytes:
        def token_bytes(self, token_id: int) -> bytes:
            return bytes([token_id])

    detokenizer = Detokenizer(Bytes())
    deltas = [detokenizer.add(byte) for byte in text.encode()]
    assert all(len(delta) <= 1 for delta in deltas)
    assert [delta for delta in deltas if delta] == list(text) and detokenizer.finish() == ""


def test_an_unfinished_character_shows_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = [i for i in range(len(tokenizer)) if tokenizer.token_bytes(i) == "é".encode()[:1]][:1]
    assert streamed(tokenizer, ids) == ["", "\ufffd"]


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The rule, said plainly: one character at a time, until the text ends in a stop string."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


LETTERS = st.text("abc", max_size=30)


@given(LETTERS, st.lists(st.text("abc", min_size=1, max_size=5), max_size=4), st.randoms())
@settings(max_examples=cases(1000, 10_000), deadline=None)
def test_stop_strings_do_not_depend_on_the_chunks(
    text: str, stops: list[str], draw: random.Random
) -> None:
    stream, shown, rest = StopStrings(stops), "", text
    while rest:
        length = draw.randint(1, 7)
        shown += stream.add(rest[:length])
        rest = rest[length:]
        seen = text[: len(text) - len(rest)]
        if stream.found is None:  # held back: only what may still become a stop string
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not held or any(stop.startswith(held) for stop in stops)
    shown += stream.finish()
    assert (shown, stream.found) == cut(text, stops)


def test_nothing_comes_after_a_stop_string() -> None:
    stream = StopStrings(["END"])
    assert [stream.add(part) for part in ("one E", "N", "D two", "three")] == ["one ", "", "", ""]
    assert stream.found == "END" and stream.finish() == ""


def test_one_string_is_one_stop_string() -> None:
    assert StopStrings("ab").add("xaby") == "x"


@pytest.mark.parametrize("stops", [[""], [None], ["a", 3]])
def test_a_stop_string_is_a_text(stops: list) -> None:
    with pytest.raises(RequestError, match="stop string"):
        StopStrings(stops)
