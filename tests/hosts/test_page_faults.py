"""The page in Chromium, when things go otherwise: stopped, refused, too large, broken, hostile."""

import json
import re
import zlib
from contextlib import ExitStack
from pathlib import Path

import pytest
from hosts.browser import Tab, opened
from playwright.sync_api import Browser, Route, expect
from served import EXAMPLES, serving, wait_for

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.hosts.http.server import ServerSettings
from mlx_onevision.plugins.service.service import Limits

SHAPES = EXAMPLES / "shapes.png"
CHAT = "/v1/chat/completions"
GONE = "The server does not answer; see whether mlx-onevision serve is still running."


def fault(tab: Tab, said: str | re.Pattern[str]) -> None:
    """The sentence stands in the turn that it is about, and is read out at once."""
    expect(tab.turns.last.get_by_role("alert").locator("p")).to_have_text(said)


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_is_stopped(browser: Browser, way: str) -> None:
    backend = FakeBackend(pieces=["word "] * 400, delay=0.05)
    with opened(browser, backend) as tab:
        tab.ask("Count.")
        expect(tab.words).to_have_text(re.compile("word word"))
        expect(tab.button("Ask")).to_be_hidden()
        assert tab.turns.locator(".answer").get_attribute("aria-busy") == "true"
        tab.button("Stop").click() if way == "button" else tab.page.keyboard.press("Escape")
        expect(tab.turns.get_by_text("Stopped.")).to_be_visible()
        wait_for(lambda: backend.info().active == 0, 1.0)
        assert backend.steps < 100
        # What had come stays, and belongs to the conversation.
        said = tab.words.inner_text()
        expect(tab.button("Ask")).to_be_visible()
        tab.ask("Go on.")
        expect(tab.words).to_have_count(2)
        tab.page.keyboard.press("Escape")
        answer = tab.bodies(CHAT)[1]["messages"][1]
        assert answer["role"] == "assistant" and answer["content"].strip() == said.strip()


def test_one_that_is_stopped_before_its_first_word_is_given_back(browser: Browser) -> None:
    backend = FakeBackend(delay=5)
    with opened(browser, backend) as tab:
        tab.choose(SHAPES)
        tab.ask("Slowly?")
        wait_for(lambda: backend.info().active == 1)
        expect(tab.turns.get_by_text("Looking")).to_be_visible()
        expect(tab.button("Remove shapes.png")).to_be_disabled()
        tab.page.keyboard.press("Escape")
        expect(tab.turns.get_by_text("Stopped.")).to_be_visible()
        expect(tab.page.get_by_label("Your question")).to_have_value("Slowly?")
        expect(tab.button("Remove shapes.png")).to_be_enabled()
        wait_for(lambda: backend.info().active == 0, 1.0)
        # A new start leaves nothing, whatever was under way.
        tab.button("Ask").click()
        wait_for(lambda: backend.info().active == 1)
        tab.button("New conversation").click()
        wait_for(lambda: backend.info().active == 0, 1.0)
        expect(tab.button("Ask")).to_be_visible()
        expect(tab.turns).to_have_count(0)
        expect(tab.page.get_by_label("Your question")).to_have_value("")


def test_a_busy_server(browser: Browser) -> None:
    backend = FakeBackend(delay=0.05, limits=Limits(active=1, waiting=0))
    with serving(backend) as client:
        long = {"messages": [{"role": "user", "content": "x " * 500}], "max_tokens": 500}
        other = client.begin("POST", CHAT, long)
        wait_for(lambda: backend.info().active == 1)
        with opened(browser, None, client=client, allowed=("429",)) as tab:
            tab.choose(SHAPES)
            tab.ask("Now?")
            fault(tab, "The server is busy; try again in 1 second.")
            other.close()
            wait_for(lambda: backend.info().active == 0)
            tab.turns.get_by_role("button", name="Try again").click()
            expect(tab.words).to_have_text("Now? [1 image][0 videos]")
            expect(tab.turns).to_have_count(1)
            # The question that failed is no part of the conversation; its image is.
            tab.ask("And now?")
            expect(tab.words.nth(1)).to_have_text("And now? [1 image][0 videos]")
            roles = [one["role"] for one in tab.bodies(CHAT)[-1]["messages"]]
            assert roles == ["user", "assistant", "user"]


