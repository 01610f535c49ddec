"""A byte-level BPE tokenizer of a few hundred words, built like Qwen2's: the same normaliser, the
same splitting rule and the same kind of special tokens, with a vocabulary written down here.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = """
system user assistant describe what which where how many is are in the this that image picture
video of a an and or to it there colour shape red green blue circle square one two three four
answer left right above below not yes no please then than words sentence
""".split()
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "Ġ"  # how byte-level BPE writes a blank


def build_tokenizer() -> Tokenizer:
    """The tokenizer: 256 bytes, the merges that spell WORDS, and the special tokens last."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    known = set(vocabulary)
    for word in [*WORDS, *(SPACE + word for word in WORDS)]:
        piece = word[0]
        for letter in word[1:]:
            if piece + letter not in known:
                merges.append((piece, letter))
                vocabulary.append(piece + letter)
                known.add(piece + letter)
            piece += letter
    model = models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Writes the tokenizer files of a published folder; the special tokens' ids."""
    tokenizer = build_tokenizer()
    contents = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(contents, ensure_ascii=False))
    vocabulary, merges = contents["model"]["vocab"], contents["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    known = tokenizer.get_vocab(with_added_tokens=True)
    ids = {token: known[token] for token in SPECIAL_TOKENS}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    start, end = "<|im_start|>", "<|im_end|>"
    special = {
        "additional_special_tokens": [start, end],
        "eos_token": end,
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    decoder = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, i in ids.items()
    }
    settings = special | {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 32768,
        "processor_class": "LlavaOnevisionProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return ids
