"""Rows of conversations as a model is trained on them: ids, which of them carry loss, and media.

A row is a JSON object: ``messages`` as ``generate`` takes them (with ``images`` and ``videos`` for
blocks without a source), or LLaVA's ``conversations``. Loss is on what the assistant writes and the
token that ends it. The last answer follows the prompt that an answer is generated from.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import OneVisionError, RequestError, short
from mlx_onevision.media.anyres import Packing, VideoPacking
from mlx_onevision.prompt.chat_template import Segment
from mlx_onevision.prompt.messages import Message, normalise_messages, sources
from mlx_onevision.prompt.processor import Inputs, Medium, Processor

TRAIN, VALID = "train.jsonl", "valid.jsonl"  # of a folder, as mlx-lm has them
# LLaVA's names for who speaks, and the roles of messages.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class MediumShape:
    """An image or a video without its pixels: what its features become.

    tokens : the embeddings that it becomes. tiles : how many it has. key : equal for equal media.
    """

    kind: Literal["image", "video"]
    packing: Packing | VideoPacking | None
    tokens: int
    tiles: int
    key: str

    @classmethod
    def of(cls, medium: Medium) -> "MediumShape":
        return cls(medium.kind, medium.packing, medium.tokens, len(medium.tiles), medium.key)


@dataclass(frozen=True, eq=False)
class Example:
    """One row.

    where : file and line, for messages to people.
    messages : the conversation, as :func:`conversation` makes it.
    ids : int32 (L,), a placeholder for each embedding of a medium.
    learned : bool (L,), the tokens that carry loss.
    media : in the order of their placeholders.
    """

    where: str
    messages: Sequence[Message]
    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    media: tuple[MediumShape, ...]

    @property
    def tokens(self) -> int:
        """How many tokens carry loss."""
        return int(self.learned.sum())


class Rows:
    """Reads rows for one model.

    options : which frames of videos, tiling, order; see :meth:`Processor.prepare`.
    longest : tokens of a row, at most.
    """

    def __init__(self, processor: Processor, options: Mapping[str, Any], longest: int) -> None:
        self._processor, self._options, self._longest = processor, dict(options), longest

    def read(self, path: Path, report: Callable[[str], None]) -> list[Example]:
        """The rows of a file, all of them checked and their media decoded once.

        report : called with file, line and what is wrong of each row that cannot be trained on.

        Raises:
            RequestError: where there is such a row, or none at all.
        """
        examples: list[Example] = []
        bad = 0
        for where, value in _values(path):
            try:
                if isinstance(value, OneVisionError):
                    raise value
                examples.append(self.example(where, conversation(value, path.parent)))
            except OneVisionError as error:
                bad += 1
                report(f"{where}: {error}")
        if bad:
            rows = "row" if bad == 1 else "rows"
            raise RequestError(
                f"{bad} {rows} of {path} cannot be trained on; mend them, or leave them out"
            )
        if not examples:
            raise RequestError(f"{path} has no rows; write one conversation a line")
        return examples

    def prepare(self, example: Example) -> Inputs:
        """The row again, with its pixels."""
        return self._prepare(example.messages)

    def example(self, where: str, messages: Sequence[Message]) -> Example:
        """A row of a conversation in its one form; RequestError where it is too long."""
        inputs = self._prepare(messages)
        if len(inputs.input_ids) > self._longest:
            raise RequestError(
                f"the row has {len(inputs.input_ids)} tokens, more than {self._longest}; use fewer "
                "or smaller media, or a shorter text"
            )
        shapes = tuple(map(MediumShape.of, inputs.media))
        return Example(where, messages, inputs.input_ids, inputs.learned, shapes)

    def _prepare(self, messages: Sequence[Message]) -> Inputs:
        given: dict[str, Any] = {**self._options, "answer": 0}
        return self._processor.prepare(messages, segments=self._segments(messages), **given)

    def _segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The prompt of all but the last answer, the answer, and what the template ends it with."""
        order = self._options.get("order", "template")
        texts = sources(messages, "text")
        free = (chr(code) for code in range(0x10FFFD, 0xF0000, -1))
        begin, end = (next(c for c in free if not any(c in text for text in texts)) for _ in "ab")
        marked = [_marked(message, begin, end) for message in messages]
        whole = _cut(self._processor.segments(marked, order, answering=False), begin, end)
        parts = _cut(self._processor.segments(marked[:-1], order), begin, end)
        parts.append(Segment("".join(sources(messages[-1:], "text")), False, True))
        closing = [segment for segment in whole if segment.learned][-1]
        return [*parts, closing] if closing.control else parts


def _cut(segments: Sequence[Segment], begin: str, end: str) -> list[Segment]:
    """The segments cut at the marks, which are left out. What stands between them is learned, and
    so is a control token right behind.
    """
    parts: list[Segment] = []
    inside = ended = False
    for segment in segments:
        if segment.control:
            parts.append(Segment(segment.text, True, inside or ended))
            ended = False
            continue
        text = segment.text
        while text:
            before, found, text = text.partition(end if inside else begin)
            if before:
                parts.append(Segment(before, False, inside))
                ended = False
            if found:
                inside, ended = not inside, inside
    return parts


