"""docs/plugins.md names everything that can be set, and its programs run."""

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlx_onevision.plugins import backends
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.adapters.http import HttpBackend
from mlx_onevision.plugins.conformance import plugin
from mlx_onevision.plugins.contract.errors import CODES
from mlx_onevision.plugins.contract.results import Event
from mlx_onevision.plugins.interface import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.service.jobs import Jobs
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits

ROOT = Path(__file__).parents[2]
PAGE = ROOT.joinpath("docs/plugins.md").read_text(encoding="utf-8")


def named(head: str) -> list[str]:
    """What the first column of a table names."""
    table = PAGE.partition(f"\n| {head} |")[2].partition("\n\n")[0]
    firsts = [row.split(" |")[0] for row in table.split("\n|")[2:]]
    return re.findall(r"`(-*[\w-]+)", "\n".join(firsts))


def asked(kind: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name != "backend"]


@pytest.mark.parametrize(
    ("head", "there"),
    [
        ("`GenerateRequest`", asked(GenerateRequest)),
        ("`EmbedRequest`", asked(EmbedRequest)),
        ("`DescribeRequest`", asked(DescribeRequest)),
        ("`MediaPolicy`", asked(MediaPolicy)),
        ("`Limits`", asked(Limits)),
        ("`Jobs`", asked(Jobs)),
        ('`"engine"`', asked(open_engine)),
        ('`"http"`', asked(HttpBackend)),
        ('`"fake"`', asked(FakeBackend)),
        ("event", [kind.__name__ for kind in Event.__args__]),
        ("`code`", list(CODES)),
        ("option", re.findall(r'"(--[a-z-]+)"', inspect.getsource(plugin.pytest_addoption))),
    ],
)
def test_tables_name_all_there_is_and_nothing_else(head: str, there: list[str]) -> None:
    assert sorted(named(head)) == sorted(there)


def test_every_backend_has_a_table() -> None:
    own = {name for name, place in backends().items() if place.startswith("mlx_onevision.")}
    assert own == set(re.findall(r'\n\| `"(\w+)"` \|', PAGE))


def test_its_defaults_are_the_real_ones() -> None:
    for kind in (Limits(), MediaPolicy()):
        for field in fields(kind):
            value = getattr(kind, field.name)
            if type(value) in (int, float) and value < 5000:
                assert f"{value:,.0f}" in PAGE, field.name


def test_its_programs_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(first, {})
    assert "circle" in capsys.readouterr().out
    fake = second.replace('"engine", model="demo"', '"fake"')
    exec(fake.replace("time.sleep(1)", "time.sleep(0.05)"), {})
    assert "DescribeResult" in capsys.readouterr().out
