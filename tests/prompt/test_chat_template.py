"""Prompts against the recorded ones, and user text that tries to be more than text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from prompts import SPECIALS, cases, recorded, tricky

from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.prompt.chat_template import PLACEHOLDER_CHARS, ChatTemplate

A = "<|im_start|>system \nS<|im_end|><|im_start|>user <image><image>\nQ1<|im_end|>"
A += "<|im_start|>assistant \nA1<|im_end|><|im_start|>user <video>\nQ2\nQ3<|im_end|>"
A += "<|im_start|>assistant\n"
B = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\n<image>\nQ1<|im_end|>\n"
B += "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\n<video>\nQ2Q3<|im_end|>\n"
B += "<|im_start|>assistant\n"


def says(role: str, *blocks: str) -> dict[str, Any]:
    """A message; "image" and "video" are such blocks, anything else is text."""
    content = [
        {"type": block} if block in ("image", "video") else {"type": "text", "text": block}
        for block in blocks
    ]
    return {"role": role, "content": content}


CONVERSATION = [
    says("system", "S"),
    says("user", "Q1", "image", "image"),
    says("assistant", "A1"),
    says("user", "video", "Q2", "Q3"),
]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(recorded()["templates"][name])


def test_both_generations_render_as_the_reference_does() -> None:
    assert template("space").render(CONVERSATION) == A
    assert template("newline").render(CONVERSATION) == B


@pytest.mark.parametrize("name", ["space", "newline"])
def test_recorded_prompts(name: str) -> None:
    chat = template(name)
    for case in cases(name):
        assert chat.render(case["messages"]) == case["prompt"]
        segments = chat.segments(case["messages"], SPECIALS)
        assert "".join(segment.text for segment in segments) == case["prompt"]


def test_the_original_checkpoints_prompt() -> None:
    built_in = ChatTemplate.from_folder(Path("there is no such folder"))
    assert built_in.render([says("user", "image", "What is this?")]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert built_in.render(CONVERSATION) == B
    assert built_in.render([says("system", "S")], False) == "<|im_start|>system\nS<|im_end|>\n"


def test_which_file_has_the_template(tmp_path: Path) -> None:
    def rendered() -> str:
        return ChatTemplate.from_folder(tmp_path).render([says("user", "Q")])

    language_only = "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}"
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": language_only}))
    assert rendered().startswith("<|im_start|>system\nYou are")
    named = [{"name": "tool", "template": "image"}, {"name": "default", "template": "image 1"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered() == "image 1"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "2"}))
    assert rendered() == "2"
    (tmp_path / "chat_template.jinja").write_text("3")
    assert rendered() == "3"


def test_named_tokens_are_variables(tmp_path: Path) -> None:
    settings = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<pad>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ pad_token }}")
    assert ChatTemplate.from_folder(tmp_path).render([]) == "<|im_end|><pad>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff"),
        ("chat_template.json", b"{"),
        ("chat_template.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_sees_no_path() -> None:
    block = {"type": "image", "image": "/home/me/secret.png"}
    message = {"role": "user", "content": [block]}
    assert "secret" not in ChatTemplate("{{ messages | tojson }}").render([message])


TEMPLATES = {
    **recorded()["templates"],
    # Trims, joins and repeats what the user wrote; puts pieces of special strings beside it.
    "trims": "{% for m in messages %}<|im_start|>{{ m.role }}:<image{% for c in m.content %}"
    "{{ c.text | trim }}{{ c.text }}{% endfor %}{{ m.content | map(attribute='text') | join }}"
    "image><|im_end|>{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_user_text_never_becomes_control(name: str) -> None:
    """2,000 texts: the control segments are those of the same conversation about nothing."""
    chat, draw = ChatTemplate(TEMPLATES[name]), random.Random(0)
    for _ in range(700):
        parts = [tricky(draw, most=5) for _ in range(3)]
        roles = ["user", "assistant", "user"] if draw.random() < 0.5 else ["user"]
        images = [] if name == "trims" else ["image"] * draw.randint(0, 3)
        media = says("user", *images)["content"]
        conversation, harmless = (
            [
                {"role": role, "content": media + [{"type": "text", "text": t} for t in texts]}
                for role in roles
            ]
            for texts in (parts, ["x" for _ in parts])
        )
        segments = chat.segments(conversation, SPECIALS)
        expected = [s.text for s in chat.segments(harmless, SPECIALS) if s.control]
        assert [s.text for s in segments if s.control] == expected
        assert "".join(s.text for s in segments) == chat.render(conversation)


def test_special_strings_that_overlap_and_repeat() -> None:
    chat = ChatTemplate("ab{% for m in messages %}{{ m.content[0].text }}ab{% endfor %}")
    specials = ["ab", "aba", "bb", "a"]
    for text in ("a", "b", "ab", "aba", "abab", "bbb", "aaaa", "c"):
        segments = chat.segments([says("user", text)], specials)
        assert [s.text for s in segments if s.control] == ["ab", "ab"]
        assert "".join(s.text for s in segments) == f"ab{text}ab"


def test_text_of_every_private_character_is_refused() -> None:
    text = "<image>" + "".join(map(chr, PLACEHOLDER_CHARS))
    with pytest.raises(RequestError, match="private"):
        template("space").segments([says("user", text)], SPECIALS)
