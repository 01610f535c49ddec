"""A checkpoint's chat template: a conversation in, the pieces of its prompt out.

The user's text stays text. A special string in it (``<image>``, ``<|im_start|>``, any control token
of the tokenizer) is data; only what the template itself writes is control. So before rendering,
each character of the user's text with which a special string begins, or with which one could join
up with its neighbours, is swapped for a stand-in that occurs nowhere else; after rendering the
prompt is cut at the special strings that are left, and the characters are put back. Text without
special strings or pieces of them goes through untouched, so the prompt is the reference's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.files import read_json
from mlx_onevision.prompt.messages import Message, sources

if TYPE_CHECKING:
    from mlx_onevision.prompt.sandbox import BoundedTemplate


# The prompt of the original checkpoints, which come without a template of their own: conversation
# "qwen_1_5" of the original repository, with its system message.
ORIGINAL = """\
{% if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% for block in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}\
{% endfor %}
{% for block in message['content'] | selectattr('type', 'equalto', 'video') %}\
{{ '<video>\\n' }}\
{% endfor %}
{% for block in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ block['text'] }}\
{% endfor %}
{{ '<|im_end|>\\n' }}\
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}\
{% endif %}
"""

STAND_INS = range(0xF0000, 0x10FFFE)  # private characters, which no text has a meaning for


class Piece(NamedTuple):
    """A stretch of the prompt: one special string that the template wrote, or plain text."""

    text: str
    control: bool


class ChatTemplate:
    """A chat template, compiled when it is first used.

    ``variables`` are the tokenizer's named tokens, which a template may write (``eos_token``).
    """

    def __init__(
        self, source: str, name: str = "chat template", variables: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.name = name
        self._variables = dict(variables or {})
        self._compiled: BoundedTemplate | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate":
        """The template of a checkpoint: chat_template.jinja, else chat_template.json, else the one
        in tokenizer_config.json, else that of the original checkpoints.

        Raises:
            CheckpointError: naming the file that cannot be read.
        """
        named = {
            **(read_json(folder / "special_tokens_map.json") or {}),
            **(read_json(folder / "tokenizer_config.json") or {}),
        }
        variables = {
            name: text
            for name, token in named.items()
            if name.endswith("_token") and (text := _content(token)) is not None
        }
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), file.name, variables)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file.name} cannot be read ({error})") from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            source = _chosen((read_json(folder / name) or {}).get("chat_template"), name)
            # A language model's own template, left over from it, knows nothing of images and takes
            # a message as one string.
            if source is not None and ("image" in source or name == "chat_template.json"):
                return cls(source, f"chat_template of {name}", variables)
        return cls(ORIGINAL, "the built-in chat template", variables)

    def with_source(self, source: str) -> "ChatTemplate":
        """Another template for the same tokenizer."""
        return ChatTemplate(source, "the chat template", self._variables)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, as the reference's ``apply_chat_template`` writes it.

        messages : ``{"role": str, "content": [{"type": "text", "text": str}, {"type": "image"}]}``

        Raises:
            RequestError: when the template refuses the conversation.
            CheckpointError: when it is not a template, fails, or exceeds a limit.
        """
        if self._compiled is None:
            from mlx_onevision.prompt.sandbox import BoundedTemplate

            self._compiled = BoundedTemplate(self.source, self.name)
        return self._compiled.render(
            {
                **self._variables,
                "messages": [_plain(message) for message in messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def pieces(
        self,
        messages: Sequence[Message],
        specials: Iterable[str],
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """The same prompt in pieces: those of ``specials`` that the template wrote, and the text
        between them. Joined, the pieces are what :meth:`render` returns.
        """
        guard = _Guard([special for special in specials if special], self._texts(messages))
        guarded = [
            {
                "role": message["role"],
                "content": [
                    {"type": "text", "text": guard.hide(block["text"])}
                    if block["type"] == "text"
                    else block
                    for block in message["content"]
                ],
            }
            for message in messages
        ]
        return guard.split(self.render(guarded, add_generation_prompt))

    def _texts(self, messages: Sequence[Message]) -> list[str]:
        blocks = (block for message in messages for block in message["content"])
        return [self.source, *(block["text"] for block in blocks if block["type"] == "text")]


class _Guard:
    """Hides special strings in the user's text from everything that looks for them."""

    def __init__(self, specials: Sequence[str], texts: Sequence[str]) -> None:
        # At one position the longest wins, as in the tokenizer.
        ordered = sorted(set(specials), key=lambda special: (-len(special), special))
        choice = "|".join(map(re.escape, ordered)) or "(?!)"
        self._special = re.compile(f"({choice})")
        self._begins = re.compile(f"(?=(?:{choice}))")  # overlapping ones too
        self._inner = {special[1:-1] for special in ordered}
        self._heads = {special[:n] for special in ordered for n in range(1, len(special))}
        self._tails = {special[n:] for special in ordered for n in range(1, len(special))}
        self._longest = len(ordered[0]) if ordered else 0
        used = set().union(*texts)
        free = (chr(code) for code in STAND_INS if chr(code) not in used)
        self._stand_in = dict(zip(sorted(set("".join(ordered))), free, strict=False))
        if len(self._stand_in) < len(set("".join(ordered))):
            raise RequestError("the text uses all private characters; leave some of them out")
        self._original = {ord(stand): character for character, stand in self._stand_in.items()}

    def hide(self, text: str) -> str:
        """``text`` with stand-ins, such that no special string can arise from it."""
        places = {match.start() for match in self._begins.finditer(text)}
        core = text.strip()  # a template may trim
        for part, offset in ((text, 0), (core, text.find(core))):
            if not part:
                continue
            near = range(1, min(len(part), self._longest - 1) + 1)
            if any(part[:n] in self._tails for n in near) or (
                len(part) < self._longest and any(part in inner for inner in self._inner)
            ):
                places.add(offset)
            if any(part[-n:] in self._heads for n in near):
                places.add(offset + len(part) - 1)
        if not places:
            return text
        characters = list(text)
        for place in places:
            characters[place] = self._stand_in[characters[place]]
        return "".join(characters)

    def split(self, prompt: str) -> list[Piece]:
        """A rendered prompt in pieces, its stand-ins put back."""
        pieces = (
            Piece(part.translate(self._original), index % 2 == 1)
            for index, part in enumerate(self._special.split(prompt))
        )
        return [piece for piece in pieces if piece.text]


def _plain(message: Message) -> dict[str, Any]:
    """What a template may see of a message: of media their kind, never a path or an address."""
    blocks = [
        {"type": "text", "text": block["text"]}
        if block["type"] == "text"
        else {"type": block["type"]}
        for block in message["content"]
    ]
    return {"role": message["role"], "content": blocks}


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object that holds one."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _chosen(given: Any, name: str) -> str | None:
    """A template string, or the one called ``default`` of a list of named ones."""
    if isinstance(given, list):
        named = [entry for entry in given if isinstance(entry, Mapping)]
        given = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if given is not None and not isinstance(given, str):
        raise CheckpointError(f"{name} has a chat_template that is not a string")
    return given


# Media that stay where they stand between the words of a message.
#
# The published templates write the media of a message in front of its words. Here those that stand
# behind some words go through the template as one character of the text each, which no text has a
# meaning for, and become placeholders afterwards.

PRIVATE = range(0xE000, 0xF900)


def pieces_in_given_order(
    template: ChatTemplate, conversation: Sequence[Message], specials: Iterable[str]
) -> list[Piece]:
    """The prompt in pieces, see :meth:`~mlx_onevision.prompt.chat_template.ChatTemplate.pieces`."""
    used = set("".join((*sources(conversation, "text"), template.source)))
    free = [chr(code) for code in PRIVATE if chr(code) not in used][:2]
    if len(free) < 2:
        raise RequestError("the text uses all private characters; leave some of them out")
    marks: dict[str, str] = dict(zip(("image", "video"), free, strict=True))
    tokens = {mark: f"<{kind}>" for kind, mark in marks.items()}
    pieces = template.pieces(_written_into_text(conversation, marks), specials)
    cut = re.compile(f"([{''.join(tokens)}])")
    return [
        Piece(tokens.get(part, part), part in tokens or piece.control)
        for piece in pieces
        for part in cut.split(piece.text)
        if part
    ]


def _written_into_text(messages: Sequence[Message], marks: Mapping[str, str]) -> list[Message]:
    """The conversation with media between words written into the text, so that a template, which
    writes a message's media first, leaves them where they stand.

    marks : for each kind of medium the character that stands for one. What comes before the first
        words stays a block. As templates write it, a newline follows each.
    """
    ordered: list[Message] = []
    for message in messages:
        blocks: list[dict[str, Any]] = []
        for block in message["content"]:
            if block["type"] != "text" and not (blocks and blocks[-1]["type"] == "text"):
                blocks.append(block)
                continue
            written = block["text"] if block["type"] == "text" else marks[block["type"]] + "\n"
            if blocks and blocks[-1]["type"] == "text":
                blocks[-1] = {"type": "text", "text": blocks[-1]["text"] + written}
            else:
                blocks.append({"type": "text", "text": written})
        ordered.append({"role": message["role"], "content": blocks})
    return ordered
