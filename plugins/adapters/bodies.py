"""The contract's requests, as OpenAI's clients would send them."""

import base64
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.media import Media, Message
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Group,
)
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# What a server takes in one request of embeddings; more is sent in several.
ITEMS = 256
BYTES = 24 << 20

# Fields of a question that are sent under their own names; the server's are the contract's.
_ASKED = tuple(
    field.name
    for field in fields(GenerateRequest)
    if field.name not in ("messages", "system", "stop", "logprobs", "json_schema")
)
_DESCRIBED = tuple(field.name for field in fields(DescribeRequest) if field.name != "video")


def question(request: GenerateRequest, policy: MediaPolicy) -> dict[str, Any]:
    """The body of a chat completion that streams.

    Raises:
        PluginError: for a medium that the policy does not let be read.
    """
    system = [] if request.system is None else [Message("system", request.system)]
    body: dict[str, Any] = {
        "messages": [
            {"role": turn.role, "content": [_part(part, policy) for part in turn.parts]}
            for turn in (*system, *request.messages)
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        **_given(request, _ASKED),
    }
    if request.stop:
        body["stop"] = list(request.stop)
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    if request.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": json.loads(request.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def description(request: DescribeRequest, policy: MediaPolicy) -> dict[str, Any]:
    """The body of a description. Raises PluginError."""
    # No longest segment is something else than nothing said of it.
    whole = {"longest": request.longest}
    return {"video": _place(request.video, policy), **_given(request, _DESCRIBED), **whole}


def items(request: EmbedRequest, policy: MediaPolicy) -> Iterator[list[dict[str, Any]]]:
    """The items, in groups that a server takes at once, no more than one of which is ever held.

    Raises:
        PluginError: for an item that the policy does not let be read, naming it.
    """
    group: list[dict[str, Any]] = []
    size = 0
    for number, item in enumerate(request.items, 1):
        try:
            part = _item(item, policy)
        except PluginError as error:
            raise error.of(f"item {number}") from None
        length = len(json.dumps(part))
        if group and (size + length > BYTES or len(group) == ITEMS):
            yield group
            group, size = [], 0
        group.append(part)
        size += length
    if group:
        yield group


def embedding(request: EmbedRequest, group: list[dict[str, Any]]) -> dict[str, Any]:
    """The body that asks for the vectors of a group."""
    return {
        "input": group,
        "encoding_format": "base64",
        **_given(request, ("space", "normalize", "tiling", "timeout")),
    }


def _given(request: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _item(item: str | Media | Group, policy: MediaPolicy) -> dict[str, Any]:
    if isinstance(item, Group):
        return {"type": "group", "content": [_part(medium, policy) for medium in item.media]}
    return _part(item, policy)


def _part(part: str | Media, policy: MediaPolicy) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = f"{part.kind}_url"
    return {"type": kind, kind: _place(part, policy)}


def _place(medium: Media, policy: MediaPolicy) -> dict[str, str]:
    source = policy.open(medium)
    if not isinstance(source, bytes):
        with source:
            source = source.read(policy.size + 1)
        if source:  # a video is sent whole, so it is bounded as a picture is
            policy.admit([Media(medium.kind, data=source)])
    text = base64.b64encode(source).decode("ascii")
    return {"url": f"data:{medium.kind}/*;base64,{text}"}
