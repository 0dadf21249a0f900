"""Two runs compared: the numbers against scipy and plain Python, what is refused, and the page in a browser."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import kendalltau, spearmanr

from browser import Browser
from longsift.comparison import CURVE, Comparison, compare_runs, parse_shares, summary
from longsift.errors import OutputError, UsageError
from longsift.report.compare import write_comparison
from longsift.shards import RunFolder
from made_tables import Row, write_tables
from test_pipeline import as_json, longsift

EVIL = "</script><script>alert(1)</script><!--\u202egnp\x00 \u05e9\u05dc\u05d5\u05dd 🙂 "


def write_run(out: Path, shards: list[list[Row]], *, windows: str | None = None, alpha: float = 0.0) -> Path:
    """A run folder with scores of the method longattn; `windows`: that of another run, relative to this one."""
    write_tables(out, shards)
    section: dict[str, Any] = {"status": "done", "finished": 1.0, "identity": {}, "length": 100, "counts": {}}
    if windows:
        shutil.rmtree(out / "windows")
        section["folder"] = windows
    calculator = {"model": "org/model", "revision": "0123456789abcdef", "device": "cpu", "dtype": "float32"}
    identity = {"method": "longattn", "parameters": {"alpha": alpha, "normalize": "minmax", "detail": False}}
    scores = {"status": "done", "finished": 2.0, "identity": identity, "calculator": calculator}
    content = {"longsift": "0.1.0", "windows": section, "scores": scores}
    (out / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def made_runs(tmp_path: Path, sizes: dict[str, int], *, text: str = "once", ties: int = 20) -> tuple[Path, Path]:
    """Two runs on one table; many of the scores are equal."""
    draw = random.Random(1)
    a, b = [], []
    for group, size in sizes.items():
        for i in range(size):
            x = draw.randrange(ties) / ties
            a.append(Row(group, x, window_id=f"{group}-{i:03}:0", text=f"{text} {i}"))
            b.append(Row(group, round(x + draw.gauss(0, 0.3), 1), window_id=a[-1].window_id))
    half = len(a) // 2
    return (
        write_run(tmp_path / "a", [a[:half], a[half:]], alpha=0.5),
        write_run(tmp_path / "b", [b[:half], b[half:]], windows="../a/windows"),
    )


def test_correlations_are_those_of_scipy_and_overlaps_those_of_sets(tmp_path: Path) -> None:
    draw = random.Random(4)
    sizes = {"arxiv": 37, "book": 64, "one": 1}
    rows = {
        name: [
            Row(group, draw.randrange(12) / 12, 0.0, window_id=f"{group}-{i}:0") for group in sizes for i in range(50)
        ]
        for name in "ab"
    }
    keep = [i for i, row in enumerate(rows["a"]) if int(row.window_id.partition("-")[2][:-2]) < sizes[row.group]]
    rows = {name: [table[i] for i in keep] for name, table in rows.items()}
    draw.shuffle(order := list(range(len(keep))))
    a = write_run(tmp_path / "a", [rows["a"]])
    b = write_run(tmp_path / "b", [[rows["b"][i] for i in order[:40]], [rows["b"][i] for i in order[40:]]])
    result = compare_runs(a, b, shares=(0.1, 1.0))
    assert not result.same_table
    assert [(group.group, group.windows) for group in result.groups] == sorted(
        (group, sum(row.group == group for row in rows["a"])) for group in sizes
    )
    both = {0.1: 0, 1.0: 0}
    for group in result.groups:
        scores, tops = [], {}
        for name in "ab":
            members = [row for row in rows[name] if row.group == group.group]
            scores.append([row.strength for row in members])
            ranked = sorted(members, key=lambda row: (-(row.strength or 0), row.window_id))
            for share in both:
                k = math.ceil(share * len(members) - 1e-9)
                tops[name, share] = {row.window_id for row in ranked[:k]}
        if group.windows > 1:
            assert group.spearman == pytest.approx(spearmanr(*scores).statistic)
            assert group.kendall == pytest.approx(kendalltau(*scores).statistic)
        for overlap in group.overlaps:
            common = tops["a", overlap.share] & tops["b", overlap.share]
            assert (overlap.kept, overlap.both) == (len(tops["a", overlap.share]), len(common))
            assert overlap.chance == pytest.approx(overlap.kept / group.windows)
            both[overlap.share] += len(common)
            assert group.curve[CURVE.index(overlap.share)] == pytest.approx(overlap.overlap)
    assert {overlap.share: overlap.both for overlap in result.overlaps} == both
    known = [group for group in result.groups if group.spearman is not None]
    assert result.spearman == pytest.approx(sum(group.spearman or 0 for group in known) / len(known))
    assert result.kendall == pytest.approx(sum(group.kendall or 0 for group in known) / len(known))
    assert result.groups[-1].group == "one"
    assert (result.groups[-1].spearman, result.groups[-1].overlaps[0].overlap) == (None, 1.0)
    assert result.windows == len(keep) == sum(map(sum, result.heat))


def test_windows_of_most_disagreement_are_those_of_the_largest_difference_of_rank(tmp_path: Path) -> None:
    ids = [f"d{i}:0" for i in range(10)]
    a = [Row(strength=1 - i / 10, window_id=name) for i, name in enumerate(ids)]  # 0 1 2 3 …
    order = [9, 1, 2, 3, 4, 5, 6, 8, 7, 0]  # in B: 9 is the best, 0 the worst
    b = [Row(strength=1 - order.index(i) / 10, window_id=name) for i, name in enumerate(ids)]
    result = compare_runs(write_run(tmp_path / "a", [a]), write_run(tmp_path / "b", [b[:4], b[4:]]))
    told = [(w.higher, w.window_id, w.rank_a, w.rank_b, w.shard, w.row) for w in result.disagreements]
    assert told == [
        ("a", "d0:0", 1, 10, "shard-00000", 0),
        ("a", "d7:0", 8, 9, "shard-00001", 3),
        ("b", "d9:0", 10, 1, "shard-00001", 5),
        ("b", "d8:0", 9, 8, "shard-00001", 4),
    ]


def test_a_run_agrees_with_itself_and_disagrees_with_its_opposite(tmp_path: Path) -> None:
    rows = [Row(strength=i / 50, window_id=f"d{i}:0") for i in range(40)]
    opposite = [Row(strength=-i / 50, window_id=f"d{i}:0") for i in range(40)]
    a, b = write_run(tmp_path / "a", [rows]), write_run(tmp_path / "b", [opposite])
    same, against = compare_runs(a, a), compare_runs(a, b)
    assert (same.spearman, same.kendall) == pytest.approx((1, 1))
    assert {overlap.overlap for overlap in same.overlaps} == {1.0}
    assert not same.disagreements
    assert (against.spearman, against.kendall) == pytest.approx((-1, -1))
    assert [overlap.both for overlap in against.overlaps] == [0, 0, 0, 0]


def test_windows_of_one_run_alone_and_unmeasured_ones_are_counted_and_left_out(tmp_path: Path) -> None:
    ids = [f"d{i}:0" for i in range(9)]
    a = [Row(strength=i / 9, window_id=name) for i, name in enumerate(ids[:7])]
    b = [Row(strength=i / 9, window_id=name) for i, name in enumerate(ids[1:])]
    b[2] = Row(strength=None, window_id=ids[3], status="failed")
    result = compare_runs(write_run(tmp_path / "a", [a]), write_run(tmp_path / "b", [b]))
    assert (result.windows, result.only_a, result.only_b, result.unmeasured) == (5, 1, 2, 1)
    assert (result.a.windows, result.a.failed, result.b.windows, result.b.failed) == (7, 0, 7, 1)
    lines = summary(result)
    assert (lines["only in A"], lines["only in B"], lines["not measured in one"]) == (1, 2, 1)


def test_a_shard_that_was_set_aside_is_missing_and_the_others_are_matched_by_place(tmp_path: Path) -> None:
    a, b = made_runs(tmp_path, {"book": 20})
    (b / "scores" / "shard-00000.parquet").unlink()
    result = compare_runs(a, b)
    assert result.same_table
    assert (result.windows, result.only_a, result.only_b) == (10, 10, 0)


def test_runs_of_other_windows_are_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [[Row(window_id="x:0"), Row(window_id="y:0")]])
    others = {
        "No window was measured in both": [Row(window_id="z:0")],
        "'x:0' of 100 tokens in the group 'book' of .*'x:0' of 99 tokens": [Row(window_id="x:0", n_tokens=99)],
        "in the group 'web'": [Row("web", window_id="y:0")],
        "several windows of the id 'x:0'": [Row(window_id="x:0"), Row(window_id="x:0")],
    }
    for number, (message, rows) in enumerate(others.items()):
        b = write_run(tmp_path / str(number), [rows])
        with pytest.raises(OutputError, match=message):
            compare_runs(a, b)
    linked = write_run(tmp_path / "linked", [[Row(window_id="x:0"), Row(window_id="q:0")]], windows="../a/windows")
    with pytest.raises(OutputError, match=r"'y:0' of 100 tokens .* is 'q:0'"):
        compare_runs(a, linked)


@pytest.mark.parametrize("shares", ["0", "1.5", "0.1,0.1", "a,b", ""])
def test_shares_out_of_range_are_refused(tmp_path: Path, shares: str) -> None:
    a = write_run(tmp_path / "a", [[Row()]])
    with pytest.raises(UsageError, match="--shares takes"):
        compare_runs(a, a, parse_shares(shares))


def test_two_methods_are_compared_by_the_command_line(corpus, model, tmp_path):
    flags = ["--model", model, "-q"]
    a, b = tmp_path / "a", tmp_path / "b"
    longsift("score", corpus, "-o", a, "--method", "longattn", "--window", 512, "--sample", 16, *flags)
    spans = ["--span", 16, "--d-afs", 2, "--d-cds", 2]
    longsift("score", a, "-o", b, "--method", "ladm", *spans, *flags)
    result = as_json(longsift("compare", a, b, "--json", "--shares", "0.25,0.5"))
    assert result["same_table"]
    assert (result["a"]["method"], result["b"]["method"]) == ("longattn", "ladm")
    assert [group["group"] for group in result["groups"]] == ["code", "mixed"]
    assert -1 <= result["spearman"] <= 1
    for group in result["groups"]:
        assert [part["share"] for part in group["overlaps"]] == [0.25, 0.5]
        assert all(part["overlap"] == part["both"] / part["kept"] for part in group["overlaps"])
    printed = longsift("compare", a, b, "-o", tmp_path / "page.html")
    assert "top 12.5%" in printed
    assert "by chance" in printed
    assert (tmp_path / "page.html").stat().st_size < 3 << 20
    assert (b / "compare.html").exists()
    RunFolder(b).clear("scores")  # as `score --overwrite` does
    assert not (b / "compare.html").exists()
    assert "'longsift score' first" in longsift("compare", a, tmp_path, code=1)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page of five groups with hostile texts and names."""
    folder = tmp_path_factory.mktemp("page")
    sizes = {"arxiv": 300, "book": 120, EVIL: 40, "forum": 7, "one": 1}
    a, b = made_runs(folder, sizes, text=EVIL + "x" * 5000)
    return write_comparison(compare_runs(a, b), folder / "compare.html")


