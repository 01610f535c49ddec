"""The tokenizer against ids recorded from transformers, and through every layout of files."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hostile.sizes import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import REFERENCE, SPECIALS, checkpoint, recorded, vocabulary

from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.prompt.tokenizer import (
    MOST_ADDED,
    PLACEHOLDERS,
    QWEN2_WORDS,
    Tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint(tmp_path_factory.mktemp("checkpoint")))


def split_files(folder: Path, *, special: bool = True) -> Path:
    """The recorded tokenizer as vocab.json, merges.txt and, with ``special``, added_tokens.json."""
    whole = json.loads((REFERENCE / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    if special:
        added = {token["content"]: token["id"] for token in whole["added_tokens"]}
        (folder / "added_tokens.json").write_text(json.dumps(added))
        names = {"eos_token": "<|im_end|>", "additional_special_tokens": list(SPECIALS)}
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def test_ids_equal_the_reference(tokenizer: Tokenizer) -> None:
    for case in recorded()["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_vocab_and_merges_give_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_folder(split_files(tmp_path))
    assert other.specials == tokenizer.specials and len(other) == len(tokenizer)
    for case in recorded()["texts"]:
        assert other.encode(case["text"]) == case["ids"]


def test_special_tokens_only_in_tokenizer_config(tmp_path: Path) -> None:
    split_files(tmp_path, special=False)
    first = vocabulary()
    decoder = {
        str(first + n): {"content": token, "special": True} for n, token in enumerate(SPECIALS)
    }
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": decoder}))
    expected = {token: first + n for n, token in enumerate(SPECIALS)}
    assert Tokenizer.from_folder(tmp_path).specials == expected


def test_names_without_an_id_get_the_next_one(tmp_path: Path) -> None:
    split_files(tmp_path, special=False)
    names = {"pad_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert set(tokenizer.specials) == {"<|endoftext|>", "<|im_end|>"}
    assert set(tokenizer.specials.values()) == {vocabulary(), vocabulary() + 1}


def test_names_without_an_id_are_numbered_in_the_references_order(tmp_path: Path) -> None:
    split_files(tmp_path, special=False)
    names = {
        "own_token": "<own>",
        "model_max_length": "none",
        "extra_special_tokens": {"x": "<extra>"},
        "additional_special_tokens": ["<more>"],
        **{f"{name}_token": f"<{name}>" for name in ("mask", "cls", "pad", "sep", "unk", "eos")},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_folder(tmp_path)
    order = ("eos", "unk", "sep", "pad", "cls", "mask", "more", "extra", "own")
    assert tokenizer.specials == {f"<{name}>": vocabulary() + n for n, name in enumerate(order)}
    assert tokenizer.agrees_with(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert not tokenizer.agrees_with(checkpoint(other))


def test_placeholders_are_special_even_where_they_were_added_as_words(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in whole["added_tokens"]:
        token["special"] = token["content"] not in ("<image>", "<video>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert set(tokenizer.specials) == set(SPECIALS)
    assert tokenizer.token_to_id("<image>") == tokenizer.specials["<image>"]
    assert tokenizer.specials["<image>"] not in tokenizer.encode("a <image> b")


def test_the_other_files_make_a_word_of_tokenizer_json_special(tmp_path: Path) -> None:
    """By the token's own entry, or because a name stands for it."""
    checkpoint(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in whole["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    ids = {token["content"]: token["id"] for token in whole["added_tokens"]}
    decoder = {
        str(ids["<|im_start|>"]): {"content": "<|im_start|>", "special": True},
        str(ids["<|im_end|>"]): {"content": "<|im_end|>", "special": False},
        str(ids["<|endoftext|>"]): {"content": "<|endoftext|>", "special": False},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    specials = Tokenizer.from_folder(tmp_path).specials
    names = ("<|im_start|>", "<|im_end|>", *PLACEHOLDERS)
    assert specials == {name: ids[name] for name in names}


@pytest.mark.parametrize(
    "rule", ["ByteLevel", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation"]
)
def test_each_supported_rule_is_read(tmp_path: Path, rule: str) -> None:
    fields = {
        "ByteLevel": {"add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "Split": {"pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
        "Digits": {"individual_digits": True},
        "Punctuation": {"behavior": "Isolated"},
    }.get(rule, {})
    folder = changed(tmp_path, pre_tokenizer={"type": rule, **fields})
    assert len(Tokenizer.from_folder(folder)) > 0


@pytest.mark.parametrize(
    "rule", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"]
)
def test_each_supported_normalizer_is_read(tmp_path: Path, rule: str) -> None:
    fields = {"strip_left": True, "strip_right": True} if rule == "Strip" else {}
    one = {"type": rule, **fields}
    folder = changed(tmp_path, normalizer={"type": "Sequence", "normalizers": [one, one]})
    assert len(Tokenizer.from_folder(folder)) > 0


def test_an_added_word_is_one_token_of_a_text_and_no_control_token(tmp_path: Path) -> None:
    split_files(tmp_path)
    file = tmp_path / "added_tokens.json"
    added: dict[str, int] = json.loads(file.read_text())
    index = max(added.values()) + 1
    file.write_text(json.dumps({**added, "<word>": index}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert index in tokenizer.encode("a <word> b") and "<word>" not in tokenizer.specials
    assert tokenizer.decode(tokenizer.encode("a <word> b")) == "a <word> b"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("count", [MOST_ADDED, MOST_ADDED + 1])
def test_so_many_added_tokens_are_read(tmp_path: Path, count: int, named: bool) -> None:
    split_files(tmp_path, special=False)
    first, names = vocabulary(), [f"<{n}>" for n in range(count)]
    added: dict[str, Any] = {name: first + n for n, name in enumerate(names)}
    file = "special_tokens_map.json" if named else "added_tokens.json"
    content = {"additional_special_tokens": names} if named else added
    (tmp_path / file).write_text(json.dumps(content))
    if count == MOST_ADDED:
        began = time.thread_time()
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert len(tokenizer) == first + count and len(tokenizer.specials) == count * named
        assert time.thread_time() - began < 1  # 5 s, as long as they were added one by one
        return
    with pytest.raises(CheckpointError, match=r"has 4,097 added tokens; 4,096 are supported"):
        Tokenizer.from_folder(tmp_path)


def test_a_word_that_is_named_as_padding_stays_a_word(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert "!" not in tokenizer.specials
    assert tokenizer.decode(tokenizer.encode("oh!")) == "oh!"


@given(text=st.text(st.characters(codec="utf-8")))
@settings(max_examples=cases(200, 2000), deadline=None)
def test_no_text_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    for tricky in (text, "<image>".join(text), f"<|im_start|>{text}<|im_end|>"):
        ids = tokenizer.encode(tricky)
        assert not set(ids) & set(tokenizer.specials.values())


def test_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    for text in ("plain", "<image> <|im_start|>user\n", "é 中 😀 \u200d \r\n\t", "< image>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_without_a_token_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hi")
    assert tokenizer.decode([-1, ids[0], len(tokenizer), 10**9, 2**40, *ids[1:]]) == "Hi"
    assert tokenizer.id_to_token(2**40) is None and tokenizer.token_bytes(10**9) == b""


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("\ud800")


def changed(folder: Path, **parts: object) -> Path:
    whole = json.loads((REFERENCE / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**whole, **parts}))
    return folder


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = Tokenizer.from_folder(changed(tmp_path, truncation=truncation, padding=padding))
    assert len(tokenizer.encode("a")) == 1
    assert len(tokenizer.encode("one two three four five six")) > 3


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        ({"decoder": None}, "none"),
        ({"model": {"type": "Nonsense"}}, "tokenizer.json"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<image>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [],
                    "special_tokens": {
                        "<image>": {"id": "<image>", "ids": [1], "tokens": ["<image>"]}
                    },
                }
            },
            "around every text",
        ),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, parts: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.from_folder(changed(tmp_path, **parts))


def test_a_special_token_that_eats_spaces_is_refused(tmp_path: Path) -> None:
    whole = json.loads((REFERENCE / "tokenizer.json").read_text())
    whole["added_tokens"][3]["lstrip"] = True
    with pytest.raises(CheckpointError, match="lstrip"):
        Tokenizer.from_folder(changed(tmp_path, added_tokens=whole["added_tokens"]))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("added_tokens.json", '{"<image>": 9}', "<image>.* 9 "),
        ("added_tokens.json", '{"<image>": "many"}', "added_tokens.json"),
        ("added_tokens.json", "[1]", "added_tokens.json"),
        ("added_tokens.json", "{", "added_tokens.json"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": 4}}', "tokenizer_config.json"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, named: str) -> None:
    checkpoint(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="merges"):
        Tokenizer.from_folder(tmp_path)
