"""The page in Chromium: what it says before, while and after something is asked, and where."""

import json

import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, Locator, expect
from served import EXAMPLES

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http import app
from mlx_onevision.plugins.hosts.http.server import ServerSettings

SHAPES, CIRCLE = EXAMPLES / "shapes.png", EXAMPLES / "circle.mp4"
DESK, TELEPHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
NOTES = ("notes.txt", "text/plain", b"words")


def is_in_sight(tab: Tab, one: Locator) -> bool:
    """All of it, with nothing over it."""
    return one.evaluate(
        """one => {
          const box = one.getBoundingClientRect();
          const inside = box.top >= 0 && box.bottom <= innerHeight
            && box.left >= 0 && box.right <= innerWidth + 1;
          const top = document.elementFromPoint(box.left + box.width / 2, box.top + 4);
          return inside && one.contains(top);
        }"""
    )


@pytest.mark.parametrize("size", [DESK, TELEPHONE])
def test_a_refused_file_is_seen_where_it_was_dropped(browser: Browser, size: dict) -> None:
    backend = FakeBackend(pieces=["Many words. "] * 300)
    with opened(browser, backend, viewport=size) as tab:
        tab.drop(NOTES)
        said = tab.page.locator("#media-fault")
        expect(said).to_contain_text("notes.txt is neither an image nor a video")
        assert is_in_sight(tab, said)
        assert is_in_sight(tab, tab.button("Choose files"))
        tab.button("Dismiss").click()
        expect(said).to_be_hidden()
        # Below pictures, and at the end of a long conversation.
        tab.drop(*((f"{n}.png", "image/png", SHAPES.read_bytes()) for n in range(9)))
        tab.ask("On and on?")
        expect(tab.turns.locator(".figures")).to_be_visible()
        tab.page.evaluate("scrollTo(0, 1e6); document.querySelector('.stage').scrollTo(0, 1e6)")
        tab.drop(NOTES)
        expect(said).to_be_visible()
        assert is_in_sight(tab, said)


def test_loading_the_model_is_said_while_it_lasts(browser: Browser) -> None:
    backend = FakeBackend(load_seconds=2.5)
    with opened(browser, backend) as tab:
        tab.ask("In?")
        expect(tab.turns.locator(".waiting")).to_have_text("Loading the model")
        bar = tab.turns.get_by_role("progressbar", name="Loading the model")
        expect(bar).to_be_visible()
        expect(tab.words).to_have_text("In? [0 images][0 videos]")
        expect(bar).to_have_count(0)
        tab.button("New conversation").click()
        backend.unload()
        tab.choose(CIRCLE)
        tab.button("Describe the video").click()
        expect(bar).to_be_visible()
        expect(tab.turns.get_by_role("heading", name="Summary")).to_be_visible()
        expect(bar).to_have_count(0)


def test_limits_are_said_before_something_is_shown(browser: Browser) -> None:
    with opened(browser, FakeBackend(), ServerSettings(max_body_bytes=1_000_000)) as tab:
        limits = tab.page.locator("#limits")
        expect(limits).to_contain_text("996 kB in one conversation")
        expect(limits).to_contain_text("files of up to 747 kB")
        for kind in ("JPEG", "PNG", "HEIC", "MP4", "AVI"):
            expect(limits).to_contain_text(kind)
        context = tab.page.evaluate("fetch('v1/models').then(one => one.json())")
        tokens = context["data"][0]["context"]
        expect(limits).to_contain_text(f"{tokens:,} tokens at most")


def test_what_is_shown_stays_in_sight_on_a_telephone(browser: Browser) -> None:
    backend = FakeBackend(pieces=["Many words. "] * 300)
    with opened(browser, backend, viewport=TELEPHONE) as tab:
        for count in (1, 4):
            for number in range(count):
                tab.choose(
                    {
                        "name": f"{number}.png",
                        "mimeType": "image/png",
                        "buffer": SHAPES.read_bytes(),
                    }
                )
            tab.ask("On and on?")
            expect(tab.turns.locator(".figures")).to_be_visible()
            tab.page.evaluate("scrollTo(0, 1e6)")
            assert is_in_sight(tab, tab.page.locator("#images img").first)
            assert is_in_sight(tab, tab.page.get_by_label("Your question"))
            # Words have at least half of the screen.
            pictures = tab.page.locator("#images").bounding_box()
            box = tab.page.locator("#composer").bounding_box()
            assert pictures and box
            assert box["y"] - pictures["y"] - pictures["height"] > 844 / 2
            tab.button("New conversation").click()
        # What a video is described with stands in one row.
        tab.choose(CIRCLE)
        boxes = [
            one.bounding_box()
            for one in (
                tab.button("Describe the video"),
                tab.page.get_by_label("Parts", exact=True),
            )
        ]
        assert boxes[0] and boxes[1] and abs(boxes[0]["y"] - boxes[1]["y"]) < 4
        assert boxes[1]["x"] + boxes[1]["width"] <= 390 - 16


@pytest.mark.parametrize("wide", [390, 1280])
def test_figures_are_one_line(browser: Browser, wide: int) -> None:
    with opened(browser, FakeBackend(), viewport={"width": wide, "height": 800}) as tab:
        tab.ask("In what words, and how many of them?")
        figures = tab.turns.locator(".figures")
        expect(figures).to_be_visible()
        seen = figures.evaluate(
            """one => [one.offsetHeight, parseFloat(getComputedStyle(one).lineHeight),
                       one.scrollWidth - one.clientWidth]"""
        )
        assert seen[0] <= seen[1] + 1 and seen[2] == 0, json.dumps(seen)
        # Where they are too long, they are cut, and nothing becomes wider than the page.
        figures.evaluate("one => one.append(' and so on'.repeat(20))")
        ends = figures.evaluate("one => one.getBoundingClientRect().right")
        assert ends <= wide - 16


@pytest.mark.parametrize("size", [DESK, TELEPHONE])
def test_the_summary_stands_above_the_parts(browser: Browser, size: dict) -> None:
    with opened(browser, FakeBackend(), viewport=size) as tab:
        tab.choose(app.STATIC_FOLDER / "shapes.mp4")
        tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
        tab.button("Describe the video").click()
        heading = tab.turns.get_by_role("heading", name="Summary")
        expect(heading).to_be_visible()
        expect(tab.turns.get_by_role("button", name="Save VTT")).to_be_visible()
        assert is_in_sight(tab, heading)
        tops = [
            one.evaluate("one => one.getBoundingClientRect().top")
            for one in (heading, tab.turns.locator(".parts"))
        ]
        assert tops[0] < tops[1]
        expect(tab.turns.get_by_role("heading", level=3)).to_have_text(
            ["Summary", "Chapters", "Parts"]
        )
