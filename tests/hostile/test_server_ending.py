"""The server's end: asked to stop in the midst of whatever it does, it is gone in time, and so is
everything that it started; and it ends by itself when its model is dead.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from changed_checkpoints import endless
from crowding import CHAT, EMBED, clip, command, picture, spread, table, uri
from hostile.processes import alive, descendants
from hostile.sizes import cases
from served import Client, image, text, video, wait_for

pytestmark = pytest.mark.measured

SECONDS = 5.0
TIMES = cases(1, 20)  # of each stage

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "streaming": (CHAT, {"messages": [{"role": "user", "content": "A story."}], "stream": True}),
    "waited for": (CHAT, {"messages": [{"role": "user", "content": "A story."}]}),
    "reading its prompt": (
        CHAT,
        {"messages": [{"role": "user", "content": "red and green " * 500}], "stream": True},
    ),
    "looking at pictures": (
        EMBED,
        {"input": [image(uri(picture(number), "image/png")) for number in range(16)]},
    ),
    "decoding a video": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [video(uri(clip(1), "video/mp4")), text("What?")]}
            ],
            "num_frames": 8,
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless(tmp_path_factory.mktemp("endless") / "model")


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[dict[str, list[float]]]:
    found: dict[str, list[float]] = {}
    yield found
    table("until the server is gone", {name: spread(times) for name, times in found.items()})


def begun(client: Client, stage: str, server: int) -> bool:
    if stage == "decoding a video":
        return bool(descendants(server))
    return bool(client.ask("GET", "/health").json["active"])


@pytest.mark.parametrize("stage", STAGES)
def test_asked_to_stop(stage: str, folder: Path, figures: dict[str, list[float]]) -> None:
    path, body = STAGES[stage]
    for number in range(TIMES):
        last = number == TIMES - 1 and stage == "waited for"
        ending = signal.SIGINT if last else signal.SIGTERM
        with command("--model", str(folder)) as (server, client):
            client.chat("hello", max_tokens=2)  # loads the model
            connection = client.begin("POST", path, {**body, "max_tokens": 2000})
            wait_for(lambda c=client, s=server: begun(c, stage, s.pid))
            answer = connection.getresponse() if stage == "streaming" else None
            started = descendants(server.pid)
            began = time.monotonic()
            server.send_signal(ending)
            server.wait(30)
            figures.setdefault(stage, []).append(time.monotonic() - began)
            if answer is not None:  # who still listens is told
                said = answer.read()
                assert b'"delta"' in said and b"the backend was closed" in said[-300:]
            connection.close()
            wait_for(lambda pids=started: not any(map(alive, pids)), 2)
            assert server.returncode == (130 if ending == signal.SIGINT else 0)
            assert server.stderr is not None and "Traceback" not in server.stderr.read()
    assert max(figures[stage]) <= SECONDS


def test_a_model_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    """As in the midst of a step that takes a minute: there is no way to interrupt it."""
    program = tmp_path / "stuck.py"
    program.write_text(
        "import sys, time\n"
        "from mlx_onevision.engine.runner import Runner\n"
        "Runner.fill_bank = lambda *_: time.sleep(60)\n"
        "from mlx_onevision.__main__ import main\n"
        "sys.argv[0] = 'mlx-onevision'\n"
        "main()\n"
    )
    with command("--model", "demo", program=[str(program)]) as (server, client):
        connection = client.begin("POST", CHAT, STAGES["waited for"][1])
        wait_for(lambda: client.ask("GET", "/health").json["loaded"], 30)
        time.sleep(0.2)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        assert time.monotonic() - began <= SECONDS and server.returncode == 0
        connection.close()


def test_a_model_that_is_dead_ends_the_server(tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text(
        "import sys\n"
        "from mlx_onevision.engine import engine\n"
        "serve = engine.serve\n"
        "def dies(runner, line):\n"
        "    if len(line[0].request.inputs.input_ids) > 200:\n"
        "        raise SystemExit('the thread of the model ends here')\n"
        "    serve(runner, line)\n"
        "engine.serve = dies\n"
        "from mlx_onevision.__main__ import main\n"
        "sys.argv[0] = 'mlx-onevision'\n"
        "main()\n"
    )
    with command("--model", "demo", program=[str(program)]) as (server, client):
        assert client.ask("GET", "/health").status == 200
        assert client.chat("hello", max_tokens=2).status == 200
        reply = client.chat("red and green " * 200)
        assert reply.status in (500, 503) and reply.json["error"]["message"]
        health = client.ask("GET", "/health")
        assert health.status == 503 and health.json["status"] == "failed"
        assert "started again" in health.json["error"]["message"]
        server.wait(10)
        assert server.returncode == 1
        assert server.stderr is not None
        said = server.stderr.read()
        assert "error: the model cannot answer any more, so the server ends; start it again" in said


def test_a_model_that_hangs_ends_the_server(tmp_path: Path) -> None:
    """As in a step that never ends: who waits gets an error, and the process an exit code."""
    program = tmp_path / "hangs.py"
    program.write_text(
        "import sys, time\n"
        "from mlx_onevision.engine import worker\n"
        "from mlx_onevision.engine.runner import Runner\n"
        "worker.HANG_SECONDS = 2.0\n"
        "Runner.fill_bank = lambda *_: time.sleep(600)\n"
        "from mlx_onevision.__main__ import main\n"
        "sys.argv[0] = 'mlx-onevision'\n"
        "main()\n"
    )
    with command("--model", "demo", program=[str(program)]) as (server, client):
        began = time.monotonic()
        reply = client.chat("hello", max_tokens=2)
        assert reply.status in (500, 503) and reply.json["error"]["message"]
        server.wait(20)
        assert server.returncode == 1 and time.monotonic() - began < 20
        assert server.stderr is not None
        assert "error: the model cannot answer any more" in server.stderr.read()
