"""The page in Chromium, with the demo model behind it: images shown, asked about, asked on."""

import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, expect
from served import EXAMPLES, PICTURE, Client, image, text

from mlx_onevision.plugins.adapters.fake import FakeBackend

SHAPES = EXAMPLES / "shapes.png"
SQUARE = EXAMPLES / "square.png"
SEEN = "A red circle, a blue star and an orange triangle."
CHAT = "/v1/chat/completions"


def test_a_dropped_image_is_asked_about_and_asked_on(tab: Tab, client: Client) -> None:
    expect(tab.page.locator("#model")).to_have_text("demo")
    tab.drop(("shapes.png", "image/png", SHAPES.read_bytes()))
    shown = tab.page.get_by_role("img", name="shapes.png")
    expect(shown).to_be_visible()
    assert shown.evaluate("one => [one.naturalWidth, one.naturalHeight]") == [960, 640]
    tab.ask("What is in the image?")
    expect(tab.words).to_have_text(SEEN)
    expect(tab.turns.get_by_role("heading")).to_have_text("What is in the image?")

    tab.ask("Where is the star?")
    expect(tab.words.nth(1)).to_have_text("The star is in the centre.")
    first, second = (body["messages"] for body in tab.bodies(CHAT))
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "text"]
    assert first[0]["content"][0]["image_url"]["url"] == PICTURE
    assert second[0] == first[0]
    assert second[1] == {"role": "assistant", "content": SEEN}
    assert second[2] == {"role": "user", "content": [text("Where is the star?")]}

    # The figures are the server's own, but for the wait, which is this browser's.
    usage = client.chat([image(), text("What is in the image?")]).json["usage"]
    figures = tab.turns.first.locator(".figures")
    tokens, speed, first_token, memory = figures.locator("span").all_inner_texts()
    assert tokens == f"{usage['completion_tokens']} tokens"
    assert float(speed.removesuffix(" tokens/s").replace(",", "")) > 1
    assert 0 < float(first_token.removeprefix("first after ").removesuffix(" s")) < 20
    assert memory.endswith(("kB", "MB")) and memory[0] != "0"
    prompt = figures.locator("span").first.get_attribute("title") or ""
    assert f"{usage['prompt_tokens']:,} tokens" in prompt
    assert f"{usage['prompt_tokens_details']['media_tokens']:,} of them" in prompt


def test_what_is_asked_about_stays_and_what_is_not_can_go(tab: Tab) -> None:
    figures = tab.page.locator("#images figure")
    tab.choose(SHAPES, by="Choose files")
    expect(figures).to_have_count(1)
    tab.choose(SQUARE)
    expect(figures).to_have_count(2)
    tab.button("Remove shapes.png").click()
    expect(figures).to_have_count(1)
    tab.ask("What is in the image?")
    expect(tab.words).to_have_text("A green square.")
    expect(tab.button("Remove square.png")).to_have_count(0)
    tab.button("New conversation").click()
    expect(figures).to_have_count(0)
    expect(tab.turns).to_have_count(0)
    expect(tab.page.get_by_label("Your question")).to_be_focused()
    tab.ask("What is in the image?")
    expect(tab.words).to_have_text("There is no image.")
    assert len(tab.bodies(CHAT)[-1]["messages"]) == 1


def test_a_pasted_image(tab: Tab) -> None:
    """By the keyboard, from the real clipboard; pasted words go where the cursor is."""
    tab.page.evaluate(
        """async data => {
          const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
          const picture = new Blob([bytes], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
        }""",
        PICTURE.partition(",")[2],
    )
    question = tab.page.get_by_label("Your question")
    question.focus()
    tab.page.keyboard.press("Control+V")
    expect(tab.page.get_by_role("img", name="image.png")).to_be_visible()
    expect(question).to_have_value("")
    tab.page.evaluate("navigator.clipboard.writeText('What is in the image?')")
    tab.page.keyboard.press("Control+V")
    expect(question).to_have_value("What is in the image?")
    tab.page.keyboard.press("Enter")
    expect(tab.words).to_have_text(SEEN)
    tab.turns.get_by_role("button", name="Copy").click()
    expect(tab.turns.get_by_role("button", name="Copied")).to_be_visible()
    assert tab.page.evaluate("navigator.clipboard.readText()") == SEEN


