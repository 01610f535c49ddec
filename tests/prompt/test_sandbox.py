"""What a stranger's template may do, and that it ends soon when it wants more."""

import sys
import time
from typing import Any

import pytest

from mlx_onevision.errors import CheckpointError, OneVisionError, RequestError
from mlx_onevision.prompt import sandbox
from mlx_onevision.prompt.sandbox import BoundedTemplate

MILLION = "{% set big = 'a' * 1000000 %}"
TOO_MUCH = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 1000000 %}{% for b in 'x' * 1000000 %}{% endfor %}{% endfor %}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ 2 ** 1000000000 }}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}"
    "{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "{{ namespace(a=[namespace()]) }}",
    "{% set x %}{% for i in range(99999) %}" + "a" * 60_000 + "{% endfor %}{% endset %}",
    "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    MILLION + "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = n.l + [big[1:]] %}{% endfor %}",
    MILLION + "{{ big.replace('a', big) }}",
    MILLION + "{{ big | replace('', big) }}",
    MILLION + "{{ big.join(range(99999) | map('string')) }}",
    MILLION + "{{ range(99999) | join(big) }}",
    MILLION + "{% if big in [big] * 1000 %}{% endif %}" * 1000,
    "{% set x = [1] * 100000 %}{% set y = [1] * 100000 %}" + "{% if x == y %}{% endif %}" * 2000,
    "{{ 'x' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    MILLION + "{{ [1, 2] | tojson(separators=(big, big)) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ [1] | batch(100000000) | list }}",
    "{{ range(99999) | sort | length }}" * 1800,
    "{{ range(99999) " + "| map('upper')" * 50 + "| list | length }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for x in " + "[" * 20_000,
    "a" * 70_000,
]


@pytest.mark.parametrize("source", TOO_MUCH, ids=lambda source: source[:60])
def test_ends_soon_with_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    start = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        BoundedTemplate(source, "T").render({"messages": []})
    assert time.thread_time() - start < 2.3  # compiling 64 KiB, the limit, and a step of slack
    assert len(str(caught.value)) < 300


def test_the_real_limits_are_below_three_seconds() -> None:
    """Of time or of steps: which of them comes first is the machine's doing."""
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"longer than|more than [\d,]+ steps"):
        BoundedTemplate(TOO_MUCH[2], "T").render({})
    assert time.monotonic() - start < 3


def test_the_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(CheckpointError, match="longer than"):
        BoundedTemplate(TOO_MUCH[2], "T").render({})


def test_the_limit_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 60)
    monkeypatch.setattr(sandbox, "MAX_WORK", 100_000)
    with pytest.raises(CheckpointError, match="more than 100,000 steps"):
        BoundedTemplate(TOO_MUCH[2], "T").render({})


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n._Namespace__attrs = 1 %}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ''.format_map(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ (messages | map(attribute='__class__') | list) }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ ''.encode() }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_python_is_out_of_reach(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[str] = []
    watching = True

    def audit(event: str, arguments: Any) -> None:
        if watching and event in ("os.system", "subprocess.Popen", "open", "import"):
            events.append(event)

    BoundedTemplate("{{ messages }}", "T").render({"messages": [1]})  # imports what it needs
    sys.addaudithook(audit)
    try:
        text = BoundedTemplate(source, "T").render({"messages": [1]})
    except OneVisionError:
        text = ""
    watching = False
    assert not events
    assert "class" not in text and "module" not in text and "function" not in text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{%- for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% for i in [1, 2, 3] %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        (
            "{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}"
            "{{ n.x }}",
            "4",
        ),
        (
            "{% macro f(x, y='d') %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(2, y=3) }}",
            "[1d][23]",
        ),
        ("{{ 'a' ~ 1 ~ none }} {{ 7 % 4 }} {{ 'ab' * 2 }} {{ [1] + [2] }}", "a1None 3 abab [1, 2]"),
        (
            "{{ ' x '.strip() }}|{{ 'a,b'.split(',')[-1] }}|{{ 'aXb' | replace('X', '-') }}",
            "x|b|a-b",
        ),
        ("{{ ['a', 'b'] | join(', ') }} {{ '-'.join(['c', 'd']) }}", "a, b c-d"),
        ("{{ [{'k': 'v'}, {'k': 'w'}] | map(attribute='k') | join('+') }}", "v+w"),
        ("{{ [1, 2, 3][::-1] }} {{ 'abc'[1:] }} {{ messages[0].role }}", "[3, 2, 1] bc user"),
        ("{{ 'b' in ['a', 'b'] }} {{ 'x' is string }} {{ y is defined }}", "True True False"),
        (
            "{% for m in messages | rejectattr('role', 'eq', 'x') %}{{ loop.first }}{% endfor %}",
            "True",
        ),
        (
            "{{ dict(a=1)['a'] }} {{ {'a': 1}.items() | list }} {{ 'a' if false else 'b' }}",
            "1 [('a', 1)] b",
        ),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_the_language(source: str, text: str) -> None:
    assert BoundedTemplate(source, "T").render({"messages": [{"role": "user"}]}) == text


def test_what_a_template_raises_is_the_requests_fault() -> None:
    template = BoundedTemplate("{{ raise_exception('roles must alternate') }}", "T")
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render({})


def test_errors_name_the_template_and_the_line() -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json .*line 2"):
        BoundedTemplate("a\n{% for %}", "tokenizer_config.json")
    with pytest.raises(CheckpointError, match="'x' is undefined"):
        BoundedTemplate("{{ x.y.z }}", "T").render({})


def test_a_long_conversation_is_well_within_the_limits() -> None:
    source = (
        "{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + c.text | trim }}{% endfor %}{{ messages | length }}{% endfor %}"
    )
    message = {"content": [{"type": "text", "text": "x" * 900}]}
    assert len(BoundedTemplate(source, "T").render({"messages": [message] * 1000})) > 900_000
