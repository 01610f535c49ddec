"""What schemathesis checks besides its own checks, and what it is helped to make up; it loads this
file.
"""

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
VIDEO = _uri("video/mp4", EXAMPLES.joinpath("circle.mp4").read_bytes())
BROKEN = (
    _uri("image/png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
    _uri("video/mp4", b"\0\0\0\x1cftypisom" + b"\0" * 40),
)
SAID = ("content", "text", "input")
A_PLACE = re.compile(r"(?i)data:|https?://|file:/|/")

# Why a request may be refused that the file allows: what it names is not there or not allowed, what
# it holds together makes no sense, or the model cannot do it. Nothing of it is said by one field.
CODES = ("unsupported_media", "too_large", "context_length_exceeded")
REASONS = (
    r"(messages|input): there are [0-9,]+ messages and parts; ",  # parts are counted, too
    "the conversation is empty",
    r"items\[\d+\] is (an empty text|a text|a group)",
    r"item \d+: an item holds image and video",
    "there are both num_frames and fps",
    "max_tokens and max_completion_tokens differ",
    "the form of the answer is given by several names",
    "tool_choice (is required, without tools|names '.*', which is not among the tools)",
    "top_logprobs needs logprobs",
    r"end is [\d.e+-]+ s, which is not after start",
    r"start is [\d.e+-]+ s, (behind the video's end|but the video is)",
    r"[\d.e+-]+ s in segments of [\d.e+-]+ s are more than \d+ segments",
    "the path … is not allowed here",
    r"the path of the (image|video) holds a NUL",
    "the address of the (image|video) is not one of this machine",
    "addresses at .* are not allowed",
    "… is not an address that is read",
    "no uploads are taken here",
    "the upload .* is not here",
    r"vectors of the space \w+ have \d+ dimensions and cannot be shortened",
    "(json_schema|the schema|the JSON schema)",
    r".*\btext is not read here",  # where an empty one was filled, above
    r"\w+ is not supported by this model",
)


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """A video that can be looked at, to begin with."""
    request = raw_schema["components"]["schemas"]["VideoRequest"]
    request["properties"]["video"]["examples"] = [VIDEO]


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Many of the places that are made up become really an image or a video, and most texts that
    are empty say something.
    """
    salt = zlib.crc32(repr(body).encode("utf-8", "replace"))
    return _filled(body, "", salt)


def _filled(value: Any, key: str, salt: int) -> Any:
    if isinstance(value, dict):
        return {
            name: _filled(inner, key if name == "url" else name, salt)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_filled(inner, key, salt) for inner in value]
    if not isinstance(value, str):
        return value
    if A_PLACE.match(value):
        right = VIDEO if key.startswith("video") else PICTURE
        choices = (right, right, right, *BROKEN, value)
        return choices[salt % len(choices)]
    return "what is this?" if not value and key in SAID and salt % 4 else value


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
