"""What crosses between a host and a backend: plain, strict, and the same after JSON."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_onevision.engine.options import Options
from mlx_onevision.plugins import interface
from mlx_onevision.plugins.interface import (
    CODES,
    Chapter,
    DescribeRequest,
    DescribeResult,
    DoneEvent,
    EmbedRequest,
    EmbedResult,
    ErrorEvent,
    Event,
    GenerateRequest,
    GenerateResult,
    Group,
    Media,
    Message,
    ModelInfo,
    PluginError,
    ProgressEvent,
    Segment,
    SegmentEvent,
    Space,
    TextEvent,
    TokenLogprob,
    TopLogprob,
    Usage,
    UsageEvent,
    event_from_dict,
    sniff,
)

PICTURE = Media("image", data=b"\x89PNG\0\xff")
VIDEO = Media("video", path="/films/a.mp4")
ASKED = GenerateRequest.ask(
    "what?", PICTURE, VIDEO, temperature=0, stop=["a", "\n"], seed=2**64 - 1
)
USAGE = Usage(10, 2, 5, 4, 0.1, 0.2, 0.3, 0.4, 1 << 40)
SEGMENT = Segment(0, 0.0, 1.5, "a 🙂 circle", (0.0, 0.75))
TOLD = DescribeResult(9.5, (SEGMENT,), "short", (Chapter(0, "All"),), ("no sound",), USAGE)
LIKELY = (
    TokenLogprob(
        "\ufffd", b"\xc3", -0.5, (TopLogprob("a", b"a", -0.25), TopLogprob("", b"", -9999))
    ),
    TokenLogprob("\ufffd", b"\xbc", 0.0),
)

RECORDS = [
    ASKED,
    GenerateRequest(
        [Message("user", "hello"), Message("assistant", ["a", VIDEO, "b"])], "be brief"
    ),
    EmbedRequest(["text", PICTURE, Group([PICTURE, VIDEO])], space="joint", normalize=False),
    DescribeRequest(VIDEO, segments=2.5, start=1, end=9, timeout=10),
    DescribeRequest(VIDEO, longest=None),
    GenerateResult("ü\u0000\n", "stop", USAGE, ("a note",)),
    EmbedResult(((0.1, -1e-30), (1.0, 0.0)), "vision", 2, "m", "r", "mean", True, "4 bits"),
    TOLD,
    GenerateRequest.ask("a", logprobs=20, json_schema='{"const": "\u00fc"}'),
    GenerateResult("ü", "stop", logprobs=LIKELY),
    ModelInfo("id", "r", 32768, ("generate", "images"), None, (Space("v", 2, ("image",), False),)),
    ModelInfo("id", "r", 1, ("logprobs", "json_schema"), healthy=False),
]
EVENTS: list[Event] = [
    ProgressEvent("preparing", 1, 2.5, "half"),
    ProgressEvent("queued"),
    TextEvent("\u0301🙂", 3),
    TextEvent("ü", logprobs=LIKELY),
    SegmentEvent(SEGMENT),
    UsageEvent(USAGE),
    DoneEvent(GenerateResult("text", "length")),
    DoneEvent(TOLD),
    ErrorEvent("busy", "too many", "later"),
]


def through_json(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, allow_nan=False))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_go_through_json(record: Any) -> None:
    values = through_json(record.to_dict())
    copy = type(record).from_dict(values)
    assert copy == record and copy.to_dict() == record.to_dict() and hash(copy) == hash(record)
    assert values["api_version"] == 1
    # Only the outermost says so.
    assert json.dumps(values).count("api_version") == 1


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_go_through_json(event: Event) -> None:
    copy = event_from_dict(through_json(event.to_dict()))
    assert copy == event and type(copy) is type(event)


def test_the_settings_are_those_of_the_library() -> None:
    fields = GenerateRequest.__dataclass_fields__.keys()
    # A function does not travel; a host cancels the stream instead. Requests of hosts share their
    # steps with others, which speculation does not. And how closely media are looked at is for
    # whoever opens the backend to say, who pays for it.
    ours = Options.__annotations__.keys()
    ours -= {"check", "prompt_lookup", "draft_tokens", "visual_tokens"}
    assert fields == ours | {"messages", "timeout"}


def test_importing_it_imports_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); import mlx_onevision.plugins.interface;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "asyncio" in done.stdout
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"mlx_onevision"}


def test_the_fake_imports_no_mlx() -> None:
    program = (
        "from mlx_onevision.plugins import open_backend, backends; import sys; backends();"
        "open_backend('fake').info(); open_backend('engine');"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"mlx", "mlx_lm", "numpy", "PIL", "av", "tokenizers"} & set(done.stdout.split())


def test_every_event_and_result_can_be_imported_from_it() -> None:
    for kind in (*get_args(interface.Event), *get_args(interface.Result)):
        assert getattr(interface, kind.__name__) is kind


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (GenerateRequest, {}, "no messages"),
    (GenerateRequest, {"messages": []}, "no messages"),
    (GenerateRequest, {"messages": "hello"}, "messages is a str; it must be a list"),
    (GenerateRequest, {"messages": [{"role": "user"}]}, "messages[0] has no content"),
    (GenerateRequest, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    (GenerateRequest, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content is 5"),
    (GenerateRequest, {"messages": [{"role": "user", "content": " "}]}, "empty"),
    (GenerateRequest, {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    (GenerateRequest, {"messages": [{"role": "user", "content": "a", "x": 1}]}, "'x'"),
    (Media, {"kind": "image"}, "none of them"),
    (Media, {"kind": "image", "path": "a", "url": "b"}, "path and url"),
    (Media, {"kind": "image", "path": "a\0b"}, "NUL"),
    (Media, {"kind": "image", "path": ""}, "empty"),
    (Media, {"kind": "sound", "path": "a"}, "'sound'; it must be image or video"),
    (Media, {"kind": "image", "data": "not base64!"}, "not base64"),
    (EmbedRequest, {"items": ["text"]}, "vision space has no place"),
    (EmbedRequest, {"items": [" "], "space": "joint"}, "items[0]"),
    (EmbedRequest, {"items": [{"kind": "group", "media": []}], "space": "joint"}, "no images"),
    (DescribeRequest, {"video": {"kind": "image", "path": "a"}}, "takes a video"),
    (DescribeRequest, {"video": {"kind": "video", "path": "a"}, "segments": 0}, "segments"),
    (GenerateRequest, {"api_version": 2}, "api_version 2"),
    (GenerateRequest, {"api_version": True}, "api_version True"),
    (GenerateRequest, {"api_version": None}, "api_version None"),
]
SAID = {"messages": [{"role": "user", "content": "a"}]}
NUMBERS: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -1, 1.5, "5", True]),
    ("temperature", [-0.1, float("nan"), float("inf"), "hot", 10**400]),
    ("top_p", [0, 1.1, -1]),
    ("top_k", [-1, 0.5]),
    ("min_p", [-0.1, 2]),
    ("repetition_penalty", [0, -1]),
    ("seed", [-1, 2**64, 1.0]),
    ("num_frames", [0, 2.0]),
    ("fps", [0, -2]),
    ("start", [-1]),
    ("end", [0]),
    ("timeout", [0, -1, 1e9]),
    ("stop", ["a", [""], [1], [["a"]]]),
    ("tiling", ["sometimes", 1]),
    ("order", ["reversed"]),
    ("system", [5]),
    ("logprobs", [-1, 21, 1.5, True]),
    ("json_schema", ["{", "3", "[]", {}, '{"a": ' * 2000, "{}" + " " * (1 << 18)]),
]
for name, values in NUMBERS:
    BAD += [(GenerateRequest, {**SAID, name: value}, name.split("_")[0]) for value in values]


@pytest.mark.parametrize(("cls", "values", "named"), BAD)
def test_what_makes_no_sense_is_refused(cls: Any, values: dict[str, Any], named: str) -> None:
    versioned = values if cls is Media else {"api_version": 1, **values}
    with pytest.raises(PluginError) as raised:
        cls.from_dict(versioned)
    error = raised.value
    assert error.code == "bad_request" and named in str(error)
    assert len(str(error)) < 250 and "\n" not in str(error) and not str(error).endswith(".")


def test_a_number_may_be_left_out() -> None:
    request = GenerateRequest.from_dict({"api_version": 1, **SAID, "seed": None, "top_p": 1})
    assert request.seed is None and request.top_p == 1.0 and type(request.top_p) is float


@pytest.mark.parametrize("values", [[], "x", None, {"api_version": 1}, {"api_version": 1, "a": 2}])
def test_what_is_no_event_is_refused(values: Any) -> None:
    with pytest.raises(PluginError) as raised:
        event_from_dict(values)
    assert raised.value.code == "bad_request"


def test_two_system_messages_are_refused() -> None:
    with pytest.raises(PluginError, match="two system"):
        GenerateRequest([Message("system", "a"), Message("user", "b")], system="c")


def test_they_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ASKED.max_tokens = 5  # pyright: ignore
    content = ["a"]
    message = Message("user", content)
    content.append("b")
    assert message.content == ("a",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted(GenerateRequest.__dataclass_fields__))


@given(st.dictionaries(KEYS, JSON, max_size=4), st.booleans())
def test_any_json_is_a_request_or_refused(values: dict[str, Any], said: bool) -> None:
    try:
        request = GenerateRequest.from_dict({"api_version": 1, **(SAID if said else {}), **values})
    except PluginError as error:
        assert error.code == "bad_request" and len(str(error)) <= 400
    else:
        assert GenerateRequest.from_dict(through_json(request.to_dict())) == request


def test_errors_go_through_json_and_pickles() -> None:
    import pickle

    for code in CODES:
        error = PluginError(code, "it went wrong", "try again")
        event = through_json(ErrorEvent.of(error).to_dict())
        for copy in (pickle.loads(pickle.dumps(error)), ErrorEvent.from_dict(event).error):
            assert copy.to_dict() == error.to_dict() and str(copy) == "it went wrong; try again"
    for values in ({}, {"code": "odd", "message": "a"}, {"code": "busy", "message": 5}):
        with pytest.raises(PluginError):
            ErrorEvent.from_dict({"api_version": 1, "kind": "error", **values})
    assert len(PluginError("busy", "long " * 1000, "x" * 1000).message) <= 300
    with pytest.raises(ValueError, match="odd"):
        PluginError("odd", "a")  # pyright: ignore


def test_a_long_image_is_short_in_print() -> None:
    assert repr(Media("image", data=b"x" * 10**6)) == "Media(image, 1000000 bytes)"
    assert len(repr(Media("image", url="data:" + "x" * 10**6))) < 120


def test_bytes_are_looked_at(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"):
        file = BytesIO()
        Image.new("RGB", (20, 20)).save(file, kind)
        assert sniff(file.getvalue()[:32]) == "image", kind
    assert sniff(b"\0\0\0\x18ftypheic\0\0\0\0") == "image"
    assert not any(sniff(b"B\xfaP\0G]\n"[:size]) for size in range(8))  # cut short
    video = Path(__file__).parents[2].joinpath("examples/circle.mp4").read_bytes()
    assert sniff(video[:32]) == "video"
    assert sniff(b"\x1aE\xdf\xa3 matroska") == "video"
    assert sniff(b"RIFF....AVI LIST") == "video"
    for data in (b"", b"text", b"RIFF....WAVE", b"%PDF-1.7"):
        assert sniff(data) is None
