"""What a server answers, as the contract says it."""

import base64
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from mlx_onevision.plugins.adapters.http_call import error_of, strange
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.events import Event, ProgressEvent, TextEvent, event_from_dict
from mlx_onevision.plugins.contract.results import (
    EmbedResult,
    FinishReason,
    GenerateResult,
    Likelihood,
    ModelInfo,
    TokenLogprob,
    Usage,
)

BROKEN = PluginError(
    "internal", "the answer broke off before its end", "the log of the server may say more"
)

_ITEM = re.compile(r"item (\d+): ")


class Answer:
    """The chunks of a chat completion, put together.

    logprobs : whether they were asked for.
    """

    def __init__(self, logprobs: bool) -> None:
        self._asked, self._begun = logprobs, False
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._notes: tuple[str, ...] = ()

    def add(self, data: str) -> Event | None:
        """The event that a chunk is, where it is one.

        Raises:
            PluginError: the error that a chunk tells of.
        """
        with _understood():
            chunk = json.loads(data)
            refused = error_of(chunk) if "error" in chunk else None
        if refused is not None:
            raise refused
        with _understood():
            if chunk.get("usage") is not None:
                self._usage = _usage(chunk["usage"])
            self._notes += tuple(chunk.get("notes", ()))
            for choice in chunk["choices"]:
                reason = choice.get("finish_reason")
                if reason is not None:
                    self._finish = "length" if reason == "length" else "stop"
                delta, told = choice["delta"].get("content") or "", _logprobs(choice)
                if delta or told:
                    self._text.append(delta)
                    self._logprobs += told
                    return TextEvent(delta, logprobs=told)
            if not self._begun:
                self._begun = True
                return ProgressEvent("answering")
        return None

    def whole(self) -> GenerateResult:
        """The answer. Raises PluginError when its end is missing."""
        if self._finish is None or self._usage is None:
            raise BROKEN
        told = tuple(self._logprobs) if self._asked else None
        return GenerateResult("".join(self._text), self._finish, self._usage, self._notes, told)


def event(data: str) -> Event:
    """An event of a described video. Raises PluginError."""
    with _understood():
        return event_from_dict(json.loads(data))


def vectors(body: Any) -> EmbedResult:
    """The vectors of a group of items. Raises PluginError."""
    with _understood():
        return EmbedResult(
            vectors=tuple(_vector(item["embedding"]) for item in body["data"]),
            space=body["space"],
            dim=body["dim"],
            model=body["model"],
            revision=body["revision"],
            method=body["method"],
            normalized=body["normalized"],
            quantization=body["quantization"],
        )


def renumbered(error: PluginError, before: int) -> PluginError:
    """The error, that names an item of a group, named by its number among all of them."""
    found = _ITEM.match(error.message)
    if found is None or not before:
        return error
    message = f"item {int(found[1]) + before}: {error.message[found.end() :]}"
    return PluginError(error.code, message, error.hint)


def model_info(body: Any) -> ModelInfo:
    """What a server says of its model. Raises PluginError."""
    with _understood():
        names = [field.name for field in fields(ModelInfo) if field.name in body]
        return ModelInfo.from_dict({name: body[name] for name in ("api_version", *names)})


@contextmanager
def _understood() -> Iterator[None]:
    """Whatever cannot be read is the server's fault, not the request's."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, struct.error, PluginError) as error:
        raise strange("what the server answers cannot be read") from error


def _usage(body: Mapping[str, Any]) -> Usage:
    details, seconds = body["prompt_tokens_details"], body["seconds"]
    return Usage(
        prompt_tokens=body["prompt_tokens"],
        cached_tokens=details["cached_tokens"],
        media_tokens=details["media_tokens"],
        completion_tokens=body["completion_tokens"],
        prepare_seconds=seconds["prepare"],
        encode_seconds=seconds["encode"],
        prefill_seconds=seconds["prefill"],
        decode_seconds=seconds["decode"],
        peak_memory_bytes=body["peak_memory_bytes"],
    )


def _logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    told = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(
        TokenLogprob(*_token(one), top=tuple(Likelihood(*_token(o)) for o in one["top_logprobs"]))
        for one in told
    )


def _token(values: Mapping[str, Any]) -> tuple[str, bytes, float]:
    return values["token"], bytes(values["bytes"]), values["logprob"]


def _vector(text: str) -> tuple[float, ...]:
    data = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(data) // 4}f", data)
