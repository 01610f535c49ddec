"""From a prompt of ``llm`` to a request of the contract, and from its result back."""

import json
from typing import Any

import llm
from llm.models import AsyncResponse
from llm.parts import AttachmentPart, ReasoningPart, TextPart

from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.media import Media, Message, Role
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.results import GenerateResult, ModelInfo
from mlx_onevision.plugins.hosts.llm.attachments import media

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def asked(prompt: llm.Prompt) -> GenerateRequest:
    """The whole conversation, earlier turns and their media included, with its settings. Reads the
    beginnings of files, and what is behind addresses.

    Raises:
        PluginError: for what the model cannot take.
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


def report(
    response: "llm.Response | AsyncResponse", result: GenerateResult, info: ModelInfo
) -> None:
    """What it took, for ``llm -u`` and ``llm logs``."""
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
        "seconds": {
            "prepare": usage.prepare_seconds,
            "encode": usage.encode_seconds,
            "prefill": usage.prefill_seconds,
            "decode": usage.decode_seconds,
        },
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


def _message(role: str, parts: list[Any]) -> Message:
    if role not in ROLES:
        raise bad_request(f"a message of the role {role!r} is not understood by this model")
    found: list[str | Media] = []
    for part in parts:
        if isinstance(part, TextPart):
            found.append(part.text)
        elif isinstance(part, AttachmentPart):
            found.append(_shown(part))
        elif not isinstance(part, ReasoningPart):  # another model's thoughts are not its answer
            raise bad_request(
                f"the conversation holds a {type(part).__name__}, which this model cannot take",
                "it has no tools",
            )
    return Message(ROLES[role], [part for part in found if part])


def _shown(part: AttachmentPart) -> Media:
    if part.attachment is None:
        raise PluginError("unsupported_media", "an attachment of an earlier turn was not kept")
    return media(part.attachment)
