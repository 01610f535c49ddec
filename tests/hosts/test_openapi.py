"""The OpenAPI file against the server that serves it: requests made up from it by schemathesis."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Client, serving

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.service import Limits

CHECKS = Path(__file__).with_name("openapi_checks.py")
TOKEN = "a token of the tests"

# 503 is stated: a request may say how long it has, and that may be too little. 400 and 413 are judged
# by a check of our own, by their reasons. Who deletes a job ends it, and can still read of it.
CONFIG = f"""
hooks = "{CHECKS}"
continue-on-failure = true
request-timeout = 30

[generation]
database = "none"

[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]
positive_data_acceptance.expected-statuses = [
    "2xx", "400", "401", "403", "404", "413", "429", "503"
]
use_after_free.enabled = false
"""


def explored(client: Client, tmp_path: Path, examples: int, *arguments: str) -> dict[str, Any]:
    """schemathesis' own report of its requests."""
    config, report = tmp_path / "schemathesis.toml", tmp_path / "report.json"
    config.write_text(CONFIG)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
        *(f"http://127.0.0.1:{client.port}/openapi.json", "--seed", "5"),
        *("--max-examples", str(examples), "--no-color"),
        *("--report", "json", "--report-json-path", str(report), *arguments),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return json.loads(report.read_text())
