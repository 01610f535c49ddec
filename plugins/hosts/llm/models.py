# pyright: reportUnknownMemberType=false
# llm leaves the types of its dicts open.
"""The models that answer, for ``llm`` and for programs that use it, sync and async, and those that
embed.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterable, Iterator
from itertools import islice
from typing import Any, Literal

import llm
from llm.models import AsyncConversation, AsyncResponse, EmbeddingModel
from llm.parts import AttachmentPart, ReasoningPart, TextPart
from pydantic import Field

from mlx_onevision.cli.options import TABLE
from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import (
    RANGES,
    SNIFF_BYTES,
    EmbeddingSpace,
    EmbedRequest,
    GenerateRequest,
    Kind,
    Media,
    Message,
    Role,
    sniff,
)
from mlx_onevision.plugins.contract.results import GenerateResult, ModelInfo, TextEvent
from mlx_onevision.plugins.hosts.llm import registry
from mlx_onevision.plugins.hosts.llm.registry import CommandError, Entry, as_command_error

EMBEDDING_SPACES: tuple[EmbeddingSpace, ...] = ("vision", "joint")
ITEMS_PER_BATCH = 32  # items that are embedded together

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}

# What llm accepts, by the MIME types that it guesses.
ATTACHMENT_TYPES = frozenset(
    [f"image/{name}" for name in "png jpeg webp gif heic heif avif tiff bmp".split()]
    + [f"video/{name}" for name in "mp4 quicktime x-matroska webm x-msvideo".split()]
)


def _option(name: str, description: str = "") -> Any:
    """A setting, with the range and the words that it has elsewhere."""
    bounds = RANGES[name].bounds if name in RANGES else {}
    return Field(default=None, description=description or TABLE[name].help, **bounds)


class OneVisionOptions(llm.Model.Options):
    """Those of ``GenerateRequest``: with ``-o`` at the command, by keyword in Python. What is left
    out is the model's own.
    """

    max_tokens: int | None = _option(
        "max_tokens", "The longest answer, in tokens. Default: the model's own, or 256."
    )
    temperature: float | None = _option("temperature")
    top_p: float | None = _option("top_p")
    top_k: int | None = _option("top_k")
    min_p: float | None = _option("min_p")
    repetition_penalty: float | None = _option("repetition_penalty")
    presence_penalty: float | None = _option("presence_penalty")
    frequency_penalty: float | None = _option("frequency_penalty")
    seed: int | None = _option("seed")
    stop: str | list[str] | None = _option(
        "stop", "A text, or a list of texts, before which the answer ends."
    )
    num_frames: int | None = _option("num_frames")
    fps: float | None = _option("fps")
    start: float | None = _option("start")
    end: float | None = _option("end")
    tiling: Literal["auto", "always", "never"] | None = _option("tiling")
    order: Literal["template", "given"] | None = _option(
        "order",
        "template shows images before the words of their message; given leaves them where they "
        "stand.",
    )


class _Answers:
    """What the sync and the async model share; the model is loaded when it is first asked."""

    can_stream = True
    supports_schema = True
    attachment_types = ATTACHMENT_TYPES

    class Options(OneVisionOptions):
        pass

    def __init__(self, entry: Entry) -> None:
        self.model_id = entry.id
        self._entry = entry

    def _validate_attachments(self, attachments: list[llm.Attachment] | None = None) -> None:
        """By their bytes, where llm would go by a guessed type. What is behind a URL shows when it
        is fetched.
        """
        with as_command_error():
            for attachment in attachments or []:
                if attachment.path or not attachment.url:
                    media(attachment)


class OneVision(_Answers, llm.Model):
    """A model that answers, for the command and for programs without asyncio."""

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        with as_command_error():
            backend = registry.open_backend(self._entry)
            # Leaving the stream early, by Ctrl-C or a reader that stops, cancels the answer.
            with backend.generate(to_request(prompt)) as events:
                if stream:
                    for event in events:
                        if isinstance(event, TextEvent):
                            yield event.delta
                result = events.result()
            _log(response, result, backend.info())
            if not stream:
                yield result.text


class AsyncOneVision(_Answers, llm.AsyncModel):
    """The same for asyncio; both share one backend."""

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: AsyncResponse,
        conversation: AsyncConversation | None,
    ) -> AsyncGenerator[str, None]:
        with as_command_error():
            backend = registry.open_backend(self._entry)
            # Files are looked at, and URLs fetched.
            request = await asyncio.to_thread(to_request, prompt)
            async with backend.generate(request) as events:
                if stream:
                    async for event in events:
                        if isinstance(event, TextEvent):
                            yield event.delta
                result = await events.aresult()
            _log(response, result, await asyncio.to_thread(backend.info))
            if not stream:
                yield result.text


def to_request(prompt: llm.Prompt) -> GenerateRequest:
    """The whole conversation, earlier turns and their media included, with its settings. Reads the
    beginnings of files, and fetches URLs. Raises PluginError: for what the model cannot take.
    """
    given: dict[str, Any] = prompt.options.model_dump(exclude_none=True)
    stop = given.pop("stop", ())
    if prompt.schema is not None:
        given["json_schema"] = json.dumps(prompt.schema)
    messages = [_message(message.role, message.parts) for message in prompt.messages]
    return GenerateRequest(
        messages=[message for message in messages if message.parts],
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        **given,
    )


def _message(role: str, parts: list[Any]) -> Message:
    if role not in ROLES:
        raise bad_request(f"a message of the role {role!r} is not understood by this model")
    found: list[str | Media] = []
    for part in parts:
        if isinstance(part, TextPart):
            found.append(part.text)
        elif isinstance(part, AttachmentPart):
            if part.attachment is None:
                reason = "an attachment of an earlier turn was not kept"
                raise PluginError("unsupported_media", reason)
            found.append(media(part.attachment))
        elif not isinstance(part, ReasoningPart):  # another model's thoughts are not its answer
            name = type(part).__name__
            message = f"the conversation holds a {name}, which this model cannot take"
            raise bad_request(message, "it has no tools")
    return Message(ROLES[role], [part for part in found if part])


def _log(response: "llm.Response | AsyncResponse", result: GenerateResult, info: ModelInfo) -> None:
    """Token counts and times, for ``llm -u`` and ``llm logs``."""
    usage = result.usage
    details = {"media_tokens": usage.media_tokens, "cached_tokens": usage.cached_tokens}
    response.set_usage(
        input=usage.prompt_tokens,
        output=usage.completion_tokens,
        details={name: count for name, count in details.items() if count} or None,
    )
    response.set_resolved_model(info.id)
    response.response_json = {
        "finish_reason": result.finish_reason,
        "notes": list(result.notes),
        "revision": info.revision,
        "quantization": info.quantization,
        "seconds": usage.seconds,
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


class OneVisionEmbedding(EmbeddingModel):
    """A model of ``llm`` has one space: ``vision`` is for images and videos that look alike,
    ``joint`` holds texts, too.
    """

    supports_binary = True
    batch_size = ITEMS_PER_BATCH

    def __init__(self, entry: Entry, space: EmbeddingSpace) -> None:
        self.model_id = f"{entry.id}-{space}"
        self.supports_text = space == "joint"
        self._entry = entry
        self._space: EmbeddingSpace = space

    def _check(self, item: str | bytes) -> None:
        # In llm a ValueError, which `llm embed` shows as a traceback.
        if isinstance(item, str) and not self.supports_text:
            other = self.model_id.removesuffix("vision") + "joint"
            hint = f"give it images with --binary, or take {other}"
            raise CommandError(f"{self.model_id} has no place for texts; {hint}")

    def embed_batch(
        self, items: Iterable[str | bytes], *, key: str | None = None
    ) -> Iterator[list[float]]:
        rest = iter(items)
        while group := list(islice(rest, ITEMS_PER_BATCH)):
            with as_command_error():
                vectors = self._vectors(group)
            yield from vectors

    def _vectors(self, group: list[str | bytes]) -> list[list[float]]:
        alone = len(group) == 1
        wanted = [
            item
            if isinstance(item, str)
            else Media(kind(item, "the input" if alone else f"item {number}"), data=item)
            for number, item in enumerate(group, 1)
        ]
        try:
            found = registry.open_backend(self._entry).embed(
                EmbedRequest(wanted, space=self._space)
            )
        except PluginError as error:
            # The number of a single item says nothing.
            message = error.message.removeprefix("item 1: ") if alone else error.message
            raise PluginError(error.code, message, error.hint) from None
        return [list(vector) for vector in found.vectors]


def media(attachment: llm.Attachment) -> Media:
    """An image or a video. A file is named by its path; a URL is fetched. Raises PluginError: for
    what is neither, and what cannot be read.
    """
    if attachment.path:
        # Not from llm's bytes, which would be a copy of a whole video.
        path = os.path.abspath(os.path.expanduser(attachment.path))
        # As a video, of which any size may be opened: only the beginning is read.
        file = registry.POLICY.open(Media("video", path=path))
        assert not isinstance(file, bytes)
        with file:
            return Media(kind(file.read(SNIFF_BYTES), path), path=path)
    if attachment.content:
        return Media(kind(attachment.content, "the attachment"), data=attachment.content)
    if attachment.url:
        data = registry.POLICY.open(Media("image", url=attachment.url))
        assert isinstance(data, bytes)
        return Media(kind(data, attachment.url), data=data)
    raise PluginError("unsupported_media", "an attachment is empty", "attach an image or a video")


def kind(data: bytes, name: str) -> Kind:
    """Image or video; ``unsupported_media`` for anything else."""
    found = sniff(data[:SNIFF_BYTES])
    if found is None:
        message = f"{name} is neither an image nor a video"
        raise PluginError("unsupported_media", message, "attach one in a usual format")
    return found
