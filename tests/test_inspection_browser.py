"""The page of one window in a real browser: what it shows, how it is used, and that it needs nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from browser import Browser, Watched
from conftest import library_text
from longsift.inspection import Inspection, Inspector, dependency_map
from longsift.inspection.inspector import far_shares, sources
from longsift.options import InspectOptions, ModelOptions
from longsift.report.words import plain

HOSTILE = (
    "<script>document.title = 'gone'</script></textarea></script><img src=x onerror=alert(1)>&lt;b&gt; "
    "שלום עולם مرحبا 🙂👩‍👩‍👧 \u202eevil\u202c nul:\x00 "
)
LONG_LINE = "a" * 1_000_000


@pytest.fixture(scope="module")
def inspector(model) -> Inspector:
    return Inspector(ModelOptions(model=str(model)), InspectOptions(window=768, span=16))


@pytest.fixture(scope="module")
def inspection(inspector, tmp_path_factory) -> Inspection:
    path = tmp_path_factory.mktemp("text") / "argparse.py"
    path.write_text(library_text("argparse.py"), "utf-8")
    return inspector.look(inspector.read(str(path)))


@pytest.fixture(scope="module")
def html(inspection, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(inspection.page(), "utf-8")
    return path


def texts(watched: Watched, selector: str) -> list[str]:
    return watched.page.eval_on_selector_all(selector, "found => found.map(element => element.textContent)")


def point(watched: Watched, row: int, column: int, spans: int, *, click: bool = False) -> None:
    """Move the pointer to a cell of the map."""
    watched.page.locator("#map").scroll_into_view_if_needed()
    box = watched.page.locator("#map canvas").bounding_box()
    x = box["x"] + (column + 0.5) * box["width"] / spans
    y = box["y"] + (row + 0.5) * box["height"] / spans
    watched.page.mouse.move(x, y)
    if click:
        watched.page.mouse.click(x, y)


def pair(watched: Watched) -> tuple[str, str]:
    return watched.page.text_content("#query"), watched.page.text_content("#key")


def share(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def test_the_map_shows_the_shares_and_both_passages_of_a_cell(browser: Browser, inspection, html):
    watched = browser.open(html)
    shares, spans = inspection.map.mean(), inspection.map.n_spans
    for row, column in ((40, 7), (17, 17), (47, 0), (23, 22)):
        point(watched, row, column, spans)
        assert pair(watched) == (inspection.texts[1 + row], inspection.texts[1 + column])
        said = watched.page.text_content("#says")
        assert share(watched.page.text_content("#says b")) == pytest.approx(shares[row, column], rel=0.06)
        assert f"passage {row} (tokens {row * 16:,}–{row * 16 + 15:,})" in said
        assert f"passage {column} " in said
    watched.check()


def test_a_click_holds_a_pair_until_another_or_escape(browser: Browser, inspection, html):
    watched = browser.open(html)
    spans = inspection.map.n_spans
    point(watched, 40, 7, spans, click=True)
    point(watched, 30, 3, spans)
    assert pair(watched)[0] == inspection.texts[31]
    watched.page.mouse.move(2, 2)
    assert pair(watched) == (inspection.texts[41], inspection.texts[8])
    assert watched.page.locator("#pair.fixed").count() == 1
    point(watched, 7, 40, spans, click=True)  # above the diagonal there is no pair
    watched.page.mouse.move(2, 2)
    assert pair(watched)[0] == inspection.texts[41]
    watched.check()


def test_the_map_can_be_used_with_the_keys_alone(browser: Browser, inspection, html):
    watched = browser.open(html)
    page = watched.page
    point(watched, 40, 7, inspection.map.n_spans, click=True)
    page.mouse.move(2, 2)
    page.locator("#layer").focus()
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "map":
            break
    assert page.evaluate("document.activeElement.id") == "map"
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    assert pair(watched) == (inspection.texts[1 + 47], inspection.texts[1 + 9])
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert pair(watched) == (inspection.texts[1 + 47], inspection.texts[1 + 9])
    page.locator("#map").focus()
    for _ in range(9):
        page.keyboard.press("Shift+ArrowRight")  # stops at the diagonal
    assert pair(watched) == (inspection.texts[48], inspection.texts[48])
    for _ in range(9):
        page.keyboard.press("Shift+ArrowUp")
    assert pair(watched) == (inspection.texts[1], inspection.texts[1])
    page.keyboard.press("Escape")
    assert page.locator("#pinned").is_hidden()
    watched.check()


def test_a_layer_and_a_head_have_maps_of_their_own(browser: Browser, inspection, html):
    watched = browser.open(html)
    page, found = watched.page, inspection.map

    def drawn() -> str:
        return page.evaluate("document.querySelector('#map canvas').toDataURL()")

    pictures = [drawn()]
    assert page.locator("#head").is_disabled()
    cell = (41, 5)
    for layer, head, shares in (
        ("max", "", found.shares.max(0)),
        ("1", "", found.shares[1]),
        ("1", "2", found.heads[1][2]),
        ("2", "2", found.heads[2][2]),
    ):
        page.select_option("#layer", layer)
        if layer != "max":
            page.select_option("#head", head)
        point(watched, *cell, found.n_spans)
        assert share(page.text_content("#says b")) == pytest.approx(shares[cell], rel=0.06)
        page.mouse.move(2, 2)
        pictures.append(drawn())
    page.check("[value=linear]")
    pictures.append(drawn())
    assert page.text_content("#low") == "0 %"
    assert len(set(pictures)) == len(pictures)
    watched.check()


def test_passages_say_how_much_they_draw_from_far_back_and_from_where(browser: Browser, inspection, html):
    watched = browser.open(html)
    page, shares, far = watched.page, inspection.map.mean(), inspection.far
    expected = far_shares(shares, far)
    shown = texts(watched, "[data-passage] b")
    assert shown[: far + 1] == ["–"] * (far + 1)
    np.testing.assert_allclose([share(text) for text in shown[far + 1 :]], expected[far + 1 :], rtol=0.06)
    assert page.text_content("#chosen") == f"Passage {expected.argmax()} draws on"
    page.click("#p44 .words")
    assert page.text_content("#chosen") == "Passage 44 draws on"
    listed = [share(text) for text in texts(watched, "#sources b")]
    assert listed == sorted(listed, reverse=True)
    np.testing.assert_allclose(listed, [drawn for _, drawn in sources(shares, 44, 8)], rtol=0.06)
    places = [int(text.split()[1]) for text in texts(watched, "#sources a")]
    np.testing.assert_allclose(listed, shares[44, places], rtol=0.06)
    page.keyboard.press("ArrowDown")
    assert page.text_content("#chosen") == "Passage 45 draws on"
    page.select_option("#far", "1")
    shown = texts(watched, "[data-passage] b")
    np.testing.assert_allclose([share(text) for text in shown[2:]], far_shares(shares, 1)[2:], rtol=0.06)
    page.click("#sources li:first-child button")
    assert pair(watched)[0] == inspection.texts[46]
    page.click("#sources li:first-child a")
    target = page.evaluate("document.querySelector(':target').dataset.passage")
    assert page.text_content("#sources a") == f"passage {target}"
    assert page.text_content("#chosen") == "Passage 45 draws on"
    watched.check()


def test_on_a_narrow_screen_the_sources_follow_the_passage_that_is_chosen(browser: Browser, html):
    watched = browser.open(html, width=390, height=844)
    after = "document.querySelector('.sources').previousElementSibling?.id"
    assert watched.page.evaluate(after) == "document"
    watched.page.click("#p30 .words")
    assert watched.page.evaluate(after) == "p30"
    watched.page.keyboard.press("ArrowUp")
    assert watched.page.evaluate(after) == "p29"
    assert watched.page.text_content("#chosen") == "Passage 29 draws on"
    watched.check()


def test_the_chart_has_the_line_of_the_layer_that_is_chosen(browser: Browser, html):
    watched = browser.open(html)
    lines = "[...document.querySelectorAll('#curve .mark-line path')].map(path => path.getAttribute('d'))"
    watched.wait(f"{lines}.length == 3")
    titles = " ".join(texts(watched, "#curve svg text"))
    assert "position of the token that attends (tokens)" in titles
    assert "far attention (%)" in titles
    watched.page.evaluate(f"window.before = {lines}.join()")
    watched.page.select_option("#layer", "2")
    watched.wait(f"{lines}.join() != window.before")
    assert len(watched.page.evaluate(lines)) == 3
    watched.check()


@pytest.mark.parametrize("text", [HOSTILE * 12, HOSTILE + LONG_LINE], ids=["markup", "a line of 1 MB"])
def test_whatever_a_document_holds_is_shown_as_text(browser: Browser, inspector, tmp_path, text):
    path = tmp_path / "<b>hostile & co.txt"
    path.write_text(text, "utf-8")
    inspection = inspector.look(inspector.read(str(path)))
    (tmp_path / "page.html").write_text(inspection.page(), "utf-8")
    watched = browser.open(tmp_path / "page.html", width=390, height=844)
    shown = texts(watched, ".document .words")
    assert "".join(shown) == plain(inspection.subject.text)
    point(watched, 20, 3, inspection.map.n_spans)
    assert pair(watched)[0] == shown[-inspection.map.n_spans :][20]
    assert watched.page.title() == "<b>hostile & co.txt · longsift"
    assert watched.page.locator("img").count() == 0
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 390
    watched.check()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("inspect-1440", {}),
        ("inspect-390", {"width": 390, "height": 844}),
        ("inspect-dark", {"dark": True}),
        ("inspect-print", {}),
    ],
    ids=["1440", "390", "dark", "print"],
)
def test_screenshots(browser: Browser, html, tmp_path, name, options):
    watched = browser.open(html, **options)
    if name == "inspect-print":
        watched.page.emulate_media(media="print")
    watched.wait("document.querySelector('#curve svg')")
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= options.get("width", 1440)
    assert watched.screenshot(name, tmp_path).stat().st_size > 10_000
    watched.check()


def test_a_map_of_one_layer_without_heads_has_no_choice_of_them(browser: Browser, inspector, tmp_path, inspection):
    found = dependency_map(inspector.calculator, inspection.subject.input_ids, span=16, layers=[1])
    alone = Inspection(inspection.subject, found, inspection.texts, inspection.calculator, decoded=False)
    (tmp_path / "page.html").write_text(alone.page(), "utf-8")
    watched = browser.open(tmp_path / "page.html")
    assert texts(watched, "#layer option") == ["layer 1"]
    assert watched.page.locator("#head").count() == 0
    assert "was not measured" in watched.page.text_content("main")
    watched.check()
