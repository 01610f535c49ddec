"""The page in Chromium: a safe subset of Markdown in answers, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

from hosts.browser import Tab, opened
from playwright.sync_api import Browser, expect

from mlx_onevision.plugins.adapters.fake import FakeBackend

WRITTEN = """# Shapes

There are **two** kinds, and *one* `a < b`:

- red
  1. circle
- blue

| shape | count |
|:------|------:|
| star  | 2     |

```html
<b>not bold</b>
```

> said

first
second
"""

HOSTILE = """<img src=x onerror=alert(1)> **<b onclick=alert(2)>b</b>** [a](javascript:alert(3))
![i](http://evil.example/i.png) <http://evil.example/> http://evil.example/ &lt;i&gt;

<script>alert(4)</script>

| <style>*{display:none}</style> | b |
|--|--|
| <iframe src=http://evil.example/></iframe> | [c][r] |

[r]: javascript:alert(5) "<svg onload=alert(6)>"

```"><script>alert(7)</script>
</code></pre><script>alert(8)</script>
```
"""
ALLOWED = {
    *("BLOCKQUOTE", "BR", "CODE", "DEL", "DIV", "EM", "H3", "HR", "LI", "OL", "P", "PRE", "SPAN"),
    *("STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"),
}


@contextmanager
def written(browser: Browser, text: str) -> Iterator[Tab]:
    """Streamed by small pieces, each of which is shown as far as it goes."""
    pieces = [text[place : place + 7] for place in range(0, len(text), 7)]
    with opened(browser, FakeBackend(pieces=pieces)) as tab:
        tab.ask("What?")
        expect(tab.turns.locator(".figures")).to_be_visible()
        yield tab


def test_markdown_is_shown_as_what_it_is(browser: Browser) -> None:
    with written(browser, WRITTEN) as tab:
        expect(tab.words).to_match_aria_snapshot(
            """
            - heading "Shapes" [level=3]
            - paragraph:
              - strong: two
              - emphasis: one
              - code: a < b
            - list:
              - listitem:
                - text: red
                - list:
                  - listitem: circle
              - listitem: blue
            - table:
              - rowgroup:
                - row "shape count":
                  - columnheader "shape"
                  - columnheader "count"
              - rowgroup:
                - row "star 2":
                  - cell "star"
                  - cell "2"
            - code: <b>not bold</b>
            - blockquote:
              - paragraph: said
            - paragraph: first second
            """
        )
        # What is copied is what the model wrote.
        tab.turns.get_by_role("button", name="Copy").click()
        expect(tab.turns.get_by_role("button", name="Copied")).to_be_visible()
        assert tab.page.evaluate("navigator.clipboard.readText()").strip() == WRITTEN.strip()


def test_markup_and_links_stay_text(browser: Browser) -> None:
    with written(browser, HOSTILE) as tab:
        found = tab.words.evaluate(
            """words => [...words.querySelectorAll("*")].map(one =>
              [one.tagName, [...one.attributes].map(({ name }) => name).sort().join(" ")])"""
        )
        assert {tag for tag, _ in found} <= ALLOWED
        assert {names for _, names in found} <= {"", "tabindex", "class tabindex"}
        seen = tab.words.inner_text()
        for line in ("<img src=x onerror=alert(1)>", "[a](javascript:alert(3))", "&lt;i&gt;"):
            assert line in seen
        for line in ("<script>alert(4)</script>", "[r]: javascript:alert(5)", "alert(8)</script>"):
            assert line in seen


def test_what_is_nested_too_deeply_is_text(browser: Browser) -> None:
    """As a model may write that goes round in circles."""
    deep = ">" * 20_000 + " in"
    with opened(browser, FakeBackend()) as tab:
        shown = tab.page.evaluate(
            """async text => {
              const { rendered } = await import("/page/markdown.js");
              return rendered(text).map(one => one.textContent).join("");
            }""",
            deep,
        )
        assert shown in (deep, "in")
