"""A real Chromium, headless, driven by the Python package playwright; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
LONG_MS = 30_000
"""Far above what anything here takes, as the machine may be busy."""


def missing() -> str | None:
    """Return what this machine lacks for a browser."""
    for package in ("playwright", "axe_playwright_python"):
        if importlib.util.find_spec(package) is None:
            return f"the Python package {package}: pip install --editable '.[dev]'"
    if _executable() is None:
        return "chromium: apt-get install chromium"
    return None


def _executable() -> str | None:
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser with a profile of its own, and end it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_executable(), args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A tab that notes what a page should not do: complain, or ask anybody but its server."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(viewport=options.pop("viewport", DESKTOP), **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(LONG_MS)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.calls: list[str] = []
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", self._note_request)

    def _note_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _note_request(self, request: Any) -> None:
        parts = urlsplit(request.url)
        self.hosts.add(parts.netloc)
        self.calls.append(f"{request.method} {parts.path}")

    def open(self, url: str, token: str | None = None) -> Page:
        """Open the page of a server, and give it the token if it asks."""
        self.page.goto(url)
        if token is not None:
            self.page.get_by_label("Token of the run").fill(token)
            self.page.get_by_role("button", name="Show the run").click()
            self.page.locator("#run").wait_for(state="visible")
        return self.page

    def text(self, selector: str) -> str:
        """Return the text of a part of the page."""
        return self.page.locator(selector).inner_text()

    def wait_for(self, expression: str) -> None:
        """Return once a JavaScript expression is true."""
        end = time.monotonic() + LONG_MS / 1000
        # The browser's own way of waiting needs what the page's policy forbids.
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not within {LONG_MS / 1000:g} s: {expression}"
            self.page.wait_for_timeout(50)

    def close(self) -> None:
        """Close it and forget its storage."""
        self.context.close()
