"""Ollama's routes, for clients that speak nothing else: its own, and what is built on them."""

import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial, wraps
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import GenerateRequest, Message
from mlx_onevision.plugins.hosts.http import content
from mlx_onevision.plugins.hosts.http.content import EncodedImages, Strict, encoded_image
from mlx_onevision.plugins.hosts.http.errors import HTTPError, to_http_error
from mlx_onevision.plugins.hosts.http.formats import Formats, schema_text
from mlx_onevision.plugins.hosts.http.operations import (
    AppState,
    Operation,
    Prepared,
    SentEvents,
    generate,
)
from mlx_onevision.plugins.hosts.http.schemas import Defaults, RejectUnsupported, Stops
from mlx_onevision.plugins.hosts.http.tools import TOOLS_IGNORED_NOTE
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.service import Service
from mlx_onevision.sampling.ranges import RANGES

NDJSON_TYPE = "application/x-ndjson"
MODEL_FAMILY = "llava-onevision"


class Options(RejectUnsupported):
    """How tokens are chosen. Those of Ollama's runner, as ``num_ctx``, mean nothing here."""

    num_predict: int | None = None
    temperature: Annotated[float, Field(**RANGES["temperature"].bounds)] | None = None
    top_p: Annotated[float, Field(**RANGES["top_p"].bounds)] | None = None
    top_k: Annotated[int, Field(**RANGES["top_k"].bounds)] | None = None
    min_p: Annotated[float, Field(**RANGES["min_p"].bounds)] | None = None
    repeat_penalty: Annotated[float, Field(**RANGES["repetition_penalty"].bounds)] | None = None
    presence_penalty: Annotated[float, Field(**RANGES["presence_penalty"].bounds)] | None = None
    frequency_penalty: Annotated[float, Field(**RANGES["frequency_penalty"].bounds)] | None = None
    seed: int | None = None
    stop: Stops | None = None

    accepted_defaults: ClassVar[Defaults] = {"typical_p": (1,), "tfs_z": (1,), "mirostat": (0,)}

    @property
    def settings(self) -> dict[str, Any]:
        """As a GenerateRequest has them, but for the length of the answer."""
        names = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        seed = self.seed if self.seed is not None and self.seed >= 0 else None
        own = {"repetition_penalty": self.repeat_penalty, "seed": seed, "stop": self.stop or ()}
        return {**{name: getattr(self, name) for name in names}, **own}


class OllamaRequest(RejectUnsupported, Formats):
    """What both routes take. ``keep_alive`` is the server's own."""

    model: str
    stream: bool = True
    options: Options | None = None

    accepted_defaults: ClassVar[Defaults] = {"think": (False,), "raw": (False,), "suffix": ("",)}


class Call(Strict):
    """A call of an earlier answer, whose arguments are an object."""

    class CalledFunction(Strict):
        """The function and its arguments."""

        name: str
        arguments: dict[str, Any] = Field(default_factory=dict)

    function: CalledFunction


class Turn(content.RejectMisplacedContent):
    """A message, with its images as base64 beside the text."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: EncodedImages | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None
    tool_name: str | None = None

    def to_contract(self) -> Message:
        text = self.content or ""
        images = [encoded_image(one) for one in self.images or ()]
        if self.role == "tool":
            return content.result_message(self.tool_name, [*images, text])
        calls = [
            content.call_text(call.function.name, json.dumps(call.function.arguments))
            for call in self.tool_calls or ()
        ]
        return Message(self.role, [*images, *([text] if text else []), *calls])


class ChatRequest(OllamaRequest):
    """``tools`` : Ollama's protocol cannot force one, so none is called."""

    messages: Annotated[list[Turn], Field(fail_fast=True), BeforeValidator(content.count_parts)]
    tools: list[Any] | None = None


class PromptRequest(OllamaRequest):
    """A question without a conversation; without a prompt and images it loads the model."""

    prompt: str = ""
    system: str | None = None
    images: EncodedImages | None = None

    accepted_defaults: ClassVar[Defaults] = {
        **OllamaRequest.accepted_defaults,
        "context": ([],),
        "template": ("",),
    }
    hints: ClassVar[dict[str, str]] = {
        "context": "context is not kept here; take chat, with all messages"
    }


class ShowRequest(Strict):
    """The model that is asked about; ``name`` is the older field."""

    model: str | None = None
    name: str | None = None


def _handler(
    function: Callable[[AppState, Request], Awaitable[Response]],
) -> Callable[[AppState, Request], Awaitable[Response]]:
    """Errors as Ollama writes them."""

    @wraps(function)
    async def handle(state: AppState, request: Request) -> Response:
        try:
            return await function(state, request)
        except HTTPError as error:
            return refused(error)
        except PluginError as error:
            return refused(to_http_error(error))

    return handle


def refused(error: HTTPError) -> Response:
    """An error as Ollama writes it."""
    again = {"Retry-After": str(error.retry_after)} if error.status == 429 else None
    return JSONResponse({"error": error.message}, error.status, again)


@_handler
async def chat(state: AppState, request: Request) -> Response:
    """Answers a conversation, as lines of JSON unless ``stream`` is false."""

    def prepare(asked: ChatRequest) -> Prepared | Answer:
        return _prepare(state, asked, [turn.to_contract() for turn in asked.messages])

    return await _answered(state, request, await state.reader.read(request, ChatRequest, prepare))


