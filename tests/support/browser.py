"""A real headless Chromium, and what the tests of the pages do with it again and again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support.waiting import PATIENCE_S

ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
DESK = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}


def chromium() -> str:
    """Where the browser is; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("There is no Chromium here (apt install chromium).")


@contextmanager
def started() -> Iterator[Any]:
    """A browser; closed at the end."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A page of the browser that notes what should not happen: errors, and requests elsewhere."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(base_url=url, **{"viewport": DESK, **options})
        self.context.set_default_timeout(PATIENCE_S * 1000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("console", self._console)
        self.page.on("request", lambda request: self._request(request.url, url))

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _request(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "blob:")):
            self.complaints.append(f"request to {asked}")

    def go(self, path: str) -> Any:
        self.page.goto(path, wait_until="load")
        return self.page

    def close(self) -> None:
        self.context.close()
