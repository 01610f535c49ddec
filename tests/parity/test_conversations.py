"""Conversations beyond one image and one question."""

import random
import re

import numpy as np
import pytest
from parity.cases import ask, picture, said
from parity.checkpoints import Tiny
from parity.compare import assert_same, assert_same_stages, assert_same_tokens
from parity.pairs import Checkpoints
from parity.tiny_tokenizer import SPECIAL_TOKENS
from prompts import tricky

KINDS = [Tiny(template=template) for template in ("space", "newline")]
MIXED = [(337, 511), (1, 37), (900, 30), (61, 241), (56, 56), (480, 640), (13, 17), (997, 331)]


CONVERSATIONS = {
    "text only": [said("user", "How many words are in this sentence?")],
    "no text": [said("user", picture((61, 241)))],
    "system": [said("system", "Answer in one word."), *ask(picture((127, 509)))],
    "several texts": [said("user", "First,", picture((55, 57)), "what is it?", " And why?")],
    "two turns": [
        said("user", picture((480, 640)), "What is this?"),
        said("assistant", "A red circle."),
        said("user", "And where is it?"),
    ],
    "image in the second turn": [
        said("user", "I will show you something."),
        said("assistant", "Please do."),
        said("user", picture((331, 997)), "What is this?"),
    ],
    "other scripts": [said("user", picture((28, 28)), "¿Qué es? 这是什么？ 🦊 e\u0301  \n\n\tfoo")],
    "placeholders last": [said("user", "Look:", picture((100, 100)))],
    # From here on each image is one square tile.
    "two images": ask(picture((480, 640)), picture((1, 37)), text="Which is larger?"),
    "the same image twice": ask(picture((61, 241)), picture((61, 241))),
    "three images": ask(*(picture(size) for size in MIXED[:3])),
    "eight images": ask(*(picture(size) for size in MIXED)),
    "images in two turns": [
        said("user", picture((127, 509)), "What is this?"),
        said("assistant", "A blue square."),
        said("user", picture((997, 331)), "And this?"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_conversation(checkpoints: Checkpoints, tiny: Tiny, name: str) -> None:
    ours, oracle = checkpoints.pair(tiny)
    assert_same(ours, oracle, CONVERSATIONS[name], tokens=32)


@pytest.mark.parametrize("name", ["two images", "three images", "images in two turns"])
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_images_in_a_flat_list(checkpoints: Checkpoints, tiny: Tiny, name: str) -> None:
    """The processor called with a prompt and a flat list of images tiles every one of them."""
    ours, oracle = checkpoints.pair(tiny)
    messages = CONVERSATIONS[name]
    theirs = oracle.run(messages, 32, oracle.prepare_flat(messages))
    assert len(theirs.tiles) > len(theirs.sizes) * 2
    assert_same_stages(ours, theirs, messages, 32, tiling="always")


def as_the_original_writes_it(messages: list[dict], template: str) -> str:
    """A prompt as LLaVA-NeXT's callers write one: media as ``<image>`` where they belong between
    the words, a newline after each; around it the turns of the checkpoint's own template.
    """
    opened, closed = {"space": (" \n", ""), "newline": ("\n", "\n")}[template]
    prompt = ""
    for message in messages:
        words, lead = "", ""
        for block in message["content"]:
            if block["type"] == "text":
                words += block["text"]
            elif words or template == "newline":
                words += "<image>\n"
            else:  # this template writes leading images into the line of the role
                lead += "<image>"
        start = opened.replace(" ", f" {lead}")
        prompt += f"<|im_start|>{message['role']}{start}{words}<|im_end|>{closed}"
    return f"{prompt}<|im_start|>assistant\n"


BETWEEN = {
    "the tutorial": [
        said(
            *("user", picture((337, 511)), "This is the first image. Can you describe it?\n\n"),
            *("Now, look at another image: ", picture((61, 241)), "What is different?"),
        )
    ],
    "last": [said("user", "What is in this picture?\n", picture((127, 509)))],
    "in two turns": [
        said("user", "One: ", picture((53, 31)), "two: ", picture((331, 97)), picture((8, 9))),
        said("assistant", "A red circle."),
        said("user", picture((13, 17)), "And this one, or ", picture((40, 50)), "this?"),
    ],
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_images_between_the_words(checkpoints: Checkpoints, tiny: Tiny, name: str) -> None:
    """``order="given"``. The original repository tokenizes what stands between two images on its
    own, and puts the images' rows there; transformers runs the network on the same prompt.
    """
    ours, oracle = checkpoints.pair(tiny)
    messages = BETWEEN[name]
    prompt = as_the_original_writes_it(messages, tiny.template)
    assert ours.model.render(messages, order="given") == prompt
    images = [b["image"] for m in messages for b in m["content"] if b["type"] == "image"]
    theirs = oracle.run(messages, 32, oracle.prepare_written(prompt, [images]))
    assert_same_stages(ours, theirs, messages, 32, order="given")

    inputs = ours.model.prepare(messages, order="given")
    held = ours.model.config.image_token_index
    first, *rest = (oracle.processor.tokenizer(text).input_ids for text in prompt.split("<image>"))
    rows = ([held] * medium.tokens for medium in inputs.media)
    expected = first + [i for row, text in zip(rows, rest, strict=True) for i in row + text]
    assert inputs.input_ids.tolist() == expected


@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_turn_after_turn(checkpoints: Checkpoints, tiny: Tiny) -> None:
    """A conversation that goes on reuses what was read; its answers stay the reference's."""
    ours, oracle = checkpoints.pair(tiny)
    messages = [said("user", picture((337, 511)), "What is in this picture?")]
    for question in ("Where is the square?", "How many are there?", "Which colour?"):
        theirs = oracle.run(messages, tokens=16)
        answer = ours.model.generate(messages=messages, max_tokens=16)
        assert_same_tokens(list(answer.tokens), theirs)
        messages = [*messages, said("assistant", "It is red."), said("user", question)]
    assert answer.usage.cached_tokens > 150


SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
APART = re.compile("[\u0338\U000f0000-\U0010ffff]")


def sanitisable(draw: random.Random) -> str:
    """A text of special strings and pieces of them that the reference can sanitise.

    It drops some private characters, keeps a combining stroke apart from a special string's last
    character, and counts a placeholder that would arise if another one in its midst were not there.
    """
    while True:
        text = APART.sub("", tricky(draw)) or "x"
        if not SPECIAL.search(SPECIAL.sub("", text)):
            return text


@pytest.mark.parametrize("tiny", KINDS, ids=lambda tiny: tiny.template)
def test_special_strings_in_texts(checkpoints: Checkpoints, tiny: Tiny) -> None:
    """2,000 texts: their ids are those of the reference's own ``sanitize_control_tokens``.

    One text a message, since the reference lets a special string arise from two that are joined.
    """
    ours, oracle = checkpoints.pair(tiny)
    draw = random.Random(tiny.template)
    image = picture((8, 8))
    for _ in range(500):
        first, second, third, fourth = (sanitisable(draw) for _ in range(4))
        messages = [said("system", first), said("user", image, second), said("assistant", third)]
        messages.append(said("user", fourth))
        theirs = oracle.processor.apply_chat_template(
            [messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
        )
        assert ours.model.prepare(messages).input_ids.tolist() == theirs["input_ids"][0]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty(checkpoints: Checkpoints, penalty: float) -> None:
    """It counts prompt and answer, and of an image only that there is one."""
    ours, oracle = checkpoints.pair(KINDS[0])
    messages = ask(picture((333, 334)))
    inputs = oracle.prepare(messages)
    output = oracle.model.generate(
        **inputs, max_new_tokens=32, do_sample=False, repetition_penalty=penalty
    )
    expected = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert ours.tokens(messages, 32, repetition_penalty=penalty) == expected


@pytest.mark.parametrize("template", ["space", "newline"])
def test_ends_where_the_reference_ends(checkpoints: Checkpoints, template: str) -> None:
    """generation_config.json may name several tokens that end an answer."""
    messages = ask(picture((337, 511)))
    endless = checkpoints.oracle(checkpoints.hub(Tiny(template=template))).run(messages, tokens=32)
    ends = [endless.tokens[20], endless.tokens[9]]
    settings = {"bos_token_id": 572, "pad_token_id": 572, "eos_token_id": ends}
    ours, oracle = checkpoints.pair(
        Tiny(template=template, files={"generation_config.json": settings})
    )
    theirs = assert_same(ours, oracle, messages, tokens=32)
    assert theirs.tokens[-1] in ends and len(theirs.tokens) <= 10
    answer = ours.model.generate(messages=messages, max_tokens=32)
    assert answer.finish_reason == "stop"


def test_ids_past_the_tokenizer(checkpoints: Checkpoints) -> None:
    """The embedding has more rows than the tokenizer has words; such an id decodes to nothing."""
    tiny = Tiny(spare_rows=3000)
    ours, oracle = checkpoints.pair(tiny)
    theirs = assert_same(ours, oracle, ask(picture((56, 56))), tokens=32)
    length = len(oracle.processor.tokenizer)
    assert np.mean([token >= length for token in theirs.tokens]) > 0.3
    text = ours.model.generate(messages=ask(picture((56, 56))), max_tokens=32).text
    kept = [token for token in theirs.tokens if token < length]
    assert text == oracle.processor.tokenizer.decode(kept, skip_special_tokens=True)
