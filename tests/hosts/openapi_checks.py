"""What schemathesis checks besides its own checks, and what it is helped to make up: loaded by it."""

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import schemathesis

EXAMPLES = Path(__file__).parents[2] / "examples"


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PICTURE = _uri("image/png", EXAMPLES.joinpath("shapes.png").read_bytes())
FILM = _uri("video/mp4", EXAMPLES.joinpath("circle.mp4").read_bytes())
BROKEN = (
    _uri("image/png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
    _uri("video/mp4", b"\0\0\0\x1cftypisom" + b"\0" * 40),
)
A_PLACE = re.compile(r"(?i)data:|https?://|file:/|/")

# Why a request may be refused that the file allows: what it names is not there or not allowed, what
# it holds together makes no sense, or the model cannot do it. Nothing of it is said by one field.
CODES = ("unsupported_media", "too_large", "context_length_exceeded")
REASONS = (
    "the conversation is empty",
    r"items\[\d+\] is (an empty text|a text|a group)",
    "there are both num_frames and fps",
    "max_tokens and max_completion_tokens differ",
    "top_logprobs needs logprobs",
    r"end is [\d.e+-]+ s, which is not after start",
    r"start is [\d.e+-]+ s, (behind the video's end|but the video is)",
    r"[\d.e+-]+ s in segments of [\d.e+-]+ s are more than \d+ segments",
    "the path … is not allowed here",
    r"the path of the (image|video) holds a NUL",
    "the address of the (image|video) is not one of this machine",
    "addresses at .* are not allowed",
    "… is not an address that is read",
    r"vectors of the space \w+ have \d+ dimensions and cannot be shortened",
    "(json_schema|the schema)",
)


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Many of the places that are made up become really a picture or a film."""
    return _with_media(body, "")


def _with_media(value: Any, under: str) -> Any:
    if isinstance(value, dict):
        return {
            key: _with_media(inner, under if key == "url" else key) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_with_media(inner, under) for inner in value]
    if isinstance(value, str) and A_PLACE.match(value):
        right = FILM if under.startswith("video") else PICTURE
        choices = (right, right, right, *BROKEN, value)
        return choices[zlib.crc32(value.encode("utf-8", "replace")) % len(choices)]
    return value


@schemathesis.check
def refusals_have_one_form(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """OpenAI's, and short; nothing of the server's own, and nothing of anybody's data."""
    assert b"Traceback" not in response.content
    if response.status_code < 400 or response.request.method == "HEAD":
        return
    body = json.loads(response.content)
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}, body
    message = body["error"]["message"]
    assert message and len(message) <= 300 and "\n" not in message, body
    assert not re.search(r"(?i)\bdata:|file:|/(etc|home|root|tmp|usr)\b", message), body


@schemathesis.check
def the_file_says_what_is_taken(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """What the schema allows is never refused for the form of a field."""
    valid = case.meta is not None and case.meta.generation.mode.is_positive
    if not valid or response.status_code not in (400, 413):
        return
    error = json.loads(response.content)["error"]
    known = any(re.match(reason, error["message"]) for reason in REASONS)
    assert known or error["code"] in CODES, error