def test_a_server_that_wants_a_token(browser: Browser) -> None:
    token = "a-token-of-7"
    with opened(browser, FakeBackend(), ServerSettings(token=token), allowed=("401",)) as tab:
        field = tab.page.get_by_label("The server wants a token.")
        expect(field).to_be_focused()
        assert field.get_attribute("type") == "password"
        tab.page.keyboard.type("wrong")
        tab.page.keyboard.press("Enter")
        expect(tab.page.get_by_label("The token is not the server's.")).to_be_focused()
        tab.page.keyboard.type(token)
        tab.page.keyboard.press("Enter")
        expect(field).to_be_hidden()
        expect(tab.page.locator("#model")).to_have_text("fake")
        tab.ask("In?")
        expect(tab.words).to_have_text("In? [0 images][0 videos]")
        assert not any(token in request.url for request in tab.sent)
        tab.page.reload()
        expect(tab.page.locator("#model")).to_have_text("fake")
        # It belongs to the tab.
        stored = "[localStorage.length, sessionStorage.length, document.cookie]"
        assert tab.page.evaluate(stored) == [0, 1, ""]
        tab.button("New conversation").click()
        # One that is not taken any more is asked for again, and the question then answered.
        tab.page.evaluate("sessionStorage.setItem('mlx-onevision-token', 'old')")
        tab.ask("Still?")
        expect(tab.page.locator("#token-field")).to_be_focused()
        tab.page.keyboard.type(token)
        tab.page.keyboard.press("Enter")
        expect(tab.words).to_have_text("Still? [0 images][0 videos]")
        expect(tab.turns).to_have_count(1)


def test_a_server_that_goes_away(browser: Browser) -> None:
    backend = FakeBackend(pieces=["word "] * 4000, delay=0.05)
    with ExitStack() as server:
        client = server.enter_context(serving(backend))
        allowed = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING")
        with opened(browser, None, client=client, allowed=allowed) as tab:
            tab.ask("Count.")
            expect(tab.words).to_have_text(re.compile("word word"))
            server.close()
            fault(
                tab, re.compile(r"^The connection broke off before the end\.|^The request was can")
            )
            assert "word word" in tab.words.inner_text()
            tab.ask("Are you there?")
            fault(tab, GONE)
            expect(tab.turns.last.get_by_role("button", name="Try again")).to_be_enabled()


def test_a_server_that_comes_back(browser: Browser) -> None:
    with opened(browser, FakeBackend(), allowed=("ERR_FAILED",)) as tab:
        tab.page.route("**/v1/models", lambda route: route.abort())
        tab.page.reload()
        banner = tab.page.get_by_role("alert")
        expect(banner).to_contain_text(GONE)
        tab.page.unroute("**/v1/models")
        banner.get_by_role("button", name="Try again").click()
        expect(banner).to_have_count(0)
        expect(tab.page.locator("#model")).to_have_text("fake")


def test_an_answer_that_fails_half_way(browser: Browser) -> None:
    error = PluginError("out_of_memory", "there is no memory left", "send a smaller picture")
    with opened(browser, FakeBackend(fail_at=2, error=error)) as tab:
        tab.ask("one two three")
        fault(tab, "There is no memory left; send a smaller picture.")
        expect(tab.words).to_have_text("one two")
        tab.ask("a")
        expect(tab.turns).to_have_count(2)
        assert len(tab.bodies(CHAT)[1]["messages"]) == 1


def test_an_answer_that_is_cut_off(browser: Browser) -> None:
    limits = Limits(default_max_tokens=1024)  # as `serve` sets it
    with opened(browser, FakeBackend(pieces=["x "] * 1100, limits=limits)) as tab:
        tab.ask("Go on.")
        expect(
            tab.turns.get_by_text("Cut off: the answer may not have more tokens.")
        ).to_be_visible()
        assert tab.turns.locator(".figures span").first.inner_text() == "1,024 tokens"


