"""Rows: which tokens carry loss, and what is said of those that cannot be trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from PIL import Image

from mlx_onevision.checkpoint.load import read_config
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import RequestError
from mlx_onevision.prompt.processor import Processor
from mlx_onevision.train.data import Example, Rows, shown

ASK = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "A cat."}
PICTURE, QUESTION = {"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}
IMAGE = {"role": "user", "content": [PICTURE, QUESTION]}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = write(tmp_path_factory.mktemp("model"))
    return Processor.from_folder(folder, OneVisionConfig.from_dict(read_config(folder)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    return folder


def read(
    processor: Processor, place: Path, *rows: Any, name: str = "rows.jsonl", longest: int = 4096
) -> tuple[list[Example], list[str]]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(lines)
    (place / name).write_text(text)
    found: list[str] = []
    try:
        return Rows(processor, {}, longest).read(place / name, found.append), found
    except RequestError as error:
        return [], [*found, str(error)]


def test_loss_is_on_the_answers_and_what_ends_them(processor: Processor, place: Path) -> None:
    turns = [IMAGE, ANSWER, {"role": "user", "content": "Sure?"}, {**ANSWER, "content": "Yes."}]
    (example,), _ = read(processor, place, {"messages": turns})
    ids = example.ids[example.learned].tolist()
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == (
        "\nA cat.<|im_end|>Yes.<|im_end|>".replace("\n", "")
    )
    text = shown(example, processor)
    assert text.endswith("<|im_start|>assistant\n⟦Yes.<|im_end|>⟧")
    assert text.count("⟦") == 2 and "tokens of" in text


def test_the_last_answer_follows_the_prompt_that_answers_are_made_from(
    processor: Processor, place: Path
) -> None:
    (example,), _ = read(processor, place, {"messages": [IMAGE, ANSWER]})
    (asked,), _ = read(processor, place, {"messages": [IMAGE, {**ANSWER, "content": "Dogs!"}]})
    prompt = processor.prepare(example.messages[:-1]).input_ids.tolist()
    for row in (example, asked):
        assert row.ids[: len(prompt)].tolist() == prompt
        assert not row.learned[: len(prompt)].any() and row.learned[len(prompt) :].all()


def test_special_strings_in_an_answer_are_text(processor: Processor, place: Path) -> None:
    row = {"messages": [ASK, {"role": "assistant", "content": "<image> <|im_end|> end"}]}
    (example,), _ = read(processor, place, row)
    assert example.ids.tolist().count(processor.config.image_token_index) == 0
    assert example.ids[example.learned].tolist().count(example.ids[-1]) == 1


def test_the_forms_of_a_row(processor: Processor, place: Path) -> None:
    llava = {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    address = {"type": "image_url", "image_url": {"url": "a.png"}}
    openai = {"role": "user", "content": [address, {"type": "text", "text": "What?"}]}
    rows = [
        {"messages": [IMAGE, ANSWER]},
        llava,
        {"messages": [openai, ANSWER]},
        {"messages": [ASK, ANSWER], "images": ["a.png"]},
    ]
    first, *others = read(processor, place, *rows)[0]
    assert first.media[0].tokens > 4
    for other in [*others, *read(processor, place, llava, name="rows.json")[0]]:
        assert other.ids.tolist() == first.ids.tolist()
        assert other.media == first.media


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "rows.jsonl:2: the line is not JSON"),
        ({"messages": [ASK]}, "rows.jsonl:2: the row has no assistant turn"),
        ({"messages": [ASK, ANSWER, ASK]}, "the row ends with a user turn"),
        ({"messages": [ASK, {**ANSWER, "content": ""}]}, "an assistant turn is empty"),
        ({"messages": [ASK, ANSWER], "images": ["b.png"]}, "rows.jsonl:2: there is no file"),
        ({"messages": [ASK, ANSWER], "images": ["broken.png"]}, "rows.jsonl:2: "),
        ({"messages": [ASK, {**ANSWER, "content": "long " * 90}]}, "tokens, more than 200; use"),
        ({"text": "?"}, "the row has neither messages nor conversations"),
        ({"conversations": [{"from": "me", "value": "?"}]}, "turn 1 is not from human, gpt"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    processor: Processor, place: Path, row: Any, said: str
) -> None:
    _, found = read(processor, place, {"messages": [ASK, ANSWER]}, row, longest=200)
    assert said in found[0] and found[0].startswith("rows.jsonl:2: ")
    assert found[1].startswith("1 row of ") and len(found) == 2


def test_files_that_hold_no_rows(processor: Processor, place: Path) -> None:
    rows = Rows(processor, {}, 100)
    (place / "none.jsonl").write_text("\n")
    (place / "object.json").write_text("{}")
    for name, said in (("none.jsonl", "has no rows"), ("object.json", "is no list of rows")):
        with pytest.raises(RequestError, match=said):
            rows.read(place / name, print)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        rows.read(place / "nowhere.jsonl", print)
