"""docs/http.md leaves nothing out: routes, fields, statuses, options."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from mlx_onevision.__main__ import cli
from mlx_onevision.plugins.contract.errors import CODES, PluginError
from mlx_onevision.plugins.hosts.http.app import OPERATIONS
from mlx_onevision.plugins.hosts.http.errors import to_http_error
from mlx_onevision.plugins.hosts.http.schemas import RejectUnsupported

DOCS = Path(__file__).parents[3].joinpath("docs", "http.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`]+)`", DOCS))
WORDS = {word for name in NAMED for word in re.findall(r"[\w./{}-]+", name)}


def test_every_route() -> None:
    for one in OPERATIONS:
        assert one.path.replace(":path", "") in WORDS and one.method in WORDS, one.path


@pytest.mark.parametrize(
    "asked",
    dict.fromkeys(one.takes for one in OPERATIONS if one.takes),
    ids=lambda one: one.__name__,
)
def test_every_field(asked: type[BaseModel]) -> None:
    refused = set(asked.accepted_defaults) if issubclass(asked, RejectUnsupported) else set()
    left = {"tool_choice", "function_call"}  # go with what they choose from
    assert set(asked.model_fields) | refused - left <= WORDS | {"text"}


def test_every_status_and_code() -> None:
    told = {int(status) for status in re.findall(r"^\| (\d{3}) \|", DOCS, re.M)}
    faults = [to_http_error(PluginError(code, "x")) for code in CODES]
    assert {fault.code for fault in faults} <= WORDS
    assert {fault.status for fault in faults} <= told


def test_every_option_and_no_other() -> None:
    table = DOCS.partition("## `mlx-onevision serve`")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(--?[a-z-]+)`", table))
    options = {option for param in cli.load("serve").params for option in param.opts}
    assert named == {option for option in options if option.startswith("-")}
