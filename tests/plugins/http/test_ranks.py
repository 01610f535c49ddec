"""A server whose model two processes share: it answers as one of one process does, and ends with an
error where one of them is lost.
"""

import json
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import ranks
from checkpoints import Sizes, write
from served import VIDEO, Client, image, serving, text, video, wait_for

from mlx_onevision.plugins.adapters.engine import open_engine

SECONDS = 10  # within which all end where one is lost
LONG = "tell me more " * 40
QUESTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": ("hello", {}),
    "image": ([image(), text("what is this?")], {}),
    "images": ([image(), image(), text("what are these?")], {}),
    "video": ([video(), text("what happens?")], {"max_tokens": 9}),
    "long": (LONG, {"max_tokens": 5}),
}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sampled": ("hello", {"temperature": 1.5, "max_tokens": 30}),
    "seeded": ([image(), text("hm")], {"temperature": 1.0, "seed": 3, "logprobs": True}),
    "schema": (
        "yes?",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "one", "schema": {"enum": ["yes", "no"]}},
            }
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), sizes=Sizes(layers=2))


@contextmanager
def serve(
    folder: Path, hosts: Path, program: tuple[str, ...] = ("-m", "mlx_onevision")
) -> Iterator[tuple[Client, list[Popen[str]]]]:
    command = [*program, "serve", "--model", str(folder), "--port", "0"]
    with ranks.running(command, command, folder=hosts) as started:
        assert started[0].stderr is not None
        port = re.search(r":(\d+)/v1", started[0].stderr.readline())
        assert port is not None
        yield Client(int(port[1])), started


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serve(folder, tmp_path_factory.mktemp("hosts")) as (client, started):
        yield client
        started[0].terminate()
        assert [(code, out) for code, out, _ in ranks.ended(started, SECONDS)] == [(0, "")] * 2


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Client]:
    with serving(open_engine(folder)) as client:
        yield client


def ask(client: Client, content: Any, settings: dict[str, Any]) -> dict[str, Any]:
    reply = client.chat(content, **{"max_tokens": 20, "temperature": 0, **settings})
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]


def test_eight_requests_at_once_are_answered_as_one_process_answers_them(
    shared: Client, alone: Client
) -> None:
    asked = {**QUESTIONS, **OTHERS}
    expected = {name: ask(alone, *QUESTIONS[name]) for name in QUESTIONS}
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = dict(
            zip(asked, threads.map(lambda one: ask(shared, *one), asked.values()), strict=True)
        )
    assert {name: answers[name] for name in QUESTIONS} == expected
    assert answers["sampled"]["finish_reason"] in ("stop", "length")
    assert answers["seeded"]["logprobs"]["content"]
    assert json.loads(answers["schema"]["message"]["content"]) in ("yes", "no")


def test_a_stop_string_ends_an_answer_on_all_ranks(shared: Client, alone: Client) -> None:
    whole = ask(alone, "hello", {"max_tokens": 30})["message"]["content"]
    settings = {"max_tokens": 30, "stop": whole[7:9]}
    ended = ask(shared, "hello", settings)
    assert ended == ask(alone, "hello", settings)
    assert ended["finish_reason"] == "stop"
    assert ask(shared, "hello", {"max_tokens": 30})["message"]["content"] == whole


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_after_a_cancelled_request_the_next_is_answered(
    shared: Client, alone: Client, when: str
) -> None:
    with begun(shared, when):
        pass
    wait_for(lambda: status(shared)["active"] == 0)
    assert ask(shared, *QUESTIONS["text"]) == ask(alone, *QUESTIONS["text"])


