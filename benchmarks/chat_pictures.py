"""The pictures of the chat page in the docs: a conversation with the demo model, in Debian's Chromium.

    python benchmarks/chat_pictures.py docs/images

It starts `zili serve --demo`, asks as a person would, and photographs the page: in English as it answers, in Chinese at
a phone's width.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

COMMAND = [sys.executable, "-m", "zili", "serve", "--demo", "--port", "0", "--name", "SmolLM2-135M-Instruct"]
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that reverses a string, and explain it.",
)
MINUTE = 60_000


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    server = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next(line for line in server.stdout if "/v1" in line).split(": ", 1)[1].split("/v1")[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            _desk(browser, url, folder / "chat.png")
            _phone(browser, url, folder / "chat-phone.png")
            browser.close()
    finally:
        server.terminate()
        server.wait(60)


def _desk(browser: Any, url: str, picture: Path) -> None:
    page = _opened(browser, url, locale="en-US", viewport={"width": 1100, "height": 760})
    for question in QUESTIONS:
        _ask(page, question, "Answer complete")
    page.click("#new")
    _ask(page, "Tell me a fact about the Moon.", "Answer complete")
    page.get_by_role("button", name=QUESTIONS[0][:20]).click()
    page.screenshot(path=picture)
    page.context.close()


def _phone(browser: Any, url: str, picture: Path) -> None:
    page = _opened(browser, url, locale="zh-CN", viewport={"width": 390, "height": 760}, device_scale_factor=2)
    _ask(page, QUESTIONS[0], "回答完毕")
    page.screenshot(path=picture)
    page.context.close()


def _opened(browser: Any, url: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.goto(url)
    page.locator("#model", has_text="SmolLM2").wait_for()
    if page.locator("#open-side").is_visible():  # on a phone the settings are behind it
        page.click("#open-side")
    page.click("#open-settings")
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", "160")
    page.click("button[value=save]")
    if page.locator("#close-side").is_visible():
        page.click("#close-side")
    return page


def _ask(page: Any, question: str, done: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.locator("#status", has_text=done).wait_for(timeout=MINUTE)


if __name__ == "__main__":
    main()
