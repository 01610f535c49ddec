"""The OpenAPI file against the server that serves it: requests made up from it by schemathesis."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from served import Client, serving

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.app import OPERATIONS
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits

CHECKS = Path(__file__).with_name("openapi_checks.py")
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
TOKEN = "a-token-of-the-tests"

# 503 is stated: a request may say how long it has, and that may be too little. 400 and 413 are
# judged by a check of our own, by their reasons. Who deletes a job ends it, and can still read it.
CONFIG = f"""
hooks = "{CHECKS}"
continue-on-failure = true
request-timeout = 30

[generation]
database = "none"
deterministic = true

[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]
positive_data_acceptance.expected-statuses = ["2xx", "400", "401", "404", "413", "429", "503"]
use_after_free.enabled = false
"""

Report = dict[str, Any]


def explored(client: Client, folder: Path, *arguments: str) -> Report:
    """schemathesis' own report of what it has sent and checked."""
    config, report = folder / "schemathesis.toml", folder / "report.json"
    config.write_text(CONFIG)
    command = [
        *(SCHEMATHESIS, "--config-file", config, "run", "--no-color", "--seed", "5"),
        *("--report", "json", "--report-json-path", report, *arguments),
        f"http://127.0.0.1:{client.port}/openapi.json",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout[:20000] + done.stdout[-3000:] + done.stderr[-2000:]
    return json.loads(report.read_text())


def clean(report: Report, log: pytest.LogCaptureFixture) -> int:
    """How many requests there were, none of which found anything."""
    assert report["complete"] and report["operations"]["tested"] == report["operations"]["total"]
    assert report["failures"] == report["errors"] == []
    assert not [record for record in log.records if record.levelno >= logging.ERROR]
    assert not [record for record in log.records if record.exc_info]
    return report["test_cases"]["generated"]


def test_the_file_is_openapi_and_says_what_there_is() -> None:
    with serving(FakeBackend()) as client:
        told = client.ask("GET", "/openapi.json").json
    assert list(OPENAPI_31_VALIDATOR.iter_errors(told)) == []
    Draft202012Validator.check_schema({"$defs": told["components"]["schemas"]})
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)))
    assert names <= set(told["components"]["schemas"])
    said = {(how.upper(), path) for path, ones in told["paths"].items() for how in ones}
    assert said == {(one.method, one.path.replace(":path", "")) for one in OPERATIONS}
    operations = [one for ones in told["paths"].values() for one in ones.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)


def test_the_fake(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that the file says, and what it does not."""
    with serving(FakeBackend(), ServerSettings(max_tokens=4096)) as client:
        report = explored(client, tmp_path, "--max-examples", "40")
    assert clean(report, caplog) >= 2000


def test_the_demo_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is made up reaches a real model, real images and videos among it."""
    limits = Limits(max_tokens=8, timeout=5)
    backend = open_backend("engine", model="demo", limits=limits)
    with serving(backend, ServerSettings(max_tokens=8)) as client:
        some = ("--phases", "examples,fuzzing", "--max-examples", "60")
        report = explored(client, tmp_path, *some)
    assert clean(report, caplog) >= 300


def test_a_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With one, nothing is answered without it, and the file says so."""
    with serving(FakeBackend(), ServerSettings(token=TOKEN, max_tokens=4096)) as client:
        bearer = ("--header", f"Authorization: Bearer {TOKEN}")
        report = explored(client, tmp_path, *bearer, "--phases", "fuzzing", "--max-examples", "10")
        bare = client.ask("GET", "/openapi.json")
        told = client.ask("GET", "/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json
    assert clean(report, caplog) >= 50
    assert bare.status == 401 and told["security"] == [{"token": []}]
    assert all(
        "401" in one["responses"] for path in told["paths"].values() for one in path.values()
    )
