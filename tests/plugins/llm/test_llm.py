"""The plugin of llm, in this process and over the fake backend: what it makes of llm's prompts, and
llm of its answers. tests/hosts/test_llm.py runs the real command on the demo model.
"""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import click
import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm.parts import Message, ReasoningPart, TextPart, ToolCallPart

from mlx_onevision.plugins.adapters.fake import VECTOR_DIM, FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import GenerateRequest, Media
from mlx_onevision.plugins.hosts.llm import registry
from mlx_onevision.plugins.hosts.llm.commands import onevision
from mlx_onevision.plugins.hosts.llm.models import OneVisionOptions, to_request
from mlx_onevision.plugins.hosts.llm.registry import BUILT_IN
from mlx_onevision.plugins.service.service import Limits

EXAMPLES = Path(__file__).parents[3] / "examples"
SHAPES, CIRCLE = EXAMPLES / "shapes.png", EXAMPLES / "circle.mp4"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of llm's own."""
    folder = tmp_path / "llm"
    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    return folder


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    """In the place of the demo model."""
    with FakeBackend(policy=registry.POLICY, limits=Limits(waiting=100)) as backend:
        monkeypatch.setitem(registry._backends, ("demo", None), backend)
        yield backend


@pytest.fixture
def model() -> llm.Model:
    return llm.get_model("onevision-demo")


def picture(path: Path = SHAPES) -> llm.Attachment:
    return llm.Attachment(path=str(path))


