"""A response as an object, and as the events of which it is made."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, Literal

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.errors import to_http_error
from mlx_onevision.plugins.hosts.http.operations import line
from mlx_onevision.plugins.hosts.http.response_types import StageSeconds, token_logprob
from mlx_onevision.plugins.hosts.http.responses import types
from mlx_onevision.plugins.hosts.http.responses.schemas import ResponsesRequest
from mlx_onevision.plugins.hosts.http.tools import CallText, ForcedCall


class Answer:
    """A response, at any point of its making. It has one item: a message with one text, or a call.

    notes : of the request. call : what the answer has to be, if not text. keep : called with the
        whole response, unless it is not to be kept.
    """

    def __init__(
        self,
        asked: ResponsesRequest,
        model: str,
        notes: Sequence[str] = (),
        call: ForcedCall | None = None,
        keep: Callable[[types.ResponseObject], None] | None = None,
    ) -> None:
        self._keep = keep
        self._asked, self._model, self._notes = asked, model, notes
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._call = CallText(call) if call else None
        self._item_id = f"{'msg' if call is None else 'fc'}_{uuid.uuid4().hex}"
        self._text, self._numbers = "", count()  # of a call, its arguments
        self._announced = self._begun = False

    def _body(self) -> types.ResponseObject:
        asked = self._asked
        form: dict[str, Any] = {"type": "text"}
        if asked.text is not None and asked.text.format is not None:
            form = asked.text.format.model_dump(by_alias=True, exclude_none=True)
        choice = asked.tool_choice or ("auto" if asked.tools else "none")
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
            "previous_response_id": asked.previous_response_id,
            "store": self._keep is not None,
            "temperature": asked.temperature,
            "text": {"format": form},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None,
        }

    def whole(self, found: Sequence[results.GenerateResult]) -> types.ResponseObject:
        (one,) = found
        if self._call is not None:
            self._text += self._call.add(one.text)
        return self._completed(one)

    def _completed(self, found: results.GenerateResult) -> types.ResponseObject:
        body, cut = self._body(), found.finish_reason == "length"
        status: types.MessageStatus = "incomplete" if cut else "completed"
        if self._call is not None:
            body["output"] = [self._called(status)]
        else:
            body["output"] = [self._said(status, _part(found.text, found.logprobs or ()))]
        body["usage"] = _usage(found.usage)
        body["status"] = status
        if cut:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["completed_at"] = int(time.time())
        if notes := [*self._notes, *found.notes]:
            body["notes"] = notes
        if self._keep is not None:
            self._keep(body)
        return body

    def _failed(self, error: PluginError) -> types.ResponseObject:
        body, found = self._body(), to_http_error(error)
        code = "server_error" if found.status >= 500 else "invalid_prompt"
        body["status"], body["error"] = "failed", {"code": code, "message": found.message}
        if self._begun:
            item = self._said("incomplete", _part(self._text))
            body["output"] = [item if self._call is None else self._called("incomplete")]
        return body

    def _said(self, status: types.MessageStatus, *content: types.OutputText) -> types.OutputMessage:
        return {
            "type": "message",
            "id": self._item_id,
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    def _called(self, status: types.MessageStatus) -> types.FunctionCall:
        assert self._call is not None
        return {
            "type": "function_call",
            "id": self._item_id,
            "call_id": self._call.id,
            "name": self._call.name or "",
            "arguments": self._text,
            "status": status,
        }

    def events(self, event: results.Event, index: int = 0) -> Iterator[bytes]:
        for made in self._made(event):
            yield line(made, made["type"])

    def _made(self, event: results.Event) -> Iterator[types.ResponseEvent]:
        if not self._announced and not isinstance(event, results.ProgressEvent):
            # No earlier: until something is sent, an error has a status of its own.
            self._announced = True
            yield self._state("response.created", self._body())
            yield self._state("response.in_progress", self._body())
        if isinstance(event, results.TextEvent):
            yield from self._delta(event)
        elif isinstance(event, results.DoneEvent):
            assert isinstance(event.result, results.GenerateResult)
            yield from self._begin()
            yield from self._end(event.result)
        elif isinstance(event, results.ErrorEvent):
            yield self._state("response.failed", self._failed(event.error))

    def _delta(self, event: results.TextEvent) -> Iterator[types.ResponseEvent]:
        if self._call is None:
            yield from self._begin()
            self._text += event.delta
            yield {
                "type": "response.output_text.delta",
                **self._in_item(),
                "delta": event.delta,
                "logprobs": [token_logprob(token) for token in event.logprobs],
            }
        elif arguments := self._call.add(event.delta):
            yield from self._begin()
            self._text += arguments
            kind = "response.function_call_arguments.delta"
            yield {"type": kind, **self._of_item(), "delta": arguments}

    def _begin(self) -> Iterator[types.ResponseEvent]:
        if self._begun:
            return
        self._begun = True
        if self._call is not None:
            yield self._item_event("response.output_item.added", self._called("in_progress"))
            return
        yield self._item_event("response.output_item.added", self._said("in_progress"))
        yield {"type": "response.content_part.added", **self._in_item(), "part": _part("")}

    def _end(self, found: results.GenerateResult) -> Iterator[types.ResponseEvent]:
        body = self._completed(found)
        (item,) = body["output"]
        if item["type"] == "function_call":
            yield {
                "type": "response.function_call_arguments.done",
                **self._of_item(),
                "name": item["name"],
                "arguments": item["arguments"],
            }
        else:
            (part,) = item["content"]
            yield {
                "type": "response.output_text.done",
                **self._in_item(),
                "text": part["text"],
                "logprobs": part["logprobs"],
            }
            yield {"type": "response.content_part.done", **self._in_item(), "part": part}
        yield self._item_event("response.output_item.done", item)
        cut = body["status"] == "incomplete"
        yield self._state("response.incomplete" if cut else "response.completed", body)

    def _of_item(self) -> types.EventOfItem:
        """The number of an event within the item, and where that is."""
        return {"sequence_number": next(self._numbers), "item_id": self._item_id, "output_index": 0}

    def _in_item(self) -> types.EventOfContentPart:
        return {**self._of_item(), "content_index": 0}

    def _item_event(
        self,
        kind: Literal["response.output_item.added", "response.output_item.done"],
        item: types.OutputItem,
    ) -> types.OutputItemEvent:
        number = next(self._numbers)
        return {"type": kind, "sequence_number": number, "output_index": 0, "item": item}

    def _state(
        self, kind: types.ResponseStateType, body: types.ResponseObject
    ) -> types.ResponseEvent:
        return {"type": kind, "sequence_number": next(self._numbers), "response": body}


def _part(text: str, logprobs: Sequence[results.TokenLogprob] = ()) -> types.OutputText:
    tokens = [token_logprob(token) for token in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _usage(usage: results.Usage) -> types.ResponseUsage:
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
        "seconds": StageSeconds(**usage.seconds),
        "peak_memory_bytes": usage.peak_memory_bytes,
    }
