"""A real browser for the tests of pages: headless Chromium, through Playwright, which sees what a page asks for.

A page under test may read its own file and nothing else, and says no error. Where no Chromium is installed, as Debian's
package `chromium` does it, or no Playwright, tests that take `browser` are skipped.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Watched:
    """A page of the browser, and what it did since it was made.

    Attributes:
        page: Playwright's page (its synchronous interface).
        errors: messages of the console of type "error", and exceptions that no script caught.
        requests: addresses that it asked for, other than file:, data:, blob: and about: ones.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: Path) -> Any:
        """Show a file and return the page."""
        self.page.goto(path.resolve().as_uri())
        return self.page

    def check(self) -> None:
        """Fail where the page asked for anything or complained."""
        self.page.wait_for_timeout(20)  # events come during a call only
        assert not self.requests, f"it asked for {self.requests}"
        assert not self.errors, f"it says {self.errors}"

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Wait until an expression of JavaScript is truthy.

        Playwright's own wait_for_function does so with `eval`, which the pages forbid.
        """
        end = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, f"{expression} is not so after {seconds} s; {self.errors}"
            time.sleep(0.02)

    def screenshot(self, name: str, folder: Path, *, full: bool = True) -> Path:
        """Write NAME.png to the folder that LONGSIFT_SCREENSHOTS names, or to `folder`, and return its path."""
        path = Path(os.environ.get("LONGSIFT_SCREENSHOTS") or folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, full_page=full)
        return path


class Browser:
    """Chromium. Each page has a context of its own."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium

    def new(self, *, width: int = 1440, height: int = 900, dark: bool = False, **options: Any) -> Watched:
        """An empty page of a size in CSS pixels; `options` are those of Playwright's `new_context`."""
        context = self._chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", **options
        )
        page = context.new_page()
        watched = Watched(page)
        page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on("request", lambda request: _note(watched, request.url))
        return watched

    def open(self, path: Path, **options: Any) -> Watched:
        """A new page that shows a file; `options` as for `new`."""
        watched = self.new(**options)
        watched.open(path)
        return watched

    def _close_pages(self) -> None:
        for context in self._chromium.contexts:
            context.close()


def _note(watched: Watched, url: str) -> None:
    if not url.startswith(("file:", "data:", "blob:", "about:")):
        watched.requests.append(url)


@pytest.fixture(scope="module")  # while it runs, asyncio.run works in no test
def _chromium() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield Browser(chromium)
        chromium.close()


@pytest.fixture
def browser(_chromium: Browser) -> Iterator[Browser]:
    """A browser whose pages are closed at the end of the test; the browser itself serves a file's tests."""
    yield _chromium
    _chromium._close_pages()