def test_copying_without_a_clipboard_for_programs(browser: Browser, client: Client) -> None:
    """Browsers have none on a page that came over plain HTTP from another machine."""
    with opened(browser, None, client=client) as tab:
        tab.page.add_init_script("Object.defineProperty(navigator, 'clipboard', {})")
        tab.page.reload()
        tab.ask("What is in the image?")
        copy = tab.turns.get_by_role("button", name="Copy")
        copy.click()
        expect(tab.turns.get_by_role("button", name="Copied")).to_be_focused()
        tab.page.get_by_label("Your question").focus()
        tab.page.keyboard.press("Control+V")
        expect(tab.page.get_by_label("Your question")).to_have_value("There is no image.")


def test_two_images(tab: Tab) -> None:
    tab.drop(
        ("one.png", "image/png", SHAPES.read_bytes()),
        ("two.png", "image/png", SQUARE.read_bytes()),
    )
    tab.ask("Which image has the star?")
    expect(tab.words).to_have_text("The first image has the star.")
    expect(tab.turns.get_by_role("img")).to_have_count(2)
    content = tab.bodies(CHAT)[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]


def test_the_demo_model_says_what_it_knows_and_has_something_to_try(tab: Tab) -> None:
    expect(tab.page.get_by_text("It knows coloured shapes and nothing else")).to_be_visible()
    expect(tab.page.get_by_text("coloured shapes only")).to_be_visible()
    tab.button("An image").click()
    tab.button("What is in the image?").click()
    expect(tab.words).to_have_text(SEEN)
    tab.button("New conversation").click()
    tab.button("Two images").click()
    expect(tab.page.locator("#images figure")).to_have_count(2)
    tab.button("Which image has the star?").click()
    expect(tab.words).to_have_text("The first image has the star.")
    tab.button("What is in the second image?").click()
    expect(tab.words.nth(1)).to_have_text("An orange circle.")


def test_with_the_keyboard_alone(tab: Tab) -> None:
    """From the empty page to the second answer, and to a new start."""
    press = tab.page.keyboard.press

    def tab_to(name: str) -> None:
        for _ in range(40):
            press("Tab")
            label, outline = tab.page.evaluate(
                """() => {
                  const here = document.activeElement;
                  const label = here.getAttribute("aria-label") || here.innerText;
                  return [label.trim(), getComputedStyle(here).outlineStyle];
                }"""
            )
            if label == name:
                assert outline == "solid", f"{name} has the focus, and nothing shows it"
                return
        pytest.fail(f"the Tab key does not come to {name}")

    expect(tab.page.locator("body.demo")).to_be_visible()
    tab_to("An image")
    press("Enter")
    expect(tab.page.get_by_role("img", name="three-shapes.png")).to_be_visible()
    expect(tab.page.get_by_label("Your question")).to_be_focused()
    press("Enter")
    expect(tab.page.get_by_role("alert")).to_have_text("Ask something first.")
    tab.page.keyboard.type("What is in the image?")
    expect(tab.page.get_by_role("alert")).to_have_count(0)
    press("Shift+Enter")
    expect(tab.page.get_by_label("Your question")).to_have_value("What is in the image?\n")
    press("Enter")
    expect(tab.words).to_have_text(SEEN)
    tab.page.keyboard.type("How many shapes are there?")
    press("Enter")
    expect(tab.words.nth(1)).to_have_text("There are three shapes.")
    # A suggested question does not take what is being written, and has the focus back at the end.
    tab.page.keyboard.type("Half a")
    tab_to("Where is the star?")
    press("Enter")
    expect(tab.words.nth(2)).to_have_text("The star is in the centre.")
    expect(tab.button("Where is the star?")).to_be_focused()
    expect(tab.page.get_by_label("Your question")).to_have_value("Half a")
    tab_to("New conversation")
    press("Enter")
    expect(tab.turns).to_have_count(0)


def test_answers_are_read_out(tab: Tab) -> None:
    """A screen reader gets whole sentences, politely, of what streams."""
    region = tab.page.get_by_role("log")
    assert region.get_attribute("aria-live") == "polite"
    tab.choose(SHAPES)
    tab.ask("What is in the image?")
    expect(tab.turns.locator(".figures")).to_be_visible()
    assert region.locator("p").all_inner_texts() == ["Added: shapes.png.", SEEN]
    assert tab.turns.locator(".answer").get_attribute("aria-busy") == "false"


def test_another_model_has_its_own_name_and_no_examples(browser: Browser) -> None:
    with opened(browser, FakeBackend()) as tab:
        expect(tab.page.locator("#model")).to_have_text("fake")
        expect(tab.page.get_by_text("coloured shapes only")).to_be_hidden()
        expect(tab.button("An image")).to_be_hidden()
        tab.choose(SHAPES)
        expect(tab.button("What is in the image?")).to_have_count(0)
