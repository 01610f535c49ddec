# pyright: reportUnknownMemberType=false
"""The tokenizer of a checkpoint: Qwen2's byte-level BPE, from the files that the folder has; its
ids are those of transformers' ``Qwen2Tokenizer``.

Text and control tokens are kept apart: :meth:`Tokenizer.encode` takes text only, in which a special
string is ordinary characters, and the id of a control token is looked up by its name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_onevision.config.json_fields import Json, is_object
from mlx_onevision.errors import CheckpointError, RequestError, short
from mlx_onevision.files import read_json, refuse_lfs_pointer

if TYPE_CHECKING:
    import tokenizers

# How Qwen2 cuts text into words before it merges bytes (transformers' Qwen2 tokenizer).
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word")
PLACEHOLDERS = ("<image>", "<video>")

# The rules that a tokenizer.json may have. Others (replacements, character maps, any pattern) could
# let a file of a few kilobytes fill the memory with a short text, or never finish it.
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip")
PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation")
TOKENIZER_BYTES = 32_000_000
MOST_ADDED = 4096  # tokens beside the vocabulary; each is looked for in every text


class Tokenizer:
    """Text to ids and back. ``specials`` maps each control token's string to its id."""

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        """Raises CheckpointError for a tokenizer that this package does not compute."""
        kind = type(backend.decoder).__name__ if backend.decoder is not None else "none"
        if kind != "ByteLevel":
            raise CheckpointError(
                f"the tokenizer's decoder is {kind}; only ByteLevel ones are supported"
            )
        if backend.num_special_tokens_to_add(False):
            raise CheckpointError("the tokenizer adds tokens around every text; Qwen2's adds none")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a special string in a text is text
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self.specials: dict[str, int] = {
            token.content: index for index, token in sorted(self._added.items()) if token.special
        }
        for index, token in self._added.items():
            for flag in FLAGS:
                if token.special and getattr(token, flag):
                    raise CheckpointError(
                        f"special token {token.content!r} ({index}) has {flag}, which is not "
                        "supported"
                    )
        self._special_ids = frozenset(self.specials.values())

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """From tokenizer.json, or else from vocab.json and merges.txt; with the tokens that only
        the other files beside them add.

        Raises:
            CheckpointError: naming the file that is missing, cannot be read, or disagrees.
        """
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            refuse_lfs_pointer(folder / name)
        file = folder / "tokenizer.json"
        if (values := read_json(file, TOKENIZER_BYTES)) is not None:
            _check_rules(values)
            backend = _from_json(file)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = _from_merges(folder)
        else:
            raise CheckpointError(
                "the model's folder has neither a tokenizer.json nor a vocab.json with merges.txt"
            )
        _add_tokens(backend, folder)
        return cls(backend)

    def __len__(self) -> int:
        """Tokens with an id of their own; a model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, all of them text: none is a control token's.

        Raises:
            RequestError: for text that is not Unicode (lone surrogates).
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError):
            raise RequestError(
                "the text holds half of a surrogate pair; it must be UTF-8"
            ) from None
        if not self._special_ids.isdisjoint(ids):
            made = next(i for i in ids if i in self._special_ids)
            raise RequestError(f"the tokenizer makes its control token {made} out of plain text")
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids. Ids that no token has, virtual ones among them, are nothing."""
        known = [i for i in ids if 0 <= i < 2**32]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def agrees_with(self, folder: Path) -> bool:
        """Whether the tokenizer of a folder gives every token the same id."""
        other = Tokenizer.from_folder(folder)._backend
        return self._backend.get_vocab() == other.get_vocab()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its string in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """A token's string in the vocabulary (byte-level letters, not text), or None."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes, maybe a part of a character, that a token adds to decoded text.

        Nothing for a control token and for an id past the vocabulary.
        """
        if token_id in self._special_ids or (token := self.id_to_token(token_id)) is None:
            return b""
        try:
            return bytes(self._byte_of[letter] for letter in token)
        except KeyError:  # an added token that is not written in byte letters
            return token.encode()

    @cached_property
    def _byte_of(self) -> Mapping[str, int]:
        return _byte_letters()


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's).

    Printable Latin-1 stands for itself; the other 68 bytes, in order, are U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _check_rules(values: Mapping[str, Any]) -> None:
    """CheckpointError for a tokenizer.json with rules or more added tokens than are supported."""
    for key, inner, known in (
        ("normalizer", "normalizers", NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", PRE_TOKENIZERS),
    ):
        rules: list[Any] = [values.get(key)]
        while rules:
            rule = rules.pop()
            if rule is None:
                continue
            fields: Json = rule if is_object(rule) else {"type": rule}
            kind = fields.get("type")
            if kind == "Sequence":
                rules += fields.get(inner) or []
            elif kind not in known:
                raise CheckpointError(
                    f"tokenizer.json has the {key} {short(str(kind))}; only those of Qwen2's kind "
                    "are supported"
                )
            elif kind == "Split" and fields.get("pattern") != {"Regex": QWEN2_WORDS}:
                raise CheckpointError(
                    "tokenizer.json splits words by another pattern than Qwen2's, which is not "
                    "supported"
                )
    _check_added(values.get("added_tokens") or [])


def _check_added(tokens: Sized) -> None:
    if len(tokens) > MOST_ADDED:
        raise CheckpointError(
            f"the tokenizer has {len(tokens):,} added tokens; {MOST_ADDED:,} are supported"
        )


def _from_json(file: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exception, and where its Rust panics, not even that
        raise CheckpointError(f"{file.name} cannot be read ({_short(error)})") from None


def _from_merges(folder: Path) -> "tokenizers.Tokenizer":
    """Qwen2's tokenizer around the two files that GPT-2 began with."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    for name in ("vocab.json", "merges.txt"):
        if (folder / name).stat().st_size > TOKENIZER_BYTES:
            raise CheckpointError(f"{name} is larger than {TOKENIZER_BYTES} bytes")
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise CheckpointError(
            f"vocab.json with merges.txt cannot be read ({_short(error)})"
        ) from None
    backend = Backend(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: "tokenizers.Tokenizer", folder: Path) -> None:
    """The tokens that tokenizer_config.json, added_tokens.json and special_tokens_map.json add.

    As in the reference, those with an id come first, in its order; names without one get the next.
    """
    from tokenizers import AddedToken

    settings = read_json(folder / "tokenizer_config.json") or {}
    names = list(
        _special_names({**(read_json(folder / "special_tokens_map.json") or {}), **settings})
    )
    try:
        numbered = _numbered(settings, read_json(folder / "added_tokens.json") or {}, names)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            "the added tokens of tokenizer_config.json or added_tokens.json have no proper ids"
        ) from None
    _check_added([*numbered, *names])
    backend.encode_special_tokens = True
    # All at once: for each addition the backend makes its search for all of them anew.
    known = backend.get_added_tokens_decoder()
    backend.add_tokens(
        [
            token
            for index, token in sorted(numbered.items())
            if (there := known.get(index)) is None or (token.special and not there.special)
        ]
    )
    for index, token in sorted(numbered.items()):
        if (found := backend.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"token {token.content!r} has the id {index} among the added tokens, {found} in "
                "the vocabulary"
            )
    placeholders = [name for name in PLACEHOLDERS if backend.token_to_id(name) is not None]
    known = backend.get_added_tokens_decoder()
    new: list[AddedToken] = []
    for name in dict.fromkeys([*names, *placeholders]):
        index = backend.token_to_id(name)
        added = None if index is None else known.get(index)
        # A name for an ordinary word of the vocabulary ("!" as padding) does not make it control.
        ordinary = added is None and backend.encode(name, add_special_tokens=False).ids == [index]
        if not ordinary and (added is None or not added.special):
            new.append(AddedToken(name, special=True, normalized=False))
    backend.add_special_tokens(new)


def _numbered(
    settings: Mapping[str, Any], added: Mapping[str, Any], names: Sequence[str]
) -> dict[int, "tokenizers.AddedToken"]:
    """The added tokens that come with an id; tokenizer_config.json has the last word."""
    from tokenizers import AddedToken

    numbered: dict[int, tokenizers.AddedToken] = {}
    for content, index in added.items():
        special = content in names
        numbered[int(index)] = AddedToken(content, special=special, normalized=not special)
    decoder: dict[str, Any] = settings.get("added_tokens_decoder") or {}
    for index, token in decoder.items():
        special = bool(token.get("special")) or token["content"] in names
        flags = {flag: bool(token.get(flag)) for flag in FLAGS}
        normalized = bool(token.get("normalized", not special))
        numbered[int(index)] = AddedToken(
            token["content"], special=special, normalized=normalized, **flags
        )
    return numbered


def _special_names(names: Mapping[str, Any]) -> Iterator[str]:
    """The strings that tokenizer_config.json or special_tokens_map.json call special."""
    tokens: list[Any] = [names.get(key) for key in NAMED]
    for key in LISTED:
        listed: Any = names.get(key) or []
        tokens.extend(listed.values() if is_object(listed) else listed)
    tokens.extend(
        token for key, token in names.items() if key.endswith("_token") and key not in NAMED
    )
    for token in tokens:
        content = token.get("content") if is_object(token) else token
        if isinstance(content, str) and content:
            yield content


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
