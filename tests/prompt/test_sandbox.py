"""What an untrusted template may do, and that it ends soon when it wants more."""

import gc
import json
import subprocess
import sys
import time
from typing import Any

import pytest
from checkpoints import TEMPLATES

from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.errors import (
    CheckpointError,
    ContextOverflowError,
    OneVisionError,
    RequestError,
)
from mlx_onevision.prompt import chat_template
from mlx_onevision.prompt.chat_template import ORIGINAL, ChatTemplate
from mlx_onevision.prompt.sandbox import MAX_SOURCE, MAX_TEXT, SandboxedTemplate
from mlx_onevision.subprocesses import INTERPRETER

TEXT = {"type": "text", "text": "<é> \u2028 \ud800"}
MESSAGE: dict[str, Any] = {"role": "user", "content": [TEXT]}

LIMIT = chat_template.SECONDS


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be rendered is, on the busiest machine."""
    monkeypatch.setattr(chat_template, "SECONDS", 30.0)


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
    "{% set x %}{% for i in range(99999) %}" + "a" * 60_000 + "{% endfor %}{% endset %}",
    "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    MILLION + "{% set n = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set n.l = n.l + [big[1:]] %}{% endfor %}",
    MILLION + "{{ big.replace('a', big) }}",
    MILLION + "{{ big | replace('', big) }}",
    MILLION + "{{ big.join(range(99999) | map('string')) }}",
    MILLION + "{{ range(99999) | join(big) }}",
    MILLION + "{% if big[1:] ~ 'b' in [big] * 1000 %}{% endif %}" * 1000,
    "{% set x = [1] * 100000 %}{% set y = [1] * 100000 %}" + "{% if x == y %}{% endif %}" * 2000,
    "{{ 'x' | center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ range(99999) | sort | length }}" * 1800,
    "{{ range(99999) " + "| map('upper')" * 50 + "| list | length }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for x in " + "[" * 20_000,
    "a" * 70_000,
]
LARGE = [  # but neither longer nor slower than a prompt may be
    "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "{{ namespace(a=[namespace()]) }}",
    MILLION + "{{ [1, 2] | tojson(separators=('', big)) }}",
    "{{ [1] | batch(100000000) | list }}",
]


@pytest.mark.parametrize("source", TOO_MUCH, ids=lambda source: source[:60])
def test_ends_soon_with_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    start = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate(source, "T").render([])
    assert time.thread_time() - start < 0.5  # what it does is done elsewhere
    said = str(caught.value)
    assert said.startswith("T ") and len(said) < 300 and "\n" not in said and said[-1] != "."


@pytest.mark.parametrize("source", LARGE)
def test_what_stays_within_the_bounds_is_rendered(source: str) -> None:
    assert len(ChatTemplate(source, "T").render([])) <= MAX_TEXT


def test_the_real_limit_is_below_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", LIMIT)
    source = "{% if messages %}" + TOO_MUCH[2] + "{% endif %}"
    template = ChatTemplate(source, "T")
    assert template.render([]) == ""  # the process has started
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^T failed \(it takes longer than 2 s\)$"):
        template.render([MESSAGE])
    assert time.monotonic() - start < 3


def test_a_lack_of_memory_is_said() -> None:
    with pytest.raises(CheckpointError, match=r"^T failed \(it takes too much memory\)$"):
        ChatTemplate("{{ [0] * 10 ** 12 }}", "T").render([])


def test_a_template_that_failed_renders_the_next_prompt() -> None:
    source = "{% if messages | length > 1 %}{{ [0] * 10 ** 12 }}{% endif %}{{ messages | length }}"
    template = ChatTemplate(source, "T")
    for _ in range(2):
        assert template.render([MESSAGE]) == "1"
        with pytest.raises(CheckpointError):
            template.render([MESSAGE] * 2)


def test_one_process_for_all_prompts_and_none_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[Any]] = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[Any]:
        started.append(Popen(*args, **options))
        return started[-1]

    Popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    template = ChatTemplate("{{ messages[0].content[0].text }}", "T")
    for _ in range(50):
        assert template.render([MESSAGE]) == TEXT["text"]
    (process,) = started
    assert process.returncode is None and process.poll() is None
    template.close()
    assert process.returncode is not None
    assert template.render([MESSAGE]) == TEXT["text"]
    del template
    gc.collect()
    assert started[1].returncode is not None


def test_published_templates_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = json.loads((EMBEDDED / "chat_template.json").read_text())["chat_template"]
    published = {ORIGINAL, demo, *TEMPLATES.values()}
    assert len(published) == 4
    isolated = [ChatTemplate(source + "{# #}").render([MESSAGE]) for source in published]
    monkeypatch.setattr(chat_template, "BoundedProcess", lambda *_, **__: pytest.fail("started"))
    assert [ChatTemplate(source).render([MESSAGE]) for source in published] == isolated


def test_without_an_interpreter_an_unknown_template_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_template, "find_interpreter", lambda: None)
    assert ChatTemplate(ORIGINAL).render([MESSAGE])
    with pytest.raises(CheckpointError, match=f"^T is not a published one.*{INTERPRETER}"):
        ChatTemplate("x", "T").render([MESSAGE])


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

    SandboxedTemplate("{{ messages ~ '\\n' }}", "T").render({"messages": [1]})  # imports
    with pytest.raises(CheckpointError):
        SandboxedTemplate("{{ x.y.z }}", "T").render({})
    sys.addaudithook(audit)
    try:
        text = SandboxedTemplate(source, "T").render({"messages": [1]})
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
    assert SandboxedTemplate(source, "T").render({"messages": [{"role": "user"}]}) == text
    message = {"role": "user", "content": []}
    assert ChatTemplate(source, "T").render([message]) == text


def test_what_a_template_raises_is_the_requests_fault() -> None:
    source = "{{ raise_exception('roles must\nalternate.') }}"
    renders: list[Any] = [SandboxedTemplate(source, "T").render, ChatTemplate(source, "T").render]
    for render in renders:
        with pytest.raises(RequestError) as caught:
            render({})
        assert str(caught.value) == "the model's chat template says: roles must alternate"


def test_errors_name_the_template_and_the_line() -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer_config\.json .*line 2"):
        ChatTemplate("a\n{% for %}", "tokenizer_config.json").render([])
    with pytest.raises(CheckpointError, match="'x' is undefined"):
        ChatTemplate("{{ x.y.z }}", "T").render([])
    with pytest.raises(CheckpointError, match=f"more than {MAX_SOURCE} bytes"):
        ChatTemplate("a" * (MAX_SOURCE + 1), "T").render([])
    with pytest.raises(CheckpointError, match=f"exceeds {MAX_TEXT:,} characters"):
        ChatTemplate("{{ 'a' * 1048577 }}", "T").render([])


@pytest.mark.parametrize(
    "source", [ORIGINAL, "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"]
)
def test_a_text_that_is_too_long_is_no_fault_of_the_model(source: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x" * (MAX_TEXT + 1)}]}
    with pytest.raises(ContextOverflowError, match=f"the text has {MAX_TEXT + 1:,} characters"):
        ChatTemplate(source, "T").render([message])


def test_a_long_conversation_is_well_within_the_limits() -> None:
    source = (
        "{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + c.text | trim }}{% endfor %}{{ messages | length }}{% endfor %}"
    )
    message = {"role": "user", "content": [{"type": "text", "text": "x" * 900}]}
    assert len(ChatTemplate(source, "T").render([message] * 1000)) > 900_000
