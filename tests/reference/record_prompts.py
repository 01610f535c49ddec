"""Records what transformers makes of texts and conversations: tokenizer.json and prompts.json.

    python tests/reference/record_prompts.py      (in the environment of ``make parity``)

The tokenizer is a small one of the same kind as the published checkpoints' (byte-level BPE, NFC,
Qwen2's words), trained on the sentences below; the two templates are written after the two that the
published checkpoints have had. ids are recorded as runs, ``[id, times]``.
"""

import itertools
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

from parity import torchvision_ops  # noqa: F401  before transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlavaOnevisionProcessor, PreTrainedTokenizerFast

HERE = Path(__file__).parent
TILE, PATCH = 56, 14
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = """
What is shown in this image? Describe the picture in a few words. How many people are there?
The quick brown fox jumps over the lazy dog, and the dog doesn't mind. I'll say it's fine;
we've seen worse. user assistant system You are a helpful assistant. image video start end text
Was ist auf dem Bild zu sehen? Größe, Straße, schön. Où est le café? Une image et une vidéo, s'il
vous plaît. 这张图片里有什么? 図に何がありますか. Что на картинке? 사진에 무엇이 있나요?
¿Qué hay aquí? 😀 👍🏽
    if x < 3 and y > 4:
        return {"a": [1, 2, 3], "b": x <= y}
""".splitlines()

SPACE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}"
    "{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NEWLINE = """\
{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\\n'}}\
{# all images first, then all videos, then all text #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}
{{ '<image>\\n' }}\
{% endfor %}
{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}
{{ '<video>\\n' }}\
{% endfor %}
{% if message['role'] != 'assistant' %}
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}
{{ content['text'] }}\
{% endfor %}
{% else %}
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}
{% generation %}
{{ content['text'] }}\
{% endgeneration %}
{% endfor %}
{% endif %}
{{'<|im_end|>\\n'}}\
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}\
{% endif %}
"""


def text(*parts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part} for part in parts]


def image(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"type": "image", "size": size} for size in sizes]


def user(*blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": list(itertools.chain(*blocks))}


def said(role: str, *parts: str) -> dict[str, Any]:
    return {"role": role, "content": text(*parts)}


QUESTION = "What is shown in this image?"
SIZES = [(1, 1), (56, 56), (100, 37), (37, 100), (300, 200), (57, 400), (336, 336), (500, 30)]
SIZES += [(5, 640), (168, 171), (251, 333), (1, 300), (300, 1), (224, 225)]
CONVERSATIONS = [
    [user(text("Hi"))],
    [said("system", "You are terse."), user(text("  leading and trailing  "))],
    [user(text("\n\nnewlines first\n"))],
    [user(text("two ", "parts"))],
    [user(text("e\u0301 and ﬁ and A\u030a"))],
    [user(text("\u0301combining first"))],
    [user(text("'s a word, 'LL be fine"))],
    [user(text("这张图片里有什么? 😀👍🏽"))],
    [user(image((40, 40)), text(""))],
    [user(text("a < b > c | d <im age> < image> <|im|>"))],
    [user(text("Q1")), said("assistant", " A1 "), user(text("Q2"))],
    *[[user(image(size), text(QUESTION))] for size in SIZES],
    [user(image((90, 200)))],
    [user(text("before "), image((90, 200)), text("after"))],
    [user(image((90, 200), (300, 20)), text("Which is wider?"))],
    [user(image((10, 10), (20, 20), (30, 300)), text("Which?"), text("\nSay why."))],
    [
        said("system", "S"),
        user(image((90, 200)), text("Q1")),
        said("assistant", "A1"),
        user(image((30, 40)), text("Q2")),
    ],
    [user(image((90, 200)), text("Q1")), said("assistant", "A1"), user(text("And now?"))],
]


def make_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(SENTENCES, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    backend.add_special_tokens(special)
    return backend


def make_processor(folder: Path, backend: Tokenizer, template: str) -> LlavaOnevisionProcessor:
    pinpoints = [[TILE * h, TILE * w] for h in range(1, 7) for w in range(1, 7)]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>", "<video>"],
    )
    fast.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    size = {
        "size": {"height": TILE, "width": TILE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    files = {
        "preprocessor_config": {
            **size,
            "image_grid_pinpoints": pinpoints,
            "image_processor_type": "LlavaOnevisionImageProcessor",
        },
        "video_preprocessor_config": {
            **size,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        "processor_config": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (TILE // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return LlavaOnevisionProcessor.from_pretrained(folder)


def with_pixels(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with a black picture for every size."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": Image.new("RGB", block["size"][::-1])}
                if block["type"] == "image"
                else block
                for block in message["content"]
            ],
        }
        for message in conversation
    ]


def runs(ids: list[int]) -> list[list[int]]:
    return [[value, len(list(group))] for value, group in itertools.groupby(ids)]


def random_texts(count: int) -> list[str]:
    """Words, spaces, signs and letters of many scripts, from a seed."""
    draw = random.Random(0)
    parts = [
        *"".join(SENTENCES).split(),
        *" \n\t\r.,;:!?<>|'\"(){}[]0123456789-_=+*/\\",
        "  ",
        "\r\n",
    ]
    parts += [
        "é",
        "e\u0301",
        "ß",
        "中",
        "の",
        "한",
        "😀",
        "👩\u200d👩\u200d👧",
        "\u00a0",
        "\u3000",
        "ﬁ",
        "\u0301",
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 25))) for _ in range(count)]


def main() -> None:
    backend = make_tokenizer()
    backend.save(str(HERE / "tokenizer.json"), pretty=False)
    cases: list[dict[str, Any]] = []
    for template in (SPACE, NEWLINE):
        with tempfile.TemporaryDirectory() as folder:
            processor = make_processor(Path(folder), backend, template)
        for conversation in CONVERSATIONS:
            messages = with_pixels(conversation)
            outputs: Any = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, add_generation_prompt=True
            )
            cases.append(
                {
                    "template": "space" if template is SPACE else "newline",
                    "messages": conversation,
                    "prompt": processor.apply_chat_template(messages, add_generation_prompt=True),
                    "ids": runs(outputs["input_ids"][0]),
                }
            )
    tokenizer = processor.tokenizer
    texts = [
        {"text": one, "ids": tokenizer(one, add_special_tokens=False).input_ids}
        for one in random_texts(200)
    ]
    recorded = {"templates": {"space": SPACE, "newline": NEWLINE}, "cases": cases, "texts": texts}
    lines = json.dumps(recorded, separators=(",", ":"))
    (HERE / "prompts.json").write_text(lines.replace('{"t', '\n{"t') + "\n")


if __name__ == "__main__":
    main()
