"""A response, at any point of its making, as ``/v1/responses`` says it."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import GenerateResult, TokenLogprob, Usage
from mlx_onevision.plugins.hosts.http.errors import as_fault
from mlx_onevision.plugins.hosts.http.response_objects import (
    MessageStatus,
    OutputMessage,
    OutputText,
    ResponseObject,
    ResponseUsage,
)
from mlx_onevision.plugins.hosts.http.response_types import chosen, took
from mlx_onevision.plugins.hosts.http.schemas import ResponsesRequest


class Answer:
    """A response, at any point of its making. It has one message with one text."""

    def __init__(self, asked: ResponsesRequest, model: str) -> None:
        self._asked, self._model = asked, model
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.item_id = f"msg_{uuid.uuid4().hex}"

    def begun(self) -> ResponseObject:
        """Before there is anything of it."""
        asked = self._asked
        form: dict[str, Any] = {"type": "text"}
        if asked.text is not None and asked.text.format is not None:
            form = asked.text.format.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": [],
            "background": False,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": form},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def done(self, found: GenerateResult) -> ResponseObject:
        body = self.begun()
        body["output"] = [self.message(found)]
        body["usage"] = _usage(found.usage)
        if found.finish_reason == "length":
            body["status"] = "incomplete"
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["status"] = "completed"
            body["completed_at"] = int(time.time())
        if found.notes:
            body["notes"] = list(found.notes)
        return body

    def failed(self, error: PluginError, said: str | None) -> ResponseObject:
        """said : what there was of the text; None before it began."""
        body = self.begun()
        fault = as_fault(error)
        code = "server_error" if fault.status >= 500 else "invalid_prompt"
        body["status"], body["error"] = "failed", {"code": code, "message": fault.message}
        if said is not None:
            body["output"] = [self.item("incomplete", [text_part(said)])]
        return body

    def message(self, found: GenerateResult) -> OutputMessage:
        part = text_part(found.text, found.logprobs or ())
        return self.item("incomplete" if found.finish_reason == "length" else "completed", [part])

    def item(self, status: MessageStatus, content: list[OutputText]) -> OutputMessage:
        return {
            "type": "message",
            "id": self.item_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }


def text_part(text: str, logprobs: Sequence[TokenLogprob] = ()) -> OutputText:
    tokens = [chosen(token) for token in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _usage(usage: Usage) -> ResponseUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "media_tokens": usage.media_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "seconds": took(usage),
        "peak_memory_bytes": usage.peak_memory_bytes,
    }