def test_llm_imports_nothing_heavy_for_it() -> None:
    program = (
        "import sys, llm; from llm.cli import cli; "
        "cli(['onevision', '--help'], standalone_mode=False); "
        "llm.get_model('onevision-demo'), llm.get_embedding_model('onevision-demo-joint'); "
        "print('mlx_onevision.plugins.hosts.llm.models' in sys.modules); "
        # numpy comes with sqlite-utils, which llm itself imports.
        "heavy = ('mlx', 'mlx_lm', 'PIL', 'av', 'transformers', 'mlx_onevision.api'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.stdout.splitlines()[-2:] == ["True", "[]"], done.stderr


def test_models_are_there_without_being_asked_for() -> None:
    known = {found.model.model_id: found for found in llm.get_models_with_aliases()}
    embedding = {found.model.model_id for found in llm.get_embedding_models_with_aliases()}
    for size in ("demo", "0.5b", "7b", "72b"):
        assert known[f"onevision-{size}"].async_model.model_id == f"onevision-{size}"
        assert {f"onevision-{size}-vision", f"onevision-{size}-joint"} <= embedding


def test_every_setting_of_the_contract_is_an_option() -> None:
    # llm's own, none, or what has no place in an option
    apart = {"messages", "system", "json_schema", "logprobs", "timeout", "logit_bias"}
    wanted = set(GenerateRequest.__dataclass_fields__) - apart
    assert set(OneVisionOptions.model_fields) == wanted
    assert all(field.description for field in OneVisionOptions.model_fields.values())


def test_the_page_names_every_option_and_command() -> None:
    page = Path(__file__).parents[3].joinpath("docs/llm.md").read_text(encoding="utf-8")
    table = page.partition("| option (`-o name value`) | |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(OneVisionOptions.model_fields)
    for command in onevision.commands.values():
        assert f"llm onevision {command.name}" in page
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert f"`{parameter.opts[0]}" in page


def test_options_schema_and_system_arrive(model: llm.Model) -> None:
    given: dict[str, Any] = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 5,
        "repetition_penalty": 1.1,
        "stop": "x",
        "num_frames": 2,
        "start": 1.0,
        "end": 2.0,
        "tiling": "never",
        "order": "given",
    }
    schema = {"type": "object", "properties": {"count": {"type": "integer"}}}
    request = to_request(model.prompt("hi", system="Be brief.", schema=schema, **given).prompt)
    assert {name: getattr(request, name) for name in given} == {**given, "stop": ("x",)}
    assert json.loads(request.json_schema or "") == schema
    assert [message.role for message in request.messages] == ["system", "user"]
    assert to_request(model.prompt("hi", stop=["a", "b"]).prompt).stop == ("a", "b")
    assert to_request(model.prompt("hi", fps=2).prompt) == GenerateRequest.ask("hi", fps=2.0)


def test_earlier_turns_come_along_with_their_media(fake: FakeBackend, model: llm.Model) -> None:
    conversation = model.conversation()
    first = conversation.prompt("one", system="s", attachments=[picture()])
    assert first.text() == "one [1 image][0 videos]"
    second = conversation.prompt("two", attachments=[picture(CIRCLE)])
    assert second.text() == "two [1 image][1 video]"
    request = to_request(second.prompt)
    assert [(message.role, message.parts) for message in request.messages] == [
        ("system", ("s",)),
        ("user", ("one", Media("image", path=str(SHAPES)))),
        ("assistant", ("one [1 image][0 videos]",)),
        ("user", ("two", Media("video", path=str(CIRCLE)))),
    ]
    # As it is kept between two programs.
    kept = llm.Response.from_dict(second.to_dict(), model=model)
    assert kept.reply("three").text() == "three [1 image][1 video]"


def test_messages_of_other_models(fake: FakeBackend, model: llm.Model) -> None:
    thought = Message("assistant", [ReasoningPart("hm"), TextPart("yes")])
    asking = Message("user", [TextPart("well?")])
    request = to_request(model.prompt("so?", messages=[asking, thought]).prompt)
    assert [message.parts for message in request.messages] == [("well?",), ("yes",), ("so?",)]
    call = Message("assistant", [ToolCallPart("look", {})])
    with pytest.raises(llm.ModelError, match="ToolCallPart, which this model cannot take; it has"):
        model.prompt("so?", messages=[asking, call]).text()
    with pytest.raises(llm.ModelError, match="role 'tool'"):
        model.prompt("so?", messages=[asking, Message("tool", [TextPart("4")])]).text()


def test_bytes_decide_what_an_attachment_is(tmp_path: Path, model: llm.Model) -> None:
    renamed = tmp_path / "film.jpg"
    renamed.write_bytes(CIRCLE.read_bytes())
    shown = llm.Attachment(type="image/jpeg", path=str(renamed))
    sent = llm.Attachment(type="video/mp4", content=SHAPES.read_bytes())
    heic = llm.Attachment(content=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert heic.resolve_type() != "image/heic"  # which is why
    request = to_request(model.prompt("hi", attachments=[shown, sent, heic]).prompt)
    assert [medium.kind for medium in request.media] == ["video", "image", "image"]
    assert request.media[0].path == str(renamed)  # read where it is
    text = tmp_path / "a.png"
    text.write_text("no picture")
    for bad, said in (
        (llm.Attachment(type="image/png", path=str(text)), "a.png is neither an image nor a"),
        (llm.Attachment(type="image/png", content=b"no picture"), "neither an image nor a video"),
        (llm.Attachment(type="image/png", path=str(tmp_path / "no")), "there is no such file"),
        (llm.Attachment(type="image/png", path=str(tmp_path)), "it is a folder"),
        (llm.Attachment(type="image/png"), "an attachment is empty"),
    ):
        with pytest.raises(llm.ModelError, match=said):
            model.prompt("hi", attachments=[bad])


def test_addresses_are_fetched_and_looked_at(fake: FakeBackend, model: llm.Model) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(EXAMPLES)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    try:
        # The type is what the address said at some time: nothing hangs on it.
        shown = llm.Attachment(type="text/plain", url=f"{at}/shapes.png")
        assert model.prompt("hi", attachments=[shown]).text() == "hi [1 image][0 videos]"
        for name, said in (("ask.py", "neither an image nor a video"), ("none.png", "404")):
            missing = llm.Attachment(type="image/png", url=f"{at}/{name}")
            with pytest.raises(llm.ModelError, match=said):
                model.prompt("hi", attachments=[missing]).text()
    finally:
        server.shutdown()
        server.server_close()


def test_streaming_and_usage(fake: FakeBackend, model: llm.Model) -> None:
    response = model.prompt("one two", attachments=[picture()])
    assert list(response) == ["one ", "two ", "[1 image]", "[0 videos]"]
    usage = response.usage()
    assert (usage.input, usage.output, usage.details) == (198, 4, {"media_tokens": 196})
    assert response.resolved_model == "fake"
    whole = model.prompt("one two", stream=False, max_tokens=2)
    assert list(whole) == ["one two "]
    told = whole.json()
    assert told is not None and told["finish_reason"] == "length"
    assert set(told["seconds"]) == {"prepare", "encode", "prefill", "decode"}
    json.dumps(told)


def test_async(fake: FakeBackend) -> None:
    async def run() -> None:
        model = llm.get_async_model("onevision-demo")
        conversation = model.conversation()
        first = conversation.prompt("one two", attachments=[picture()])
        assert [piece async for piece in first] == ["one ", "two ", "[1 image]", "[0 videos]"]
        assert (await first.usage()).output == 4
        second = conversation.prompt("three", stream=False)
        assert await second.text() == "three [1 image][0 videos]"
        # Several at once, over the one backend.
        answers = await asyncio.gather(*(model.prompt(f"n{n}").text() for n in range(20)))
        assert answers == [f"n{n} [0 images][0 videos]" for n in range(20)]
        with pytest.raises(llm.ModelError, match="conversation is empty"):
            await model.prompt(" ").text()

    asyncio.run(run())


def test_an_answer_left_early_is_ended(monkeypatch: pytest.MonkeyPatch, model: llm.Model) -> None:
    async def leave() -> None:
        response = llm.get_async_model("onevision-demo").prompt("hi")
        task = asyncio.create_task(response.text())
        while not backend.steps:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with FakeBackend(pieces=["a"] * 10_000, delay=0.01, policy=registry.POLICY) as backend:
        monkeypatch.setitem(registry._backends, ("demo", None), backend)
        pieces = iter(model.prompt("hi"))
        assert next(pieces) == "a"
        del pieces
        for at_most in (0, 1):  # by closing, and by cancelling the task
            if at_most:
                asyncio.run(leave())
            for _ in range(400):
                if not backend.info().active:
                    break
                threading.Event().wait(0.005)
            assert backend.info().active == 0 and backend.steps < 100


def test_what_the_backend_refuses(monkeypatch: pytest.MonkeyPatch, model: llm.Model) -> None:
    error = PluginError("out_of_memory", "there is too little memory", "close something")
    with FakeBackend(fail_at=1, error=error, policy=registry.POLICY) as backend:
        monkeypatch.setitem(registry._backends, ("demo", None), backend)
        with pytest.raises(llm.ModelError, match="too little memory; close something"):
            model.prompt("one two three").text()
        done = CliRunner().invoke(cli, ["-m", "onevision-demo", "one two three"])
        assert done.exit_code == 1 and done.stderr.strip() == f"Error: {error}"


def test_embedding(fake: FakeBackend) -> None:
    joint = llm.get_embedding_model("onevision-demo-joint")
    vision = llm.get_embedding_model("onevision-demo-vision")
    shapes, video = SHAPES.read_bytes(), CIRCLE.read_bytes()
    assert len(joint.embed("a text")) == VECTOR_DIM
    assert joint.embed(shapes) == vision.embed(shapes) != vision.embed(video)
    many = [shapes, video] * 40  # more than are held at once
    assert list(vision.embed_batch(many)) == [vision.embed(item) for item in many]
    assert len(list(joint.embed_multi(["a", shapes, "b"], batch_size=2))) == 3
    with pytest.raises(llm.ModelError, match=r"place for texts; .*onevision-demo-joint"):
        vision.embed("a text")
    with pytest.raises(llm.ModelError, match=r"^the input is neither an image nor a video"):
        vision.embed(b"a text")
    with pytest.raises(llm.ModelError, match=r"^item 2 is neither"):
        list(vision.embed_multi([shapes, b"a text"]))
    with pytest.raises(llm.ModelError, match=r"items\[1\] is an empty text"):
        list(joint.embed_multi(["a", " "]))


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli, ["onevision", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_models_of_ones_own(home: Path) -> None:
    assert run("add", "org/model", "--alias", "mine", "--alias", "own", "--revision", "v1")[0] == 0
    assert run("add", "org/other", "--name", "theirs") == (0, "llm -m theirs asks org/other\n", "")
    assert json.loads((home / "onevision.json").read_text()) == {
        "org/model": {"model": "org/model", "revision": "v1", "aliases": ["mine", "own"]},
        "theirs": {"model": "org/other", "revision": None, "aliases": []},
    }
    assert llm.get_model("mine").model_id == "org/model"
    assert llm.get_async_model("own").model_id == "org/model"
    assert llm.get_embedding_model("mine-vision").model_id == "org/model-vision"
    listed = run("list")[1].splitlines()
    assert listed[-2:] == ["org/model: org/model at v1 (aliases: mine, own)", "theirs: org/other"]
    assert len(json.loads(run("list", "--json")[1])) == len(BUILT_IN) + 2
    assert run("remove", "mine")[0] == 0
    assert [line.split(":")[0] for line in run("list")[1].splitlines()][-1] == "theirs"
    assert llm.get_model("theirs").model_id == "theirs"


def test_memory_options_are_kept_with_a_model(home: Path) -> None:
    given = ("--memory-limit", "0.0001", "--kv-bits", "8")
    assert run("add", "demo", "--name", "small", *given)[0] == 0
    assert json.loads((home / "onevision.json").read_text()) == {
        "small": {
            "model": "demo",
            "revision": None,
            "aliases": [],
            "memory_limit": 0.0001,
            "kv_bits": 8,
        }
    }
    with pytest.raises(llm.ModelError, match=r"the limit is 0\.10 MB"):
        llm.get_model("small").prompt("hello", max_tokens=2).text()
    assert llm.get_model("onevision-demo").prompt("hello", max_tokens=2).text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "org/model"), "has a model 'org/model' already"),
        (("add", "org/new", "--alias", "mine"), "has a model 'mine' already"),
        (("add", "org/new", "--alias", "onevision-7b"), "has a model 'onevision-7b' already"),
        (("add", "org/new", "--alias", "a b"), "'a b' is no name"),
        (("add", "org/new", "--name", ""), "'' is no name"),
        (("add", "7b"), "ask onevision-7b"),
        (("add", "7b", "--memory-limit", "9", "--name", "onevision-7b"), "has a model"),
        (("add", "/there/is/no/such"), "no model"),
        (("add", str(EXAMPLES)), "no config.json"),
        (("remove", "onevision-7b"), "always there"),
        (("remove", "nobody"), "has not been added"),
    ],
)
def test_what_cannot_be_added_or_removed(arguments: tuple[str, ...], said: str) -> None:
    assert run("add", "org/model", "--alias", "mine")[0] == 0
    code, out, err = run(*arguments)
    assert code == 1 and out == "" and said in err
    assert err.startswith("Error: ") and len(err.splitlines()) == 1
    assert len(json.loads(run("list", "--json")[1])) == len(BUILT_IN) + 1


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"a": 1}', '{"a": {}}', '{"a": {"model": "m", "aliases": "x"}}'),
        *('{"a": {"model": "m", "kv_bits": 3}}', '{"a": {"model": "m", "memory_limit": "8"}}'),
    ],
)
def test_a_spoilt_list_takes_nothing_else_away(home: Path, text: str) -> None:
    home.mkdir()
    (home / "onevision.json").write_text(text)
    done = CliRunner().invoke(cli, ["models", "-m", "onevision-demo"])
    assert done.exit_code == 0 and "onevision-demo" in done.stdout
    assert "onevision.json cannot be read" in done.stderr and "delete it" in done.stderr
    code, _, err = run("list")
    assert code == 1 and "onevision.json cannot be read" in err
    assert (home / "onevision.json").read_text() == text
