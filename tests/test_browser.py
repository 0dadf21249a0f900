"""The browser that other tests look at pages with sees what they must not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Browser

PAGE = "<!doctype html><title>page</title><p id=it>{}</p>"


def test_a_page_that_asks_for_something_is_found_out(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE.format("<img src='http://127.0.0.1:9/picture.png'>"))
    watched = browser.open(path)
    assert watched.requests == ["http://127.0.0.1:9/picture.png"]
    with pytest.raises(AssertionError):
        watched.check()


@pytest.mark.parametrize("script", ["throw new Error('lost')", "console.error('lost')", "Promise.reject('lost')"])
def test_a_page_that_complains_is_found_out(browser: Browser, tmp_path: Path, script: str) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE.format(f"<script>{script}</script>"))
    watched = browser.open(path)
    with pytest.raises(AssertionError, match="lost"):
        watched.check()


def test_a_page_is_waited_for(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(PAGE.format("<script>setTimeout(() => { it.textContent = 'late' }, 50)</script>"))
    watched = browser.open(path)
    watched.wait("it.textContent == 'late'")
    watched.check()
    assert watched.screenshot("page", tmp_path).stat().st_size > 100