@_handler
async def prompt(state: AppState, request: Request) -> Response:
    """Answers a prompt, as lines of JSON unless ``stream`` is false."""

    def prepare(asked: PromptRequest) -> Prepared | Answer:
        images = [encoded_image(one) for one in asked.images or ()]
        messages = [Message("user", [*images, asked.prompt])] if asked.prompt or images else []
        if messages and asked.system:
            messages.insert(0, Message("system", asked.system))
        return _prepare(state, asked, messages)

    return await _answered(state, request, await state.reader.read(request, PromptRequest, prepare))


def _prepare(
    state: AppState, asked: OllamaRequest, messages: Sequence[Message]
) -> "Prepared | Answer":
    """The answer alone where there is nothing to answer, which is how Ollama is asked to load."""
    _check_model(state, asked.model)
    notes = (
        [TOOLS_IGNORED_NOTE.partition(";")[0]]
        if isinstance(asked, ChatRequest) and asked.tools
        else []
    )
    answer = Answer(asked.model, isinstance(asked, ChatRequest), notes)
    if not messages:
        return answer
    options = asked.options or Options()
    limit = options.num_predict if (options.num_predict or 0) > 0 else None
    wanted = GenerateRequest(
        messages=messages,
        max_tokens=state.max_tokens(limit, "num_predict", notes),
        json_schema=schema_text(None, asked),
        **options.settings,
    )
    return Prepared([wanted], answer, asked.stream, logprobs="logprobs", json_schema="format")


async def _answered(state: AppState, request: Request, prepared: "Prepared | Answer") -> Response:
    if isinstance(prepared, Answer):
        await state.blocking(partial(_load, state.backend))
        return JSONResponse(prepared.last({"done_reason": "load"}))
    response = await generate(state, request, prepared)
    if isinstance(response, SentEvents):
        response.as_lines(NDJSON_TYPE, refused)
    return response


def _load(backend: Backend) -> None:
    """Loads the model where the backend can be told to. Takes a request's place meanwhile: any
    number of these would block the threads of all others.
    """
    if isinstance(backend, Service):
        with backend.reserved():
            backend.load()


def _check_model(state: AppState, name: str | None) -> None:
    state.check_model(name if name is None else name.removesuffix(":latest"))


class Answer:
    """An answer as lines of JSON, of which the last one has the figures; or as one."""

    def __init__(self, model: str, chat: bool, notes: Sequence[str]) -> None:
        self._model, self._chat, self._began = model, chat, time.monotonic()
        self._notes = notes  # filled until the answer begins

    def whole(self, found: Sequence[results.GenerateResult]) -> dict[str, Any]:
        (one,) = found
        return self.last(self._figures(one), one.text)

    def events(self, event: results.Event, index: int) -> Iterable[bytes]:
        if isinstance(event, results.TextEvent):
            yield _line({**self._said(event.delta), "done": False})
        elif isinstance(event, results.DoneEvent):
            assert isinstance(event.result, results.GenerateResult)
            yield _line(self.last(self._figures(event.result)))
        elif isinstance(event, results.ErrorEvent):
            yield _line({"error": to_http_error(event.error).message})

    def last(self, figures: dict[str, Any], text: str = "") -> dict[str, Any]:
        return {**self._said(text), "done": True, **figures}

    def _said(self, text: str) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._chat else None
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self._model, "created_at": now, **(said or {"response": text})}

    def _figures(self, found: results.GenerateResult) -> dict[str, Any]:
        usage = found.usage
        read = usage.prepare_seconds + usage.encode_seconds + usage.prefill_seconds
        return {
            "done_reason": found.finish_reason,
            "total_duration": _nanoseconds(time.monotonic() - self._began),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(read),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(usage.decode_seconds),
            **({"notes": notes} if (notes := [*self._notes, *found.notes]) else {}),
        }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


@_handler
async def tags(state: AppState, _: Request) -> Response:
    """Answers with the list of models, which has one."""
    info = await state.blocking(state.backend.info)
    made = datetime.fromtimestamp(state.created, UTC).isoformat().replace("+00:00", "Z")
    known = {"name": state.model, "model": state.model, "modified_at": made, "size": 0}
    return JSONResponse({"models": [{**known, "digest": "", "details": _details(info)}]})


@_handler
async def show(state: AppState, request: Request) -> Response:
    """Answers with what the model is and can do."""
    name = await state.reader.read(request, ShowRequest, lambda asked: asked.model or asked.name)
    _check_model(state, name)
    info = await state.blocking(state.backend.info)
    model = {"general.architecture": MODEL_FAMILY, f"{MODEL_FAMILY}.context_length": info.context}
    about = {"modelfile": "", "parameters": "", "template": "", "details": _details(info)}
    capabilities = ["completion", "vision"]
    return JSONResponse({**about, "model_info": model, "capabilities": capabilities})


@_handler
async def version_(state: AppState, _: Request) -> Response:
    """Answers with the version of this package."""
    return JSONResponse({"version": version("mlx-onevision")})


def _details(info: results.ModelInfo) -> dict[str, Any]:
    family = {
        "family": MODEL_FAMILY,
        "families": [MODEL_FAMILY],
        "format": "mlx",
        "parent_model": "",
    }
    return {**family, "parameter_size": "", "quantization_level": info.quantization or ""}


OPERATIONS = (
    Operation("POST", "/api/chat", chat, "ollamaChat", "Ollama's chat", {}),
    Operation("POST", "/api/generate", prompt, "ollamaGenerate", "Ollama's generate", {}),
    Operation("GET", "/api/tags", tags, "ollamaTags", "The model, as Ollama lists it", {}),
    Operation("POST", "/api/show", show, "ollamaShow", "The model, as Ollama shows it", {}),
    Operation("GET", "/api/version", version_, "ollamaVersion", "The server's version", {}),
)
"""Not in the OpenAPI file: whoever asks these routes knows them from Ollama."""
