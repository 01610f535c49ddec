"""The models that answer, for ``llm`` and for programs that use it, sync and async."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import llm
from llm.models import AsyncConversation, AsyncResponse

from mlx_onevision.plugins.contract.events import TextEvent
from mlx_onevision.plugins.hosts.llm.asking import asked, report
from mlx_onevision.plugins.hosts.llm.attachments import TYPES, media
from mlx_onevision.plugins.hosts.llm.opened import opened
from mlx_onevision.plugins.hosts.llm.options import OneVisionOptions
from mlx_onevision.plugins.hosts.llm.refusals import told
from mlx_onevision.plugins.hosts.llm.registry import Entry


class OneVision(llm.Model):
    """A model of :mod:`shelf`. Making one costs nothing; it is loaded when it is asked."""

    can_stream = True
    supports_schema = True
    attachment_types = TYPES

    class Options(OneVisionOptions):
        pass

    def __init__(self, entry: Entry) -> None:
        self.model_id = entry.id
        self._entry = entry

    def _validate_attachments(self, attachments: list[llm.Attachment] | None = None) -> None:
        _check(attachments)

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        with told():
            backend = opened(self._entry)
            # Left early, by Ctrl-C or by whoever reads it, it ends the answer.
            with backend.generate(asked(prompt)) as events:
                if stream:
                    for event in events:
                        if isinstance(event, TextEvent):
                            yield event.delta
                result = events.result()
            report(response, result, backend.info())
            if not stream:
                yield result.text


class AsyncOneVision(llm.AsyncModel):
    """The same for asyncio; both share one backend."""

    can_stream = True
    supports_schema = True
    attachment_types = TYPES

    class Options(OneVisionOptions):
        pass

    def __init__(self, entry: Entry) -> None:
        self.model_id = entry.id
        self._entry = entry

    def _validate_attachments(self, attachments: list[llm.Attachment] | None = None) -> None:
        _check(attachments)

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: AsyncResponse,
        conversation: AsyncConversation | None,
    ) -> AsyncGenerator[str, None]:
        with told():
            backend = opened(self._entry)
            # Files are looked at, and addresses fetched.
            request = await asyncio.to_thread(asked, prompt)
            async with backend.generate(request) as events:
                if stream:
                    async for event in events:
                        if isinstance(event, TextEvent):
                            yield event.delta
                result = await events.aresult()
            report(response, result, await asyncio.to_thread(backend.info))
            if not stream:
                yield result.text


def _check(attachments: list[llm.Attachment] | None) -> None:
    """By their bytes, where llm would go by a guessed type. What is behind an address shows when it
    is fetched.
    """
    with told():
        for attachment in attachments or []:
            if attachment.path or not attachment.url:
                media(attachment)
