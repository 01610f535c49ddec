"""The page in Chromium, as it looks: names, contrast, widths from a watch to a wall, stillness."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, expect
from served import EXAMPLES

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings

SHAPES, CIRCLE = EXAMPLES / "shapes.png", EXAMPLES / "circle.mp4"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
LONG = "a-name-without-any-place-to-break-it-" * 4
WIDTHS = (320, 390, 768, 1280, 2560)


@pytest.fixture(scope="module")
def shown(browser: Browser) -> Iterator[Tab]:
    """A page with all there is: images, a video that is described, answers and a failure."""
    backend = FakeBackend(pieces=["An answer of some words, long enough to be broken. "] * 6)
    with opened(browser, backend, allowed=("ERR_FAILED",)) as tab:
        tab.choose(SHAPES)
        tab.drop((f"{LONG}.png", "", SHAPES.read_bytes()), (f"{LONG}.mp4", "", CIRCLE.read_bytes()))
        expect(tab.page.locator("figure")).to_have_count(2)
        tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
        tab.button("Describe the video").click()
        expect(tab.turns.get_by_role("heading", name="Summary")).to_be_visible()
        expect(tab.page.locator(".part canvas")).to_have_count(6)
        tab.ask("A first question, which is rather long, so that it needs a second line?")
        expect(tab.turns.locator(".figures")).to_have_count(2)
        tab.page.route("**/v1/chat/completions", lambda route: route.abort())
        tab.ask("And one that fails?")
        expect(tab.turns.get_by_role("alert")).to_be_visible()
        tab.drop(("notes.txt", "text/plain", b"words"), (LONG, "text/plain", b"words"))
        expect(tab.page.locator("#media-fault")).to_be_visible()
        yield tab


@pytest.fixture(scope="module")
def empty(browser: Browser) -> Iterator[Tab]:
    """As the demo model greets, with a token asked for."""
    settings = ServerSettings(model="shapes")  # by another name it is the demo model still
    with open_backend("engine", model="demo") as backend, opened(browser, backend, settings) as tab:
        expect(tab.button("An image")).to_be_visible()
        tab.page.locator("#token").evaluate("one => { one.hidden = false }")
        yield tab


@pytest.fixture(params=["empty", "shown"])
def tab(request: pytest.FixtureRequest) -> Tab:
    return request.getfixturevalue(request.param)


def test_everything_has_a_name(tab: Tab) -> None:
    nameless = tab.page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, img, video")]
          .filter(one => one.checkVisibility())
          .filter(one => {
            const labels = [...(one.labels || [])].map(label => label.innerText).join("");
            const name = one.getAttribute("aria-label") || labels || one.innerText || one.alt;
            return !name?.trim() && !(one.tagName === "IMG" && one.getAttribute("alt") === "");
          })
          .map(one => one.outerHTML)"""
    )
    assert nameless == []
    doubled = tab.page.evaluate(
        """() => {
          const ids = [...document.querySelectorAll("[id]")].map(one => one.id);
          return ids.filter((id, place) => ids.indexOf(id) !== place);
        }"""
    )
    assert doubled == []
    levels = tab.page.evaluate(
        "() => [...document.querySelectorAll('h1, h2, h3')].map(one => Number(one.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert tab.page.locator("html").get_attribute("lang") == "en"
    for role in ("banner", "main"):
        expect(tab.page.get_by_role(role)).to_have_count(1)


def test_what_assistive_technology_gets(shown: Tab) -> None:
    expect(shown.page.locator("main")).to_match_aria_snapshot(
        """
        - main:
          - region "Images and video":
            - alert:
              - paragraph: /notes.txt is neither an image nor a video that is known here/
              - button "Dismiss"
            - group "Timeline of the video":
              - 'button "Part 1, 0:00.0 to 0:05.0: This is part 1."'
              - 'button "Part 2, 0:05.0 to 0:10.0: This is part 2."'
            - button "Describe the video"
            - combobox "Parts"
            - list:
              - listitem:
                - figure:
                  - img "shapes.png"
          - region "Questions and answers":
            - article:
              - heading /Describe a-name/ [level=2]
              - heading "Summary" [level=3]
              - heading "Chapters" [level=3]
              - heading "Parts" [level=3]
              - list:
                - listitem:
                  - 'button "Go to 0:00.0"'
              - button "Copy as SRT"
            - article:
              - heading "A first question, which is rather long, so that it needs a second line?"
            - article:
              - alert:
                - paragraph: /hung up/
                - button "Try again"
            - log "Answers, read out"
            - form "Question":
              - textbox "Your question"
              - button "Ask"
        """
    )


# Of every text that is seen: how it stands out, by WCAG's formula, and how large it is.
CONTRAST = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (...colours) => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = ([red, green, blue]) => {
    const [r, g, b] = [red, green, blue].map(one => {
      const part = one / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.data.trim();
    const element = walk.currentNode.parentElement;
    if (!text || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest(".unseen, :disabled, noscript")) continue;
    const behind = [];
    for (let one = element; one; one = one.parentElement) {
      behind.unshift(getComputedStyle(one).backgroundColor);
    }
    const [dark, bright] = [
      light(rgba(...behind)),
      light(rgba(...behind, getComputedStyle(element).color)),
    ].sort((one, other) => one - other);
    found.push([(bright + 0.05) / (dark + 0.05), text.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_stand_out(tab: Tab, scheme: Literal["light", "dark"]) -> None:
    tab.page.emulate_media(color_scheme=scheme)
    found: list[tuple[float, str]] = tab.page.evaluate(CONTRAST)
    assert len(found) >= 15
    assert [one for one in found if one[0] < 4.5] == []
    ground = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(250, 250, 248)", "dark": "rgb(19, 20, 22)"}[scheme]


@pytest.mark.parametrize("wide", WIDTHS)
def test_nothing_sticks_out(tab: Tab, wide: int) -> None:
    """Nor is anything to be pressed smaller than a finger can (24 pixels, WCAG 2.5.8)."""
    tab.page.set_viewport_size({"width": wide, "height": 800})
    state: Any = tab.page.evaluate(
        """() => {
          const page = document.documentElement;
          const seen = [...document.querySelectorAll("body *")]
            .filter(one => one.checkVisibility());
          const out = seen
            .filter(one => !one.closest(".track, #ideas, .unseen, .icons, symbol"))
            .filter(one => one.getBoundingClientRect().right > innerWidth + 1);
          const small = seen.filter(one => one.matches("button, select, input, textarea"))
            .filter(one => !one.closest(".unseen"))
            .map(one => [one.getBoundingClientRect(), one.outerHTML.slice(0, 60)])
            .filter(([box]) => box.height < 24 || box.width < 12);
          return {
            scrolled: page.scrollWidth - page.clientWidth,
            out: out.map(one => one.outerHTML.slice(0, 80)),
            small: small.map(([, html]) => html),
          };
        }"""
    )
    assert state == {"scrolled": 0, "out": [], "small": []}


def test_one_column_on_a_telephone_and_two_on_a_desk(shown: Tab) -> None:
    boxes = {}
    for wide in (390, 1280):
        shown.page.set_viewport_size({"width": wide, "height": 844})
        places = [shown.page.locator(one).bounding_box() for one in ("video", "#talk")]
        assert all(places)
        boxes[wide] = [(box["x"], box["width"]) for box in places if box]
    assert boxes[390][0] == boxes[390][1]
    (video, width), (talk, _) = boxes[1280]
    assert video + width < talk
    # On a telephone the video stays in sight while its parts are read.
    shown.page.set_viewport_size({"width": 390, "height": 844})
    shown.page.evaluate("scrollTo(0, 1e6)")
    box = shown.page.locator("video").bounding_box()
    assert box and box["y"] >= 0 and box["y"] + box["height"] < 844
    question = shown.page.get_by_label("Your question").bounding_box()
    assert question and question["y"] < 844


def test_it_is_still_for_who_wants_it_still(browser: Browser) -> None:
    running = "document.getAnimations({ subtree: true }).length"
    for wish, moving in (("no-preference", 1), ("reduce", 0)):
        with opened(browser, FakeBackend(delay=2), reduced_motion=wish) as tab:
            tab.ask("Slowly?")
            expect(tab.turns.get_by_text("Looking")).to_be_visible()
            assert tab.page.evaluate(running) == moving
            tab.page.keyboard.press("Escape")
            expect(tab.turns.get_by_text("Stopped.")).to_be_visible()


def test_the_focus_is_seen_everywhere(shown: Tab) -> None:
    unseen = shown.page.evaluate(
        """() => {
          const all = [...document.querySelectorAll("button, select, input, textarea, video")]
            .filter(one => one.checkVisibility() && !one.disabled);
          return all.filter(one => {
            one.focus({ focusVisible: true });
            const { outlineStyle, outlineWidth } = getComputedStyle(one);
            const box = one.closest(".box");
            const ring = outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
            return !ring && !(box && getComputedStyle(box).boxShadow !== "none");
          }).map(one => one.outerHTML.slice(0, 80));
        }"""
    )
    assert unseen == []