def test_notes_are_shown_as_they_came(tab: Tab) -> None:
    choice = {"index": 0, "delta": {"content": "Words."}, "finish_reason": "length"}
    chunk = {"choices": [choice], "notes": ["First.", "Second."]}
    tab.page.route(
        f"**{CHAT}",
        lambda route: route.fulfill(
            body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n",
            content_type="text/event-stream",
        ),
    )
    tab.ask("Go on.")
    expect(tab.turns.locator(".note")).to_have_text(
        ["Cut off: the answer may not have more tokens.", "First.", "Second."]
    )


def noise(size: int) -> bytes:
    """A file that begins as a PNG does."""
    return b"\x89PNG\r\n\x1a\n" + bytes(zlib.crc32(bytes([n % 251])) & 255 for n in range(size - 8))


def test_what_is_too_large_is_said_before_it_is_sent(browser: Browser) -> None:
    with opened(browser, FakeBackend(), ServerSettings(max_body_bytes=100_000)) as tab:
        tab.drop(
            ("large.png", "image/png", noise(90_000)),
            ("long.mp4", "", b"\0\0\0\x18ftypmp42" + bytes(90_000)),
        )
        expect(tab.page.get_by_role("alert")).to_have_text(
            "large.png has 90 kB, but a request has room for 72 kB; make it smaller first. "
            "long.mp4 has 90 kB, but a request has room for 72 kB; "
            "mlx-onevision describe takes videos of any size."
        )
        # Three that fit each, and not together.
        tab.choose(
            *[{"name": f"{n}.png", "mimeType": "", "buffer": SHAPES.read_bytes()} for n in "abc"]
        )
        expect(tab.page.get_by_role("alert")).to_have_count(0)
        tab.ask("All?")
        fault(
            tab,
            re.compile(r"make 10\d kB to send, but the server takes 100 kB in one request; rem"),
        )
        assert tab.bodies(CHAT) == []
        tab.button("Remove b.png").click()
        tab.turns.get_by_role("button", name="Try again").click()
        expect(tab.words).to_have_text("All? [2 images][0 videos]")


def test_what_the_server_finds_too_large(browser: Browser) -> None:
    """As when something between page and server takes less than the server does."""

    def unlimited(route: Route) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=reply.text().replace("100000", "33554432"))

    settings = ServerSettings(max_body_bytes=100_000)
    allowed = ("413", "ERR_CONNECTION", "ERR_HTTP")
    with opened(browser, FakeBackend(), settings, allowed=allowed) as tab:
        tab.page.route(tab.origin + "/", unlimited)
        tab.page.reload()
        tab.choose({"name": "a.png", "mimeType": "image/png", "buffer": noise(3_000_000)})
        tab.ask("This?")
        # Whether the refusal is read before the connection is gone is for the browser to say.
        fault(
            tab,
            re.compile(r"^The request has more than 0\.1 MB; send less\.$|^The server hung up b"),
        )
        tab.button("Remove a.png").click()
        tab.ask("And without?")
        expect(tab.words).to_have_text("And without? [0 images][0 videos]")


def test_files_that_are_no_images_or_are_gone(browser: Browser, tmp_path: Path) -> None:
    with opened(
        browser, FakeBackend(), allowed=("ERR_FILE_NOT_FOUND", "ERR_UPLOAD_FILE_CHANGED")
    ) as tab:
        tab.drop(("notes.txt", "text/plain", b"some words"), ("fake.png", "image/png", b""))
        expect(tab.page.get_by_role("alert")).to_have_text(
            "notes.txt is neither an image nor a video that is known here. "
            "fake.png is neither an image nor a video that is known here."
        )
        # By its bytes, whatever it is called.
        tab.drop(("picture.txt", "text/plain", SHAPES.read_bytes()))
        expect(tab.page.get_by_role("img", name="picture.txt")).to_be_visible()
        tab.button("New conversation").click()
        tab.drop(("broken.png", "image/png", noise(1000)))
        expect(tab.page.get_by_text("This browser cannot show this image.")).to_be_visible()
        tab.ask("What?")
        expect(tab.words).to_have_text("What? [1 image][0 videos]")
        tab.button("New conversation").click()
        gone = tmp_path / "gone.png"
        gone.write_bytes(SHAPES.read_bytes())
        tab.choose(gone)
        expect(tab.page.get_by_role("img", name="gone.png")).to_be_visible()
        gone.unlink()
        tab.ask("Where?")
        fault(tab, "gone.png cannot be read any more; add it again.")


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    "</p></article><svg onload=alert(3)><a href='javascript:alert(4)'>a</a>",
    "<style>*{display:none}</style>",
    "<iframe src='http://evil.example/'></iframe>&lt;b&gt;",
)


