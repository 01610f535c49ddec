"""Conversations as callers write them, put into one form.

The form is that of transformers' chat templates: a list of ``{"role", "content": [typed dicts]}``.
Beyond the reference, a plain string as content is text (the reference's templates render it as
nothing), and images may be given beside the conversation. What the reference would silently drop is
an error here.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, cast

from mlx_onevision.config.json_fields import is_object
from mlx_onevision.errors import MediaError, RequestError
from mlx_onevision.media.frame_sampling import FrameOptions

ROLES = ("system", "user", "assistant")
IMAGE_KEYS = ("image", "url", "path", "base64")
VIDEO_KEYS = ("video", "url", "path", "base64")

Message = dict[str, Any]
"""``{"role": str, "content": [block, ...]}`` with blocks ``{"type": "text", "text": str}``,
``{"type": "image", "image": source}`` and ``{"type": "video", "video": source}``; the last may
also have the options of :class:`~mlx_onevision.media.frame_sampling.FrameOptions`."""


def normalise_messages(
    prompt: str | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    images: Iterable[Any] | None = None,
    videos: Iterable[Any] | None = None,
    system: str | None = None,
    unfilled: bool = False,
) -> list[Message]:
    """A conversation in its one form; one that has it already comes back equal.

    prompt : the one user turn, instead of ``messages``.
    images, videos : fill the blocks of their kind without a source (``{"type": "image"}``) in
        order; where there is no such block, they go to the front of the first user turn, images
        before videos, as a chat template writes them.
    system : a system message, in front.
    unfilled : whether blocks may be left without a source; rendering needs none.

    Raises:
        RequestError: for an empty prompt, an unknown role, block or key, and for more or fewer
            images or videos than blocks wait for one.
        MediaError: for base64 that is none.
    """
    if (prompt is None) == (messages is None):
        raise RequestError("give either a prompt or messages")
    if messages is None:
        if not isinstance(prompt, str):
            raise RequestError(f"the prompt is a {type(prompt).__name__}; it must be a string")
        if not prompt.strip():
            raise RequestError("the prompt is empty; ask something")
        messages = [{"role": "user", "content": prompt}]
    listed = _sequence(messages)
    if listed is None:
        raise RequestError(
            f"messages is a {type(messages).__name__}; it must be a list of role and content"
        )
    conversation = [_message(message, n) for n, message in enumerate(listed, 1)]
    if system is not None:
        if conversation and conversation[0]["role"] == "system":
            raise RequestError("there are two system messages: in messages, and beside them")
        conversation.insert(0, {"role": "system", "content": [_text(system, "system")]})
    for kind, given in (("video", videos), ("image", images)):
        if given is not None or not unfilled:
            _place(conversation, kind, _listed(given, kind))
    blocks = (block for message in conversation for block in message["content"])
    if not any(block["type"] != "text" or block["text"].strip() for block in blocks):
        raise RequestError("the conversation is empty; ask something")
    return conversation


def video_blocks(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The video blocks of a conversation, in order."""
    return [b for message in messages for b in message["content"] if b["type"] == "video"]


def sources(messages: Sequence[Message], kind: str) -> list[Any]:
    """The ``image`` or ``video`` sources of a conversation, in order."""
    return [
        block[kind] for message in messages for block in message["content"] if block["type"] == kind
    ]