def _marked(message: Message, begin: str, end: str) -> Message:
    """An assistant's message whose text is one block between two marks."""
    if message["role"] != "assistant":
        return message
    text = "".join(sources([message], "text"))
    return {"role": "assistant", "content": [{"type": "text", "text": f"{begin}{text}{end}"}]}


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its file and line; an error in the place of one that is no JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix == ".json":  # LLaVA's, one list
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is not JSON ({error})") from None
        if not isinstance(rows, list):
            raise RequestError(f"{path} is no list of rows; write one, or one row a line as .jsonl")
        found = cast(list[Any], rows)
        yield from ((f"{path.name}: row {n}", row) for n, row in enumerate(found, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            value = RequestError(f"the line is not JSON ({error})")
        yield f"{path.name}:{number}", value


def conversation(row: Any, folder: Path) -> list[Message]:
    """A row as a conversation in its one form, media as paths below ``folder``.

    Raises:
        RequestError: for a row of no known form, and one that does not end with an answer.
    """
    if not isinstance(row, Mapping):
        raise RequestError("the row is no JSON object")
    fields = cast(Mapping[str, Any], row)
    images, videos = (_listed(fields, kind) for kind in ("image", "video"))
    if "messages" in fields:
        messages = fields["messages"]
    elif "conversations" in fields:
        messages = _from_llava(fields["conversations"])
    else:
        raise RequestError("the row has neither messages nor conversations")
    found = normalise_messages(messages=messages, images=images, videos=videos)
    for message in found:
        for block in message["content"]:
            kind = block["type"]
            if message["role"] == "assistant" and kind != "text":
                raise RequestError(f"the assistant's turn has a block of type {kind}")
            source = block.get(kind)
            if kind != "text" and isinstance(source, str) and "://" not in source[:16]:
                if not source.startswith("data:"):
                    block[kind] = str(folder / source)
                    if not Path(block[kind]).is_file():
                        raise RequestError(f"there is no file {short(block[kind], 300)}")
    if not any(message["role"] == "assistant" for message in found):
        raise RequestError("the row has no assistant turn, so nothing to learn")
    if found[-1]["role"] != "assistant":
        raise RequestError(f"the row ends with a {found[-1]['role']} turn; end it with the answer")
    for message in found:
        if message["role"] == "assistant" and not any(sources([message], "text")):
            raise RequestError("an assistant turn is empty")
    return found


def _listed(row: Mapping[str, Any], kind: str) -> list[Any] | None:
    """The media of a row, under ``image``, ``images`` and so on, one or a list."""
    given = row.get(f"{kind}s", row.get(kind))
    if given is None:
        return None
    return cast(list[Any], given) if isinstance(given, list) else [given]


def _from_llava(turns: Any) -> list[Message]:
    """The messages of LLaVA's turns, {"from", "value"}."""
    found = cast(list[Any], turns) if isinstance(turns, list) else None
    if found is None or not all(isinstance(turn, Mapping) for turn in found):
        raise RequestError("conversations is no list of turns with from and value")
    messages: list[Message] = []
    for number, turn in enumerate(found, 1):
        role, text = SPEAKERS.get(str(turn.get("from"))), turn.get("value")
        if role is None or not isinstance(text, str):
            raise RequestError(f"turn {number} is not from human, gpt or system, or has no value")
        messages.append({"role": role, "content": list(_blocks(text))})
    return messages


def _blocks(text: str) -> Iterator[dict[str, Any]]:
    """LLaVA's text, with ``<image>`` and ``<video>`` for media."""
    for part in text.replace("<image>", "\0image\0").replace("<video>", "\0video\0").split("\0"):
        if part in ("image", "video"):
            yield {"type": part}
        elif part.strip("\n"):
            yield {"type": "text", "text": part.strip("\n")}


def digest(examples: Sequence[Example]) -> str:
    """Of all that is trained on, in its order."""
    whole = blake2b(digest_size=16)
    for example in examples:
        whole.update(example.ids.tobytes() + example.learned.tobytes())
        whole.update("".join(medium.key for medium in example.media).encode())
    return whole.hexdigest()


def shown(example: Example, processor: Processor) -> str:
    """A row as the model sees it: media as their number of tokens, what carries loss in
    ``⟦ ⟧``.
    """
    ids = example.ids
    parts: list[str] = []
    specials = {processor.config.image_token_index, processor.config.video_token_index}
    starts = [0, *(np.flatnonzero(np.diff(example.learned)) + 1).tolist(), len(ids)]
    media = iter(example.media)
    for first, last in pairwise(starts):
        text, place = "", first
        while place < last:
            if int(ids[place]) in specials:
                medium = next(media)
                text += f"<{medium.kind}: {medium.tokens} tokens of {medium.tiles} tiles>"
                place += medium.tokens
                continue
            stop = place
            while stop < last and int(ids[stop]) not in specials:
                stop += 1
            text += processor.tokenizer.decode(ids[place:stop].tolist(), skip_special_tokens=False)
            place = stop
        parts.append(f"⟦{text}⟧" if example.learned[first] else text)
    return "".join(parts)
