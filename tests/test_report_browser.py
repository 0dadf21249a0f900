"""The report in a real browser. LONGSIFT_SCREENSHOTS names a folder for its pictures, in place of a temporary one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Browser, Watched
from longsift import pipeline
from longsift.options import SelectOptions
from longsift.report.words import count, number, share, tokens
from made_tables import Row, write_tables

SIZES = {"many": 1234, "some": 61, "few": 7, "one": 1} | {f"small-{i:02d}": 3 for i in range(22)}
SENTENCE = "the window of a document that depends on what was said long before it and on little else"
DRAWN = "document.documentElement.dataset.drawn"
CELLS = """[...document.querySelectorAll('#groups [data-group]')].map((row) => [row.cells[0].innerText,
    Object.fromEntries([...row.querySelectorAll('[data-live]')].map((cell) => [cell.dataset.live, cell.innerText]))])"""


def write_run(out: Path, rows: list[Row], shards: int = 3) -> None:
    """A run that was scored with longattn."""
    parts = np.array_split(np.arange(len(rows)), shards)
    write_tables(out, [[rows[i] for i in part] for part in parts])
    ok = sum(row.status == "ok" for row in rows)
    total = sum(row.n_tokens for row in rows)
    counts = {"documents": len(rows) + 40, "bad_rows": 2, "too_short": 40, "too_short_tokens": 4000}
    calculator = {"model": "org/model", "revision": "0123456789abcdef", "device": "cuda:0", "dtype": "bfloat16"}
    manifest = {
        "longsift": "0.1.0",
        "windows": {
            "status": "done",
            "finished": 1_795_322_000.0,
            "seconds": 12.5,
            "identity": {"group_by": "source", "inputs": [["corpus/part-00000.jsonl.zst", 2_500_000_000]]},
            "length": 32768,
            "tokenizer": None,
            "counts": counts | {"windows": len(rows), "tokens": total},
        },
        "scores": {
            "status": "done",
            "finished": 1_795_322_511.0,
            "identity": {"method": "longattn", "parameters": {"alpha": 0.5, "normalize": "zscore"}},
            "calculator": calculator,
            "counts": {"windows": len(rows), "failed": len(rows) - ok, "tokens": total, "seconds": 90.0},
            "device_seconds": 180.0,
            "reasons": {"out of memory": len(rows) - ok} if ok < len(rows) else {},
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    records = out / "shards" / "scores"
    records.mkdir(parents=True)
    for i in range(24):
        record = {"windows": 1, "failed": 0, "tokens": total // 24, "seconds": 3.75 + (i % 5) / 4, "reasons": {}}
        (records / f"shard-{i:05d}.json").write_text(json.dumps(record), "utf-8")


def made_rows() -> list[Row]:
    draw = np.random.default_rng(0)
    rows = []
    for group, size in SIZES.items():
        for i in range(size):
            document, index = divmod(i, int(draw.integers(1, 5)))
            rows.append(
                Row(
                    group,
                    strength=round(0.3 + 0.1 * float(draw.normal()), 4),
                    variance=float(draw.exponential(1e-6)),
                    window_id=f"{group}/{document}:{index}",
                    start=60 * index,
                    n_tokens=100 + int(draw.integers(0, 30)),
                    text=" ".join(draw.choice(SENTENCE.split(), 500)),
                )
            )
    rows += [Row("few", None, status="failed", window_id=f"failed-{i}:0") for i in range(2)]
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    write_run(out, made_rows())
    return out


def select(out: Path, keep: float, *, overlap: bool) -> dict[str, Any]:
    return pipeline.select(out, SelectOptions(keep=keep, overlap=overlap, text=False, input_ids=False))


def report(out: Path, keep: float = 0.25, *, overlap: bool = False) -> Path:
    select(out, keep, overlap=overlap)
    return pipeline.report(out)


def move(watched: Watched, position: int) -> None:
    slider = "const share = document.querySelector('#share');"
    watched.page.evaluate(f"{slider} share.value = {position}; share.dispatchEvent(new Event('input'))")


def kept_bars(watched: Watched, chart: int) -> int:
    """Sum of the bars in the colour of what is kept, as a screen reader is told it."""
    labels = watched.page.evaluate(
        f"""[...document.querySelectorAll('[data-histogram="{chart}"] .role-mark.layer_1_marks path')]
            .map((bar) => bar.ariaLabel)"""
    )
    return sum(int(re.findall(r"windows: (\d+)", label)[0]) for label in labels)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
def test_the_slider_shows_what_select_keeps_at_the_same_share(browser: Browser, run: Path, overlap: bool) -> None:
    watched = browser.open(report(run, overlap=overlap))
    (run / "report.html").unlink()  # which each selection would write anew
    watched.wait(DRAWN)
    selected = watched.page.evaluate(CELLS)
    charts = watched.page.evaluate("[...document.querySelectorAll('figure h3')].map((title) => title.innerText)")
    for position in (1, 125, 333, 1000):
        move(watched, position)
        result = select(run, position / 1000, overlap=overlap)
        shown = dict(watched.page.evaluate(CELLS))
        groups = {row["group"]: row for row in result["groups"]}
        for name, row in groups.items():
            if name in shown:
                assert shown.pop(name) == {
                    "windows": count(row["kept"]),
                    "tokens": tokens(row["kept_tokens"]),
                    "share": share(row["kept_tokens"] / row["tokens"]),
                    "cut": number(row["cut"]),
                }
        total = sum(row["tokens"] for row in groups.values())
        assert shown.pop("all groups")["windows"] == count(result["kept"])
        others = [row for name, row in groups.items() if name not in charts]
        assert shown.pop("2 others") == {
            "windows": count(sum(row["kept"] for row in others)),
            "tokens": tokens(sum(row["kept_tokens"] for row in others)),
            "share": share(sum(row["kept_tokens"] for row in others) / sum(row["tokens"] for row in others)),
        }
        assert not shown
        assert watched.page.inner_text("#percent") == share(position / 1000)
        line = (
            f"{result['kept']:,} of {result['of']:,} windows, {tokens(result['kept_tokens'])} of {tokens(total)} tokens"
        )
        assert line in watched.page.inner_text("#slider")
        command = watched.page.inner_text("#command").split()
        assert command == [
            "longsift",
            "select",
            str(run),
            *(["--overlap"] if overlap else []),
            "--keep",
            f"{position / 1000:g}",
        ]
        watched.page.wait_for_timeout(200)
        assert kept_bars(watched, charts.index("many")) == groups["many"]["kept"]
    watched.page.click("#reset")
    assert watched.page.evaluate(CELLS) == selected
    watched.check()


def test_a_selection_by_budget_is_shown_as_it_is_until_the_slider_moves(browser: Browser, run: Path) -> None:
    result = pipeline.select(run, SelectOptions(budget=20_000, text=False, input_ids=False))
    watched = browser.open(pipeline.report(run))
    assert f"{result['kept']} of" in watched.page.inner_text("#slider")
    before = watched.page.evaluate(CELLS)
    watched.page.focus("#share")
    watched.page.keyboard.press("ArrowRight")
    watched.page.keyboard.press("ArrowLeft")
    assert watched.page.evaluate(CELLS) != before
    watched.page.click("#reset")
    assert watched.page.evaluate(CELLS) == before
    watched.check()


def test_the_page_is_used_with_the_keyboard_alone(browser: Browser, run: Path) -> None:
    watched = browser.open(report(run))
    page = watched.page
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert order[:2] == ["SUMMARY", "share"]
    page.focus("#share")
    page.keyboard.press("End")
    assert page.inner_text("#percent") == "100 %"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#percent") == "0.2 %"
    assert "windows" in page.get_attribute("#share", "aria-valuetext")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "reset"
    page.keyboard.press("Enter")
    assert page.inner_text("#percent") == "25 %"
    summary = page.locator(".group summary").first
    assert not page.locator(".group .text").first.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator(".group .text").first.is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "text mono"
    watched.check()


def test_hostile_texts_and_names_stand_as_text(browser: Browser, tmp_path: Path) -> None:
    texts = {
        "script": "<script>document.title = 'taken'</script></script></textarea></div><img src=x onerror=alert(1)>",
        "line": "A" * 1_000_000 + "</script>",
        "right": "שלום עולם \u202eabc\u202c مرحبا",
        "emoji": "🙂 a\x00b \x1b[31m ]]> --> ${1} {{ 1 }} </title>",
    }
    rows = [Row(text, window_id=f"{text}:0", text=text) for text in texts.values()]
    write_run(tmp_path, rows)
    watched = browser.open(report(tmp_path), width=390)
    watched.wait(DRAWN)
    shown = watched.page.evaluate("document.body.textContent")
    assert texts["script"] in shown
    assert "A" * 1300 + f"… {1_000_009 - 2000:,} characters …" + "A" * 691 + "</script>" in shown
    assert "שלום עולם \\u202eabc\\u202c مرحبا" in shown
    assert "🙂 a\\x00b \\x1b[31m ]]> --> ${1} {{ 1 }} </title>" in shown
    assert watched.page.title() == "longsift report"
    assert watched.page.locator("img").count() == 0
    move(watched, 900)
    watched.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 390
    watched.check()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("report-1440", {}),
        ("report-390", {"width": 390}),
        ("report-1440-dark", {"dark": True}),
        ("report-390-dark", {"width": 390, "dark": True}),
    ],
)
def test_the_page_fits_and_is_pictured(
    browser: Browser, run: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = run / "report.html" if (run / "report.html").exists() else report(run)
    watched = browser.open(path, **options)
    watched.wait(DRAWN)
    assert watched.page.evaluate("document.documentElement.scrollWidth") == options.get("width", 1440)
    empty = "[...document.querySelectorAll('.chart')].filter((chart) => !chart.querySelector('svg')).length"
    assert watched.page.evaluate(empty) == 0
    watched.screenshot(name, tmp_path)
    watched.check()


def test_the_page_prints_with_all_charts(browser: Browser, run: Path, tmp_path: Path) -> None:
    path = run / "report.html" if (run / "report.html").exists() else report(run)
    watched = browser.open(path, dark=True)
    watched.wait(DRAWN)
    watched.page.emulate_media(media="print")
    background = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    target = watched.screenshot("report-print", tmp_path).with_suffix(".pdf")
    watched.page.pdf(path=target, format="A4")
    assert target.stat().st_size > 20_000
    watched.check()