def _sequence(value: object) -> Sequence[Any] | None:
    """A sequence that is neither text nor a mapping; None for anything else."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return None
    return cast("Sequence[Any]", value)


def _message(message: Any, number: int) -> Message:
    where = f"message {number}"
    if not is_object(message):
        raise RequestError(f"{where} is a {type(message).__name__}; it must have role and content")
    given = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in given:
            raise RequestError(f"{where} has no {key}")
    unknown = sorted(map(str, given.keys() - {"role", "content"}))
    if unknown:
        raise RequestError(f"{where} has {unknown[0]!r}, which is not supported")
    role, content = given["role"], given["content"]
    if role not in ROLES:
        raise RequestError(f"{where} has the role {role!r}; it must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": [_text(content, where)] if content else []}
    blocks = _sequence(content)
    if blocks is None:
        raise RequestError(f"the content of {where} is neither a string nor a list of blocks")
    return {"role": role, "content": [_block(block, where) for block in blocks]}


def _block(block: Any, where: str) -> dict[str, Any]:
    kind = block.get("type") if is_object(block) else None
    if not is_object(block) or not isinstance(kind, str):
        raise RequestError(f"{where} has a block that is not an object with a type")
    given = {key: value for key, value in block.items() if value is not None and key != "type"}
    if kind == "text":
        _only(given, ("text",), kind, where)
        return _text(given.get("text"), where)
    if kind in ("image_url", "video_url"):  # OpenAI's, and vLLM's after it
        address = given.pop(kind, None)
        address = address.get("url") if is_object(address) else address
        if not isinstance(address, str) or not address:
            raise RequestError(f"{where} has no url in its {kind} block")
        given.pop("detail", None)  # has no counterpart
        if "url" in given:
            raise RequestError(f"{where} has one {kind} block with two sources: {kind} and url")
        kind, given = kind.removesuffix("_url"), {"url": address, **given}
    keys = {"image": IMAGE_KEYS, "video": VIDEO_KEYS}.get(kind)
    if keys is None:
        raise RequestError(
            f"{where} has a block of type {kind!r}; "
            "known are text, image, video, image_url and video_url"
        )
    options = FrameOptions.names() if kind == "video" else ()
    _only(given, (*keys, *options), kind, where)
    frames: dict[str, Any] = {name: given.pop(name) for name in options if name in given}
    FrameOptions(**frames)  # invalid ones are refused here, before anything is decoded
    if len(given) > 1:
        named = " and ".join(key for key in keys if key in given)
        raise RequestError(f"{where} has one {kind} block with two sources: {named}")

    if not given:
        return {"type": kind, **frames}
    ((key, source),) = given.items()
    return {"type": kind, kind: _decoded(source, where) if key == "base64" else source, **frames}


def _only(given: Mapping[str, Any], known: Sequence[str], kind: str, where: str) -> None:
    unknown = sorted(map(str, given.keys() - set(known)))
    if unknown:
        raise RequestError(f"{where} has {unknown[0]!r} in a {kind} block, which is not supported")


def _text(text: Any, where: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise RequestError(f"{where} has a text that is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half of a surrogate pair, which is no text") from None
    return {"type": "text", "text": str(text)}


def _decoded(data: Any, where: str) -> Any:
    """The bytes of base64 text, with or without a ``data:`` address around it."""
    if not isinstance(data, str | bytes):
        raise RequestError(f"{where} has base64 that is a {type(data).__name__}, not a string")
    text = data if isinstance(data, bytes) else data.encode(errors="replace")
    if text[:5].lower() == b"data:":
        text = text.partition(b",")[2]
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise MediaError(f"{where} has base64 that cannot be decoded ({error})") from None


def _listed(media: Iterable[Any] | None, kind: str) -> list[Any]:
    """The images or videos as a list; a string or an array, though iterable, is a single one."""
    if media is None:
        return []
    one = isinstance(media, str | bytes | PathLike) or hasattr(media, "shape")
    if one or not hasattr(media, "__iter__"):
        raise RequestError(f"{kind}s is one {type(media).__name__}; give a list of {kind}s")
    return list(media)


def _place(conversation: list[Message], kind: str, media: list[Any]) -> None:
    """Gives each block without a source one of ``media``; without such blocks, puts all of them at
    the front of the first user turn.
    """
    waiting = [
        block
        for message in conversation
        for block in message["content"]
        if block["type"] == kind and kind not in block
    ]
    if media and not waiting:
        turn = next((m for m in conversation if m["role"] == "user"), None)
        if turn is None:
            raise RequestError(f"{kind}s need a user message to stand in")
        turn["content"][:0] = [{"type": kind, kind: source} for source in media]
        return
    if len(waiting) != len(media):
        raise RequestError(
            f"the messages hold {len(waiting)} {kind} block(s) without a source, "
            f"but {len(media)} {kind}(s) came with them"
        )
    for block, source in zip(waiting, media, strict=True):
        block[kind] = source
