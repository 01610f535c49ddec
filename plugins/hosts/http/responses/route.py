"""``POST /v1/responses``, and ``GET`` and ``DELETE`` of a response that is kept."""

from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.hosts.http.formats import schema_text
from mlx_onevision.plugins.hosts.http.operations import (
    EVENTS,
    JSON,
    AppState,
    Operation,
    Prepared,
    generate,
)
from mlx_onevision.plugins.hosts.http.responses import types
from mlx_onevision.plugins.hosts.http.responses.answer import Answer
from mlx_onevision.plugins.hosts.http.responses.conversation import Conversation
from mlx_onevision.plugins.hosts.http.responses.schemas import LOGPROBS_INCLUDE, ResponsesRequest
from mlx_onevision.plugins.hosts.http.schemas import options
from mlx_onevision.plugins.hosts.http.tools import TOOLS_IGNORED_NOTE, forced_call
from mlx_onevision.plugins.hosts.http.truncation import generate_shortened


async def respond(state: AppState, request: Request) -> Response:
    """Answers a response, whole or as server-sent events."""
    prepared = await state.reader.read(request, ResponsesRequest, partial(_prepare, state))
    return await generate(state, request, prepared)


def _prepare(state: AppState, asked: ResponsesRequest) -> Prepared:
    state.check_model(asked.model)
    logprobs = LOGPROBS_INCLUDE in (asked.include or ())
    notes: list[str] = []
    said = Conversation(asked, state.memory)
    call = forced_call(asked.tools or (), asked.tool_choice, said.called)
    if asked.tools and call is None and asked.tool_choice != "none":
        notes.append(TOOLS_IGNORED_NOTE)
    form = asked.text.format if asked.text else None
    wanted = GenerateRequest(
        messages=said.with_instructions(asked.instructions),
        max_tokens=state.max_tokens(asked.max_output_tokens, "max_output_tokens", notes),
        logprobs=(asked.top_logprobs or 0) if logprobs or asked.top_logprobs else None,
        json_schema=call.schema if call else schema_text(form, asked),
        **options(asked),
    )
    keep = None if asked.store is False else said.keep
    shortens = asked.truncation == "auto"
    return Prepared(
        requests=[wanted],
        answer=Answer(asked, state.model, notes, call, keep),
        streamed=bool(asked.stream),
        logprobs="include" if asked.top_logprobs is None else "top_logprobs",
        json_schema="tool_choice" if call else "text",
        start=partial(generate_shortened, state.backend, notes=notes) if shortens else None,
    )


async def retrieve(state: AppState, request: Request) -> Response:
    """Answers with a response that is kept."""
    return JSONResponse(state.memory.response(request.path_params["id"]).body)


async def delete(state: AppState, request: Request) -> Response:
    """Forgets a response, and answers that it did."""
    id = request.path_params["id"]
    state.memory.forget(id)
    deleted: types.DeletedResponse = {"id": id, "object": "response", "deleted": True}
    return JSONResponse(deleted)


PATH = "/v1/responses"

OPERATIONS = (
    Operation(
        "POST",
        PATH,
        respond,
        name="createResponse",
        summary="The next answer of a conversation",
        takes=ResponsesRequest,
        gives={JSON: types.ResponseObject, EVENTS: types.ResponseEvent},
    ),
    Operation(
        "GET",
        PATH + "/{id}",
        retrieve,
        name="retrieveResponse",
        summary="A response that is kept",
        gives={JSON: types.ResponseObject},
        refuses=(404,),
    ),
    Operation(
        "DELETE",
        PATH + "/{id}",
        delete,
        name="deleteResponse",
        summary="Forget a response",
        gives={JSON: types.DeletedResponse},
        refuses=(404,),
    ),
)