def test_markup_of_others_is_text(browser: Browser) -> None:
    """In an answer, a file's name, a question, an error and a video's description."""
    names = ["<img src=x onerror=alert(5)>.png", '"><script>alert(6)<∕script>.png']
    with opened(browser, FakeBackend(pieces=HOSTILE)) as tab:
        tab.drop(*((name, "image/png", SHAPES.read_bytes()) for name in names))
        tab.drop(("<b onclick=alert(7)>.mp4", "video/mp4", (EXAMPLES / "circle.mp4").read_bytes()))
        before = tab.page.evaluate(
            "document.querySelectorAll('script, style, iframe, a, b').length"
        )
        tab.ask("<img src=x onerror=alert(8)><b>bold</b>")
        expect(tab.words).to_have_text("".join(HOSTILE))
        expect(tab.turns.get_by_role("heading")).to_have_text(
            "<img src=x onerror=alert(8)><b>bold</b>"
        )
        assert tab.page.locator("#images .name").all_inner_texts() == names
        tab.button("Describe the video").click()
        expect(tab.turns.get_by_role("heading", name="Summary")).to_be_visible()
        count = "document.querySelectorAll('script, style, iframe, a, b').length"
        assert tab.page.evaluate(count) == before
        assert tab.page.locator("img[src=x], [onclick], [onerror], [onload]").count() == 0
    with opened(browser, FakeBackend(fail_at=0, error=PluginError("internal", HOSTILE[0]))) as tab:
        tab.allowed.append("500")
        tab.ask("What?")
        fault(tab, re.compile("^<img src=x onerror"))
        assert tab.page.locator("img[src=x]").count() == 0


def test_what_a_page_must_not_do_is_seen(browser: Browser) -> None:
    """The watch that all these tests rely on: it would have found each of these."""
    with opened(browser, FakeBackend()) as tab:
        for program, found in (
            ("fetch('http://127.0.0.1:9/').catch(() => 0)", "Content Security Policy"),
            (
                "document.body.append(Object.assign(document.createElement('script'), "
                "{ textContent: 'alert(1)' }))",
                "inline script",
            ),
            ("document.body.setAttribute('style', 'color: red')", "inline style"),
            ("setTimeout(() => alert('x'))", "dialog: x"),
            ("setTimeout(() => { throw new Error('lost') })", "error: lost"),
            ("console.error('bad')", "bad"),
        ):
            tab.page.evaluate(f"() => {{ {program} }}")
            wait_for(
                lambda found=found: (
                    tab.page.wait_for_timeout(10) or any(found in f for f in tab.faults)
                )
            )
            tab.faults.clear()


def test_pieces_cut_anywhere_are_the_same_events(browser: Browser) -> None:
    stream = (
        ': keep-alive\n\nevent: text\ndata: {"a":\ndata:  1}\n\r\n\rdata: é😀\r\n\r\n'
        "event: x\n\ndata\n\ndata: cut"
    )
    wanted = [["text", '{"a":\n 1}'], ["message", "é😀"], ["message", ""]]
    with opened(browser, FakeBackend()) as tab:
        found = tab.page.evaluate(
            """async stream => {
              const { events } = await import("/page/sse.js");
              const bytes = new TextEncoder().encode(stream);
              const all = [];
              for (let cut = 0; cut <= bytes.length; cut++) {
                const parts = [bytes.slice(0, cut), bytes.slice(cut)];
                const body = new ReadableStream({
                  start(to) { parts.forEach(part => to.enqueue(part)); to.close(); },
                });
                const found = [];
                for await (const { event, data } of events(body)) found.push([event, data]);
                all.push(found);
              }
              return all;
            }""",
            stream,
        )
    assert len(found) == len(stream.encode()) + 1
    assert all(one == wanted for one in found)
