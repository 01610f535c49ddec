"""The page in Chromium: a conversation changed, kept over a reload, and taken along."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, Route, expect
from served import EXAMPLES, PICTURE, Client, serving, text, wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.spool import Spool

SHAPES, CIRCLE = EXAMPLES / "shapes.png", EXAMPLES / "circle.mp4"
CHAT = "/v1/chat/completions"
FILES = "/v1/files"
DESCRIBE = "/v1/video/describe"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeBackend()) as found:
        yield found


def answers(tab: Tab, *wanted: str) -> None:
    expect(tab.words).to_have_text(list(wanted))
    expect(tab.turns.locator(".figures")).to_have_count(len(wanted))
    expect(tab.button("Ask")).to_be_visible()


def test_the_last_answer_is_made_anew(tab: Tab) -> None:
    tab.choose(SHAPES)
    tab.ask("one")
    answers(tab, "one [1 image][0 videos]")
    tab.ask("two")
    answers(tab, "one [1 image][0 videos]", "two [1 image][0 videos]")
    expect(tab.button("Regenerate")).to_have_count(1)
    tab.button("Regenerate").click()
    answers(tab, "one [1 image][0 videos]", "two [1 image][0 videos]")
    second, third = (body["messages"] for body in tab.bodies(CHAT)[1:])
    assert second == third
    # The image goes along, where it is the first answer.
    tab.button("New conversation").click()
    tab.choose(SHAPES)
    tab.ask("one")
    answers(tab, "one [1 image][0 videos]")
    tab.button("Regenerate").click()
    answers(tab, "one [1 image][0 videos]")
    first, again = (body["messages"] for body in tab.bodies(CHAT)[-2:])
    assert first == again and len(again) == 1


def test_a_question_is_edited(tab: Tab) -> None:
    tab.choose(SHAPES)
    for question in ("one", "two", "three"):
        tab.ask(question)
        expect(tab.turns.last.locator(".figures")).to_be_visible()
        expect(tab.button("Ask")).to_be_visible()
    edit = tab.turns.nth(1).get_by_role("button", name="Edit")
    edit.click()
    field = tab.page.get_by_label("Edited question")
    expect(field).to_be_focused()
    expect(field).to_have_value("two")
    tab.page.keyboard.press("Escape")
    expect(tab.turns.nth(1).get_by_role("heading")).to_have_text("two")
    edit.click()
    field.fill("second")
    tab.page.keyboard.press("Enter")
    answers(tab, "one [1 image][0 videos]", "second [1 image][0 videos]")
    messages = tab.bodies(CHAT)[-1]["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[-1]["content"] == [text("second")]


def test_system_prompt_temperature_and_length(tab: Tab) -> None:
    tab.button("Settings").click()
    tab.page.get_by_label("System prompt").fill("Answer in verse.")
    tab.page.get_by_label("Temperature").fill("0.5")
    tab.page.get_by_label("Most tokens").fill("2")
    tab.ask("one two three four")
    expect(tab.turns.get_by_text("Cut off")).to_be_visible()
    (body,) = tab.bodies(CHAT)
    assert (body["temperature"], body["max_tokens"]) == (0.5, 2)
    assert body["messages"][0] == {"role": "system", "content": "Answer in verse."}
    expect(tab.button("Settings (3)")).to_be_visible()
    # What is no number of theirs is said, and nothing is sent or lost.
    tab.page.get_by_label("Most tokens").fill("0")
    tab.button("Settings (2)").click()
    tab.ask("five")
    expect(tab.page.get_by_role("alert")).to_have_text(
        "The most tokens are a whole number, 1 or more."
    )
    expect(tab.page.get_by_label("Most tokens")).to_be_focused()
    expect(tab.page.get_by_label("Your question")).to_have_value("five")
    assert len(tab.bodies(CHAT)) == 1
    tab.button("New conversation").click()
    tab.ask("six")
    answers(tab, "six [0 images][0 videos]")
    assert {"temperature", "max_tokens"}.isdisjoint(tab.bodies(CHAT)[-1])
    assert tab.bodies(CHAT)[-1]["messages"] == [{"role": "user", "content": [text("six")]}]


def test_a_reload_loses_nothing(tab: Tab) -> None:
    tab.choose(SHAPES)
    tab.ask("one")
    answers(tab, "one [1 image][0 videos]")
    tab.choose(CIRCLE)
    tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
    tab.button("Describe the video").click()
    expect(tab.turns.get_by_role("button", name="Save VTT")).to_be_visible()
    tab.button("Settings").click()
    tab.page.get_by_label("System prompt").fill("Briefly.")
    tab.page.keyboard.press("Tab")
    seen = tab.turns.all_inner_texts()
    wait_kept(tab, 2)
    tab.page.reload()
    expect(tab.turns).to_have_count(2)
    assert [one.split() for one in tab.turns.all_inner_texts()] == [one.split() for one in seen]
    expect(tab.page.get_by_role("img", name="shapes.png").first).to_be_visible()
    expect(tab.page.locator(".part canvas")).to_have_count(6)
    tab.ask("two")
    expect(tab.words.last).to_have_text("two [1 image][1 video]")
    messages = tab.bodies(CHAT)[-1]["messages"]
    assert messages[0] == {"role": "system", "content": "Briefly."}
    assert messages[1]["content"][0]["image_url"]["url"] == PICTURE
    assert [part["type"] for part in messages[3]["content"]] == ["video_url", "text"]
    # A new start leaves nothing in the browser.
    tab.button("New conversation").click()
    wait_kept(tab, 0)
    tab.page.reload()
    expect(tab.page.locator("#model")).to_have_text("fake")
    expect(tab.turns).to_have_count(0)
    expect(tab.page.locator("#images figure")).to_have_count(0)


def wait_kept(tab: Tab, turns: int) -> None:
    """Until the browser has that many turns in its database."""
    tab.page.wait_for_function(
        """async turns => {
          const { kept } = await import("/page/kept.js");
          return ((await kept())?.turns.length ?? 0) === turns;
        }""",
        arg=turns,
    )


def test_a_browser_that_keeps_nothing_says_so(browser: Browser, client: Client) -> None:
    with opened(browser, None, client=client) as tab:
        tab.page.add_init_script(
            "IDBFactory.prototype.open = () => { throw new DOMException('no', 'SecurityError') }"
        )
        tab.page.reload()
        tab.ask("one")
        answers(tab, "one [0 images][0 videos]")
        expect(tab.page.locator("#unkept")).to_have_text(
            "A reload will lose this conversation, as the browser does not keep it (SecurityError)."
        )


def saved(tab: Tab, form: str, folder: Path) -> str:
    with tab.page.expect_download() as download:
        tab.button(f"Save as {form}").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path.read_text(encoding="utf-8")


def test_a_conversation_is_taken_along(tab: Tab, client: Client, tmp_path: Path) -> None:
    expect(tab.button("Save as JSON")).to_be_hidden()
    tab.choose(SHAPES)
    tab.button("Settings").click()
    tab.page.get_by_label("Temperature").fill("0")
    tab.page.get_by_label("System prompt").fill("Be brief.")
    tab.ask("# one\ntwo")
    answers(tab, "one two [1 image][0 videos]")
    tab.choose(CIRCLE)
    tab.page.get_by_label("Parts", exact=True).select_option("every 30 s")
    tab.button("Describe the video").click()
    expect(tab.turns.get_by_role("button", name="Save VTT")).to_be_visible()

    body = json.loads(saved(tab, "JSON", tmp_path))
    assert body["model"] == "fake" and body["temperature"] == 0
    assert [one["role"] for one in body["messages"]] == ["system", "user", "assistant"]
    assert body["messages"][1]["content"][0]["image_url"]["url"] == PICTURE
    assert body["descriptions"][0]["video"] == "circle.mp4"
    assert body["descriptions"][0]["segments"][0]["text"] == "This is part 1."
    # The server takes it as it is, with another question.
    body["messages"].append({"role": "user", "content": "three"})
    reply = client.ask("POST", CHAT, body)
    assert reply.json["choices"][0]["message"]["content"] == "three [1 image][0 videos]"

    written = saved(tab, "Markdown", tmp_path)
    assert written.startswith(
        "# Conversation with `fake`\n\nSystem prompt:\n\n> Be brief.\n\n---\n\n"
        "> `shapes.png`\n>\n> # one\n> two\n\n# one two [1 image][0 videos]\n\n---\n\n"
        "Description of `circle.mp4`\n\n"
    )
    assert "- 0:00.0 to 0:30.0: This is part 1." in written


@pytest.fixture
def uploading(browser: Browser, tmp_path: Path) -> Iterator[Tab]:
    """A video that was asked about, and that no request has room for."""
    spool = Spool(tmp_path / "spool", max_file_bytes=1 << 30, max_total_bytes=1 << 30)
    backend = FakeBackend(policy=MediaPolicy(uploads=spool))
    with opened(browser, backend, ServerSettings(max_body_bytes=100_000)) as tab:
        video = CIRCLE.read_bytes()
        size = 100_000  # of a box that readers skip
        padding = size.to_bytes(4, "big") + b"free" + bytes(size - 8)
        tab.choose({"name": "long.mp4", "mimeType": "video/mp4", "buffer": video + padding})
        tab.ask("one")
        answers(tab, "one [0 images][1 video]")
        yield tab


def test_saving_a_conversation_uploads_nothing(uploading: Tab, tmp_path: Path) -> None:
    before = len(uploading.sent)
    body = json.loads(saved(uploading, "JSON", tmp_path))
    assert body["messages"][0]["content"] == [
        {"type": "video_url", "video_url": {"url": "long.mp4"}},
        text("one"),
    ]
    sent = [one.url for one in uploading.sent[before:]]
    assert not [url for url in sent if FILES in url]
    # Nor is anything lost where the server is gone.
    uploading.page.route("**/v1/**", lambda route: route.abort())
    assert json.loads(saved(uploading, "JSON", tmp_path)) == body


def test_what_cannot_be_saved_is_said(tab: Tab, tmp_path: Path) -> None:
    tab.choose(SHAPES)
    tab.ask("one")
    answers(tab, "one [1 image][0 videos]")
    wait_kept(tab, 1)
    tab.page.reload()
    answers(tab, "one [1 image][0 videos]")
    # As a browser does that has lost the file it had kept.
    tab.page.evaluate(
        """() => {
          const { readAsDataURL } = FileReader.prototype;
          FileReader.prototype.readAsDataURL = function () {
            FileReader.prototype.readAsDataURL = readAsDataURL;
            setTimeout(() => this.dispatchEvent(new ProgressEvent("error")));
          };
        }"""
    )
    tab.button("Save as JSON").click()
    said = tab.page.get_by_role("alert")
    expect(said).to_contain_text("shapes.png cannot be read any more; add it again.")
    # It is tried again with the next click.
    asked, _ = json.loads(saved(tab, "JSON", tmp_path))["messages"]
    assert asked["content"][0]["image_url"]["url"] == PICTURE
    expect(said).to_have_count(0)


def test_an_image_that_is_added_while_a_question_is_sent_waits(uploading: Tab) -> None:
    held: list[Route] = []
    uploading.page.route(f"**{FILES}/*", lambda route: held.append(route))
    uploading.ask("two")
    wait_for(lambda: uploading.page.wait_for_timeout(10) or bool(held))
    uploading.choose(SHAPES)
    expect(uploading.page.get_by_role("img", name="shapes.png")).to_be_visible()
    held[0].continue_()
    uploading.page.unroute(f"**{FILES}/*")
    answers(uploading, "one [0 images][1 video]", "two [0 images][1 video]")
    assert uploading.bodies(CHAT)[-1]["messages"][-1]["content"] == [text("two")]
    # It belongs to the next.
    uploading.ask("three")
    expect(uploading.words.last).to_have_text("three [1 image][1 video]")
    kinds = [part["type"] for part in uploading.bodies(CHAT)[-1]["messages"][-1]["content"]]
    assert kinds == ["image_url", "text"]


def test_a_description_that_failed_gives_way_to_the_next(tab: Tab, tmp_path: Path) -> None:
    part = {"index": 0, "start": 0, "end": 1, "text": "A part that came before the break."}
    broken = f"data: {json.dumps({'kind': 'segment', 'segment': part})}\n\n"
    tab.page.route(
        f"**{DESCRIBE}",
        lambda route: route.fulfill(body=broken, content_type="text/event-stream"),
    )
    tab.choose(CIRCLE)
    tab.page.get_by_label("Parts", exact=True).select_option("every 30 s")
    tab.button("Describe the video").click()
    expect(tab.turns.get_by_role("alert")).to_contain_text("broke off before the end")
    expect(tab.turns.locator(".parts li")).to_contain_text(part["text"])
    # What came is kept until it is made anew.
    wait_kept(tab, 1)
    (told,) = json.loads(saved(tab, "JSON", tmp_path))["descriptions"]
    assert [one["text"] for one in told["segments"]] == [part["text"]]
    tab.page.unroute(f"**{DESCRIBE}")
    tab.turns.get_by_role("button", name="Try again").click()
    expect(tab.turns.get_by_role("heading", name="Summary")).to_be_visible()
    expect(tab.turns.get_by_role("button", name="Save VTT")).to_be_visible()
    (told,) = json.loads(saved(tab, "JSON", tmp_path))["descriptions"]
    assert [one["text"] for one in told["segments"]] == ["This is part 1."]
    assert saved(tab, "Markdown", tmp_path).count("Description of") == 1
    wait_kept(tab, 1)
    tab.page.reload()
    expect(tab.turns).to_have_count(1)
    expect(tab.turns.get_by_text("Stopped.")).to_have_count(0)


def test_a_description_that_was_stopped_is_kept(browser: Browser) -> None:
    with opened(browser, FakeBackend(delay=0.4)) as tab:
        tab.choose(CIRCLE)
        tab.page.get_by_label("Parts", exact=True).select_option("every 5 s")
        tab.button("Describe the video").click()
        tab.turns.locator(".parts li").first.wait_for()
        tab.page.keyboard.press("Escape")
        expect(tab.turns.get_by_text("Stopped.")).to_be_visible()
        wait_kept(tab, 1)
        tab.page.reload()
        expect(tab.turns.get_by_text("Stopped.")).to_be_visible()
        expect(tab.turns.locator(".parts li").first).to_be_visible()
