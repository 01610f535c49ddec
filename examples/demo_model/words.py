"""The demo model's tokenizer: Qwen2's kind of byte-level BPE, trained on the world's sentences.

All 256 bytes are in the vocabulary, so any text encodes; the world's own words are single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from random import Random

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from examples.demo_model import narrating, questions
from examples.demo_model.offtopic import ANSWER
from examples.demo_model.phrases import vary
from examples.demo_model.scenes import sample_scene, sample_video

END_OF_TEXT, START, END, IMAGE, VIDEO = SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
)
VOCABULARY = 640  # embedding rows; a few more than there are tokens, as in the published models
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentences(count: int, seed: int) -> Iterator[str]:
    """Questions and answers of the demo world."""
    rng = Random(seed)
    yield from ("user", "assistant", "system", ANSWER) * 50
    for _ in range(count):
        scenes = [
            sample_scene(rng, (256, 256), rng.randint(1, 3)) for _ in range(rng.randint(2, 4))
        ]
        video = sample_video(rng, (240, 320), rng.randint(1, 2))
        turns = [questions.ask_picture(rng, scenes[0], kind) for kind in questions.ASKERS]
        turns += [questions.ask_images(rng, scenes, kind) for kind in questions.MULTI_KINDS]
        turns += [questions.ask_images(rng, scenes, "colour"), questions.ask_no_image(rng)]
        turns += [questions.ask_video(rng, video, kind) for kind in ("motion", "list", "count")]
        turns += [narrating.ask_segment(rng, video), narrating.ask_empty(rng)]
        turns.append(
            narrating.ask_told(narrating.sample_story(rng), rng.choice(("title", "summary")))
        )
        for turn in turns:
            if turn is not None:
                yield from (vary(rng, turn[1]), turn[2])


def build_tokenizer(count: int = 3000, seed: int = 0) -> Tokenizer:
    """The tokenizer; the same one every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sentences(count, seed), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each special token."""
    return {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}


class Words:
    """Token ids of the pieces that a conversation is made of, remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._remembered = lru_cache(maxsize=60_000)(self._encode)
        self.prefix = self.encode(f"{START}user ")
        self.reply = self.encode(f"{END}{START}assistant\n")
        self.replied = self.encode(f"{END}{START}assistant \n")
        self.next = self.encode(f"{END}{START}user \n")
        self.end = self.encode(END)
        self.newline = self.encode("\n")

    def encode(self, text: str) -> tuple[int, ...]:
        return self._remembered(text) if len(text) < 120 else self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)
