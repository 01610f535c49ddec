"""Media that stay where they stand between the words of a message.

The published templates write the media of a message in front of its words. Here those that stand
behind some words go through the template as one character of the text each, which no text has a
meaning for, and become placeholders afterwards.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_onevision.errors import RequestError
from mlx_onevision.prompt.chat_template import ChatTemplate, Piece
from mlx_onevision.prompt.messages import Message, sources

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