def test_vectors_and_descriptions_are_those_of_one_process(shared: Client, alone: Client) -> None:
    for space in ("vision", "joint"):
        body = {"input": [image()], "space": space}
        first, second = (
            client.ask("POST", "/v1/embeddings", body).json["data"] for client in (shared, alone)
        )
        assert first[0]["embedding"] == pytest.approx(second[0]["embedding"], abs=1e-5), space
    asked = {"video": {"url": VIDEO}, "max_tokens": 4, "num_frames": 2}
    first, second = (
        client.ask("POST", "/v1/video/describe", asked).events[-1] for client in (shared, alone)
    )
    assert first["result"] == second["result"] and first["result"]["segments"]


def status(client: Client) -> dict[str, Any]:
    return client.ask("GET", "/health").json


@contextmanager
def begun(client: Client, when: str) -> Iterator[None]:
    """A request that has come to its prefill, or to the decoding of a long answer."""
    content = f"{client.port} {LONG * 20}" if when == "prefill" else "hello"
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3000}
    sampled = {"temperature": 1.5, "stream": when == "decode"}
    connection = client.begin("POST", "/v1/chat/completions", {**body, **sampled})
    with closing(connection), ExitStack() as opened:
        if when == "prefill":
            wait_for(lambda: status(client)["active"] == 1)
            time.sleep(0.05)
        else:
            answer = opened.enter_context(connection.getresponse())
            while b"content" not in answer.readline():
                pass
        yield


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("when", ["prefill", "decode", "idle"])
def test_the_others_end_where_a_rank_is_killed(
    folder: Path, tmp_path: Path, lost: int, when: str
) -> None:
    with serve(folder, tmp_path) as (client, started):
        with nullcontext() if when == "idle" else begun(client, when):
            started[lost].kill()
            ended = ranks.ended(started, SECONDS)
        code, out, error = ended[1 - lost]
        assert (code, out, ended[lost][0]) == (1, "", -signal.SIGKILL)
        assert re.search(f"^error: rank {1 - lost}: .+", error, re.MULTILINE), error


def test_a_rank_that_is_killed_while_it_loads(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "killed.py"
    program.write_text(
        "import os, signal\n"
        "from mlx_onevision.engine import engine\n"
        "if os.environ['MLX_RANK'] == '1':\n"
        "    engine.load_checkpoint = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from mlx_onevision.__main__ import main\n"
        "main()\n"
    )
    asked = [str(program), "generate", "--model", str(folder), "--prompt", "hello"]
    with ranks.running(asked, asked, folder=tmp_path) as started:
        (code, out, error), killed = ranks.ended(started)
    assert (code, out, killed[0]) == (1, "", -signal.SIGKILL)
    said = "^error: rank 0: another rank has ended .+; start them again$"
    assert re.search(said, error, re.MULTILINE), error


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["serve", "generate"])
def test_all_end_where_a_rank_hangs(folder: Path, tmp_path: Path, rank: int, command: str) -> None:
    """As in a step that never ends: its process lives on, and its connections."""
    program = tmp_path / "hangs.py"
    program.write_text(
        "import os, sys, time\n"
        "from mlx_onevision.engine import worker\n"
        "from mlx_onevision.engine.runner import Runner\n"
        "worker.HANG_SECONDS = 3.0\n"
        f"if os.environ['MLX_RANK'] == '{rank}':\n"
        "    Runner.fill_bank = lambda *_: time.sleep(600)\n"
        "from mlx_onevision.__main__ import main\n"
        "main()\n"
    )
    if command == "serve":
        with serve(folder, tmp_path, (str(program),)) as (client, started):
            reply = client.chat("hello", max_tokens=2)
            assert reply.status in (500, 503) and reply.json["error"]["message"]
            ends = ranks.ended(started, 3 + 2 * SECONDS)
    else:
        asked = [str(program), "generate", "--model", str(folder), "--prompt", "hello"]
        with ranks.running(asked, asked, folder=tmp_path) as started:
            ends = ranks.ended(started)
    for number, (code, out, error) in enumerate(ends):
        assert (code, out) == (1, "") and "Traceback" not in error
        said = f"^error: rank {number}: .+ start (it|them) again"
        assert re.search(said, error, re.MULTILINE), error
