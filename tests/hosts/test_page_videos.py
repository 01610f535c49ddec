"""The page in Chromium: videos asked about and described, seeked by mouse and keys, taken along."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pysubs2
import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, expect
from served import EXAMPLES, Client, wait_for
from videos import encode_video

from mlx_onevision.describe.formats import Chapter, Segment, VideoDescription, write
from mlx_onevision.media.video import load_video
from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.results import DescribeResult
from mlx_onevision.plugins.hosts.http import app

SHAPES = app.STATIC_FOLDER / "shapes.mp4"
CIRCLE = EXAMPLES / "circle.mp4"
DESCRIBE = "/v1/video/describe"

CAPTIONS = (
    (0.0, 3.0, "A red circle moves right, and a blue square stays still."),
    (3.0, 5.5, "An orange star moves up."),
    (5.5, 9.0, "A purple triangle moves left."),
    (9.0, 11.5, "A green square gets bigger."),
    (11.5, 14.0, "A red star moves down, and a black circle stays still."),
)
SUMMARY = (
    "A red circle moves right, then an orange star moves up, and at the end a red star moves down."
)
# What stands behind the shapes of each scene, and what is where half way through it, in pixels of a
# thumbnail.
BACKGROUNDS = ((244, 241, 234), (219, 234, 254), (220, 252, 231), (253, 230, 200), (236, 232, 246))

SEEN = (
    ((64, 36), (220, 38, 38)),
    ((64, 50), (249, 115, 22)),
    ((64, 48), (147, 51, 234)),
    ((64, 48), (22, 163, 74)),
    ((90, 48), (220, 38, 38)),
)
COLOURS = """(all, points) => all.map((one, place) => {
  const { data } = one.getContext("2d").getImageData(0, 0, one.width, one.height);
  const colour = ([x, y]) => [...data.slice(4 * (y * one.width + x)).slice(0, 3)];
  return [colour([4, 4]), colour(points[place])];
})"""


def described(tab: Tab) -> None:
    tab.button("Describe the video").click()
    expect(tab.turns.get_by_role("heading", name="Summary")).to_be_visible(timeout=30_000)


def now(tab: Tab) -> float:
    """Where the player stands."""
    expect(tab.page.locator("video")).to_have_js_property("seeking", False)
    return tab.page.locator("video").evaluate("one => one.currentTime")


def test_a_video_is_asked_about(tab: Tab) -> None:
    tab.drop(("circle.mp4", "video/mp4", CIRCLE.read_bytes()))
    player = tab.page.locator("video")
    # H.264, which not every build of Chromium decodes; Debian's does.
    expect(player).to_have_js_property("readyState", 4)
    assert player.evaluate("one => [one.videoWidth, one.duration]") == [320, 2]
    tab.ask("How does the red circle move?")
    expect(tab.words).to_have_text("The red circle moves from left to right.")
    tab.ask("What is in the video?")
    expect(tab.words.nth(1)).to_have_text("A red circle and a blue square.")
    kinds = [
        part["type"] for part in tab.bodies("/v1/chat/completions")[1]["messages"][0]["content"]
    ]
    assert kinds == ["video_url", "text"]


def test_a_video_is_described_on_a_timeline(tab: Tab) -> None:
    tab.button("A video").click()
    described(tab)
    rows = tab.turns.locator(".parts li")
    expect(rows).to_have_count(5)
    assert rows.locator(".words").all_inner_texts() == [text for _, _, text in CAPTIONS]
    assert rows.get_by_role("button").all_inner_texts()[1] == "0:03.0 – 0:05.5"
    expect(tab.turns.locator(".answer > .words")).to_have_text(SUMMARY)
    chapters = tab.turns.locator(".chapters li").all_inner_texts()
    assert chapters[0].split() == ["0:00.0", "Red", "circle", "moving", "right"]

    # Every part has an image of its own moment, and is as wide as it is long.
    parts = tab.page.get_by_role("group", name="Timeline of the video").get_by_role("button")
    expect(parts.locator("canvas")).to_have_count(5)
    colours = np.array(parts.locator("canvas").evaluate_all(COLOURS, [at for at, _ in SEEN]))
    assert np.abs(colours[:, 0] - BACKGROUNDS).max() < 16  # of 255; H.264's colours
    assert np.abs(colours[:, 1] - [colour for _, colour in SEEN]).max() < 16
    wide = parts.evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    length = [end - start for start, end, _ in CAPTIONS]
    assert np.allclose(np.array(wide) / sum(wide), np.array(length) / 14, atol=0.005)
    name = parts.nth(2).get_attribute("aria-label")
    assert name == "Part 3, 0:05.5 to 0:09.0: A purple triangle moves left."


def test_clicks_and_keys_seek(tab: Tab) -> None:
    tab.button("A video").click()
    described(tab)
    timeline = tab.page.get_by_role("group", name="Timeline of the video")
    parts, rows = timeline.get_by_role("button"), tab.turns.locator(".parts li")

    def stands_at(place: int) -> None:
        assert now(tab) == pytest.approx(CAPTIONS[place][0], abs=0.01)
        for shown in (parts, rows):
            current = [one.get_attribute("aria-current") for one in shown.all()]
            assert current == ["true" if one == place else None for one in range(5)]

    parts.nth(2).click()
    stands_at(2)
    for key, place in (
        ("ArrowRight", 3),
        ("ArrowDown", 4),
        ("ArrowRight", 4),
        ("ArrowLeft", 3),
        ("Home", 0),
        ("End", 4),
    ):
        tab.page.keyboard.press(key)
        expect(parts.nth(place)).to_be_focused()
        stands_at(place)
    rows.nth(1).get_by_role("button").click()
    stands_at(1)
    tab.page.keyboard.press("ArrowDown")
    stands_at(2)
    rows.nth(0).get_by_role("button").focus()
    tab.page.keyboard.press("Enter")
    stands_at(0)
    tab.turns.locator(".chapters").get_by_role("button", name="0:09.0").click()
    stands_at(3)
    # All of them together are one stop of the Tab key.
    assert [one.get_attribute("tabindex") for one in parts.all()].count("0") == 1
    # The player has the same to say where it goes by itself.
    tab.page.locator("video").evaluate("one => { one.currentTime = 4 }")
    expect(parts.nth(1)).to_have_attribute("aria-current", "true")


def test_captions_are_taken_along(tab: Tab, client: Client, tmp_path: Path) -> None:
    tab.button("A video").click()
    described(tab)
    wanted = VideoDescription(
        "shapes.mp4", 14.0, "demo", tuple(Segment(*told) for told in CAPTIONS), SUMMARY
    )

    def copied(button: str) -> str:
        tab.turns.get_by_role("button", name=button).click()
        expect(tab.turns.get_by_role("button", name="Copied")).to_be_visible()
        expect(tab.turns.get_by_role("button", name=button)).to_be_visible()
        return tab.page.evaluate("navigator.clipboard.readText()")

    assert copied("Copy text") == write(wanted, "text")
    srt = copied("Copy as SRT")
    assert srt == write(wanted, "srt")
    for kind in ("SRT", "VTT"):
        with tab.page.expect_download() as download:
            tab.turns.get_by_role("button", name=f"Save {kind}").click()
        assert download.value.suggested_filename == f"shapes.{kind.lower()}"
        download.value.save_as(tmp_path / kind)
        text = tmp_path.joinpath(kind).read_text(encoding="utf-8")
        assert text == write(wanted, kind.lower())
        read = pysubs2.SSAFile.from_string(text, format_=kind.lower())
        assert [(cue.start, cue.end, cue.plaintext) for cue in read] == [
            (round(start * 1000), round(end * 1000), told) for start, end, told in CAPTIONS
        ]


def test_the_parts_of_a_video_can_be_of_one_length(tab: Tab) -> None:
    tab.button("A video").click()
    tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
    described(tab)
    assert tab.bodies(DESCRIBE)[0]["segments"] == 5
    times = [one.inner_text().split(" – ")[0] for one in tab.turns.locator(".time").all()[:3]]
    assert times == ["0:00.0", "0:05.0", "0:10.0"]


def test_a_video_that_the_browser_cannot_show(tab: Tab) -> None:
    """MPEG-4 Part 2 in AVI, which the server reads and no browser does."""
    frames = [np.full((96, 128, 3), 230, np.uint8) for _ in range(50)]
    for number, frame in enumerate(frames):
        frame[30:66, number : number + 36] = (220, 38, 38)
    tab.drop(("old.avi", "", encode_video(frames, "avi")))
    expect(tab.page.get_by_text("This browser cannot show old.avi")).to_be_visible()
    expect(tab.page.locator("video")).to_be_hidden()
    tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
    described(tab)
    parts = tab.page.get_by_role("group", name="Timeline of the video").get_by_role("button")
    expect(parts).to_have_count(1)
    expect(parts.locator("canvas")).to_have_count(0)
    parts.first.click()
    expect(tab.turns.locator(".parts li").first).to_have_attribute("aria-current", "true")
    expect(tab.turns.get_by_role("button", name="Copy as SRT")).to_be_visible()


def test_a_description_appears_as_it_is_made_and_can_be_stopped(browser: Browser) -> None:
    backend = FakeBackend(delay=0.4)
    with opened(browser, backend) as tab:
        tab.choose(CIRCLE)
        tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
        tab.button("Describe the video").click()
        rows = tab.turns.locator(".parts li")
        rows.first.wait_for()
        expect(tab.turns.get_by_role("progressbar")).to_be_visible()
        expect(tab.turns.locator(".waiting")).to_contain_text(re.compile("[1-5] of 6"))
        expect(tab.button("Describe the video")).to_be_disabled()
        tab.page.keyboard.press("Escape")
        expect(tab.turns.get_by_text("Stopped.")).to_be_visible()
        expect(tab.button("Describe the video")).to_be_enabled()
        wait_for(lambda: backend.info().active == 0)
        told = rows.count()
        assert 1 <= told <= backend.steps <= 5
        tab.turns.get_by_role("button", name="Copy as SRT").click()
        expect(tab.turns.get_by_role("button", name="Copied")).to_be_visible()
        srt = tab.page.evaluate("navigator.clipboard.readText()")
        assert len(pysubs2.SSAFile.from_string(srt, format_="srt")) == told


def test_one_video_at_a_time(browser: Browser) -> None:
    with opened(browser, FakeBackend()) as tab:
        tab.choose(CIRCLE)
        expect(tab.page.get_by_text("circle.mp4", exact=True)).to_be_visible()
        tab.choose(SHAPES)  # in the place of the other, about which nothing was asked
        expect(tab.page.locator("video")).to_have_count(1)
        expect(tab.page.get_by_text("shapes.mp4", exact=True)).to_be_visible()
        tab.ask("hello")
        expect(tab.words).to_have_text("hello [0 images][1 video]")
        tab.choose(CIRCLE)
        expect(tab.page.get_by_role("alert")).to_have_text(
            "One video at a time; start anew to show circle.mp4."
        )
        expect(tab.page.locator("video")).to_have_count(1)


def test_warnings_are_shown_and_text_before_its_part(browser: Browser) -> None:
    with opened(browser, FakeBackend()) as tab:
        made = DescribeResult(
            2.0, (), "All of it.", warnings=("The video breaks off after 2 s.",)
        ).to_dict()
        events = [
            {"kind": "progress", "stage": "probe", "done": 1.0, "total": 2.0},
            {"kind": "text", "delta": "A red ", "segment": 0},
            {"kind": "text", "delta": "circle", "segment": 0},
            {
                "kind": "segment",
                "segment": {"index": 0, "start": 0, "end": 2, "text": "A red circle."},
            },
            {"kind": "done", "result": made},
        ]
        seen = tab.page.evaluate(SHOWN, events)
        assert seen == [
            ["Looking for scenes: 0:01.0 of 0:02.0", "", ""],
            ["Looking for scenes: 0:01.0 of 0:02.0", "A red ", ""],
            ["Looking for scenes: 0:01.0 of 0:02.0", "A red circle", ""],
            ["Looking for scenes: 0:01.0 of 0:02.0", "", "0:00.0 – 0:02.0A red circle."],
            ["Looking for scenes: 0:01.0 of 0:02.0", "All of it.", "0:00.0 – 0:02.0A red circle."],
        ]
        expect(tab.page.get_by_text("The video breaks off after 2 s.")).to_be_visible()


# What the view of a description shows after each event: what it waits for, words, parts.
SHOWN = """async events => {
  const { DescriptionTurn } = await import("/page/description.js");
  const { VideoPlayer } = await import("/page/video.js");
  const player = new VideoPlayer({ name: "a.mp4", url: URL.createObjectURL(new Blob(["none"])) });
  const turn = new DescriptionTurn(player);
  document.querySelector("#talk").append(player.element, turn.element);
  const text = name => turn.element.querySelector(name)?.textContent || "";
  return events.map(event => {
    if (event.kind === "progress") turn.progress(event);
    else if (event.kind === "text") turn.add(event.delta);
    else if (event.kind === "segment") turn.part(event.segment);
    else turn.done(event.result);
    return [text(".waiting"), text(".answer > .words"), text(".parts")];
  });
}"""


HARD = (
    "plain",
    "",
    "  two\n lines\t and\u00a0spaces\u2003 ",
    "<b>bold</b> < i>odd</i > <3 1<2 </ b> <é <_x <-y",
    "{\\an8}top & bottom &amp; <",
    "-->\n\n2\n00:00:01,000 --> 00:00:02,000",
    "\x1cfield\x85next\u2028line\ufeffmark\u200bzero",
    "日本語 😀 ‮right to left",
)


def test_captions_are_those_of_the_command(browser: Browser) -> None:
    """The page's own writers against the package's, for texts and times that are hard to write."""
    times = [0.0, 0.0005, 0.0015, 1.2345, 59.9995, 60.0, 3599.9996, 3661.001, 86399.5, 360000.25]
    told = [
        Segment(start, start + length, text)
        for start in times
        for length, text in zip(
            [0.0001, 0.5, 2.0005, 1.0, 3.3333, 1e-9, 7.7, 0.25], HARD, strict=True
        )
    ]
    wanted = VideoDescription("a", 4e5, "m", tuple(told), HARD[2], (Chapter(0, "x"),), ("Odd.",))
    asked: dict[str, Any] = {
        "segments": [{"start": one.start, "end": one.end, "text": one.text} for one in told],
        "summary": wanted.summary,
        "warnings": list(wanted.warnings),
    }
    with opened(browser, FakeBackend()) as tab:
        for form in ("srt", "vtt", "text"):
            made = tab.page.evaluate(
                "async ([form, told]) => (await import('/page/captions.js'))[form](told)",
                [form, asked],
            )
            assert made == write(wanted, form), form


def test_the_video_is_what_its_program_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "drawn.mp4"
    subprocess.run([sys.executable, EXAMPLES / "draw_page_video.py", drawn], check=True)
    kept, again = (load_video(path, 56) for path in (SHAPES, drawn))
    assert kept.total == again.total == 14 * 24
    assert abs(kept.tiles.astype(int) - again.tiles).mean() < 2  # of 255: encoders differ