def test_the_page_shows_hostile_text_as_text(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "alert(1)</script>" not in html
    assert "\\x00" in html
    assert not any(character in html for character in "\x00\u202e")


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, False), (1440, True)], ids=["wide", "narrow", "dark"])
def test_the_page_is_drawn_and_asks_for_nothing(
    page: Path, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    watched = browser.open(page, width=width, dark=dark)
    watched.wait("document.querySelectorAll('figure svg.marks').length == 2")
    watched.check()
    watched.screenshot(f"compare-{width}{'-dark' if dark else ''}", tmp_path)
    assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    text = watched.page.inner_text("body")
    for title in ("kept share of every group, %", "of it kept by both, %", "rank in A, % of the group"):
        assert title in text


def test_a_window_is_opened_by_keyboard(page: Path, browser: Browser) -> None:
    watched = browser.open(page)
    for _ in range(3):
        watched.page.keyboard.press("Tab")
        if watched.page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    watched.page.keyboard.press("Enter")
    assert watched.page.evaluate("document.querySelector('details').open")
    assert "gnp" in watched.page.inner_text("details .text")


def test_a_comparison_without_the_windows_has_no_texts(tmp_path: Path) -> None:
    a, b = made_runs(tmp_path, {"book": 30})
    compared: Comparison = compare_runs(a, b)
    shutil.rmtree(a / "windows")
    html = write_comparison(compared, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The windows that were scored are not there any more." in html
