from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longsift.errors import OutputError
from longsift.report import write_report
from longsift.report.content import command
from longsift.selection import ScoreRule, choose
from longsift.tables import QUARANTINE
from made_tables import LONGATTN, STRENGTH, Row, write_tables

EVIL = "<script>alert(1)</script></textarea></details>\x00\x1b[31m\u202egnp.exe"


def manifest(windows: int, **counts: int) -> dict[str, Any]:
    return {
        "longsift": "0.1.0",
        "windows": {
            "identity": {"group_by": "source", "inputs": [["corpus.jsonl", 2_500_000], ["more.jsonl", None]]},
            "length": 32768,
            "counts": {
                "documents": 40,
                "bad_rows": 3,
                "too_short": 15,
                "too_short_tokens": 12_345,
                "windows": windows,
                "tokens": 100 * windows,
            }
            | counts,
        },
        "scores": {
            "calculator": {
                "model": "org/model",
                "revision": "0123456789abcdef",
                "device": "cpu",
                "dtype": "float32",
            },
            "counts": {"windows": windows, "failed": 0, "tokens": 100 * windows, "seconds": 2.0},
            "reasons": {"out of memory": 2},
            "finished": 1_795_322_511.0,
        },
        "selected": {"identity": {"method": "longattn", "parameters": {"alpha": 0.5, "detail": False}}},
    }


def page(out: Path, rule: ScoreRule = LONGATTN, counts: dict[str, int] | None = None, **request: Any) -> str:
    with choose(out / "scores", rule, **(request or {"keep": 0.25})) as choice:
        total = choice.windows + choice.failed
        path = write_report(out, manifest(total, **(counts or {})), choice, out / "windows")
    assert path == out / "report.html"
    return path.read_text(encoding="utf-8")


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.style = ""
        self.scripts: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.style += data
        elif self.tags and self.tags[-1] == "script" and self.cdata_elem:
            self.scripts.append(data)
        else:
            self.text += data + " "

    def values(self) -> dict[str, Any]:
        """What Python gave to the page's own script."""
        line = next(line for line in "".join(self.scripts).splitlines() if line.startswith("const report = "))
        values: dict[str, Any] = json.loads(line.removeprefix("const report = ").removesuffix(";"))
        return values


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(strength=i / 9, text="see https://example.org/x.png") for i in range(9)]])
    html = page(tmp_path)
    parsed = _Page(html)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert not {"src", "href", "action", "style", "onclick", "onload"} & parsed.attributes
    assert not re.search(r"url\(|@import", parsed.style)
    assert "default-src 'none'" in html


def test_the_page_states_the_run_and_its_funnel(tmp_path: Path) -> None:
    rows = [Row("book", i / 20) for i in range(16)] + [Row("book", None, status="failed")] * 2
    write_tables(tmp_path, [rows])
    text = _Page(page(tmp_path, counts={"windows_before_sample": 70})).text
    for fact in (
        "4 of 16 windows selected",
        "Method longattn, alpha 0.5 Score Z(dependency_strength) − 0.5·Z(variance)",
        "Calculator org/model @ 0123456789ab Window 32,768 tokens Groups by source Kept 25 % of every group",
        "Scored 2026-11-22 04:41 UTC, in 2.0 s On cpu, float32 Speed 900 tokens a second",
        "corpus.jsonl and 1 more, 2.50 MB Made with longsift 0.1.0",
        "Read 43 Quarantined 3 Too short 15 12.3 k tokens Cut into windows 25",
        "Cut 70 Drawn as a sample 18 1.80 k tokens Failed 2 Scored 16 1.60 k tokens Selected 4 400 tokens",
        "2 windows not scored: out of memory d0-16:0 , shard-00000, row 16 d0-17:0 , shard-00000, row 17",
        "Scoring 2.0 s 900 tokens/s",
        "1.00 B tokens 12 days 20 h",
    ):
        assert fact in text


def test_each_group_has_a_histogram_with_its_cut_and_a_row(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(group, i / 40, n_tokens=1000) for group in ("arxiv", "book") for i in range(40)]])
    html = page(tmp_path)
    parsed = _Page(html)
    assert "arxiv 40 40.0 k 10 10.0 k 25 %" in parsed.text
    assert html.count("data-histogram=") == 2
    values = parsed.values()
    assert "score, standard deviations within the group" in json.dumps(values["histogram"])
    assert [(group["name"], group["of"], sum(group["front"])) for group in values["slider"]["groups"]] == [
        ("arxiv", [40, 40_000], 40),
        ("book", [40, 40_000], 40),
    ]


def test_a_mix_that_could_not_be_filled_is_shown(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row("a"), *(Row("b") for _ in range(20))]])
    text = _Page(page(tmp_path, budget=1000, mix={"a": 0.5, "b": 0.5})).text
    assert "Kept 1.00 k tokens: a 50 %, b 50 %" in text
    assert "Asked for and found groups share tokens asked for selected missing a 50 % 500 100 400" in text


def test_best_borderline_and_worst_windows_are_listed_once_with_their_text(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(strength=i / 100, text=f"text number {i}.") for i in range(40)]])
    html = page(tmp_path, STRENGTH)
    assert re.findall(r'class="rank">#(\d+)<', html) == ["1", "2", "3", "9", "10", "11", "12", "38", "39", "40"]
    assert re.findall(r">(selected|left out)</span><span class=\"rank\"", html) == ["selected"] * 5 + ["left out"] * 5
    for shown, times in (("text number 39.", 2), ("text number 0.", 2), ("text number 20.", 0)):
        assert html.count(shown) == times  # the line and the opened text


@pytest.mark.parametrize("windows", [1, 2, 5, 7])
def test_a_small_group_shows_every_window_once(tmp_path: Path, windows: int) -> None:
    write_tables(tmp_path, [[Row(strength=i / 100) for i in range(windows)]])
    ranks = re.findall(r'class="rank">#(\d+)<', page(tmp_path))
    assert ranks == [str(rank) for rank in range(1, windows + 1)]


def test_windows_left_out_for_overlaps_and_duplicates_are_counted_and_not_shown_as_the_worst(tmp_path: Path) -> None:
    rows = [Row(strength=i / 100, window_id=f"d{i}:0", text=f"text {i}", ids=[i]) for i in range(40)]
    rows += [
        Row(strength=0.99 - i / 100, window_id=f"e:{i}", start=60 * i, text=f"near {i}", ids=[90, i]) for i in (0, 1)
    ]
    rows += [Row(strength=0.3, window_id="f:0", text="again", ids=[30])]
    write_tables(tmp_path, [rows])
    with_all = page(tmp_path, STRENGTH)
    assert "near 1" in with_all
    assert "Overlap a better one" not in with_all
    html = page(tmp_path, STRENGTH, keep=0.25, overlap=False, dedup="exact")
    text = _Page(html).text
    assert "near 0" in text
    assert "near 1" not in text
    assert "text 0" in text
    assert "Overlap a better one 1" in text
    assert "Same tokens as another 1" in text
    assert "Scored 42" in text


def test_hostile_text_stands_as_text(tmp_path: Path) -> None:
    text = EVIL + "A" * 1_000_000 + "</div>end"
    row = Row(EVIL, text=text, window_id=f"{EVIL}:0")
    write_tables(tmp_path, [[row, Row(EVIL, 0.1, text=None)]])
    html = page(tmp_path)
    assert len(html) < 1_100_000  # 0.9 MB of them the charts' library
    parsed = _Page(html)
    assert parsed.tags.count("script") == 2
    assert parsed.tags.count("details") == 3
    assert "<script>alert(1)</script></textarea></details>\\x00\\x1b[31m\\u202egnp.exe" in parsed.text
    assert f"… {len(text) - 2000:,} characters …" in parsed.text
    assert "This window came as token ids; it has no text." in parsed.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", parsed.text)


def test_quarantined_rows_are_shown_by_reason_commonest_first(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row()]])
    bad = [
        {"file": "b.jsonl", "row": 7, "reason": "no text", "excerpt": "{}"},
        *({"file": "a.jsonl", "row": i, "reason": "not JSON", "excerpt": "<b>\\xff"} for i in range(5)),
        {"file": "c.parquet", "row": None, "reason": "cut off", "excerpt": None},
    ]
    (tmp_path / "quarantine").mkdir()
    pq.write_table(pa.Table.from_pylist(bad, schema=QUARANTINE), tmp_path / "quarantine" / "00000.parquet")
    text = _Page(page(tmp_path)).text
    assert (
        "5 quarantined: not JSON a.jsonl , row 0 <b>\\xff a.jsonl , row 1 <b>\\xff a.jsonl , row 2 <b>\\xff "
        "1 quarantined: cut off c.parquet 1 quarantined: no text b.jsonl , row 7 {}"
    ) in text


def test_a_page_of_large_texts_and_names_and_many_groups_stays_below_3_mb(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [
        Row(
            f"{i % 900:03d} 語" + "x" * (100_000 if i == 0 else 0),
            strength=draw.random(),
            window_id=f"{i}:0",
            n_tokens=draw.randrange(100, 40_000),
            text="\x00" * 3000 if i % 2 else '"語&<' * 500,
        )
        for i in range(900)
    ]
    rows += [
        Row(
            f"{i % 24:03d} 語",
            draw.random(),
            window_id=f"m{i}:0",
            n_tokens=draw.randrange(100, 40_000),
            text="\x00" * 3000,
        )
        for i in range(24 * 1100)
    ]
    write_tables(tmp_path, [rows])
    html = page(tmp_path)
    parsed = _Page(html)
    assert html.count("data-histogram=") == 24
    assert len(parsed.values()["slider"]["groups"][1]["step"]) > 900
    maps = 10 * 24 * 1600  # bytes at most, which no window of this page has
    assert len(html.encode()) < 3_000_000 - maps
    assert "characters …" in parsed.text


def test_the_command_of_the_slider_selects_as_this_selection_did(tmp_path: Path) -> None:
    made = manifest(1)
    made["scores"]["identity"] = {"method": "longattn", "parameters": {"alpha": 0.5, "normalize": "zscore"}}
    made["selected"]["identity"] = {
        "parameters": {"alpha": 0.7, "normalize": "zscore"},
        "overlap": False,
        "dedup": "exact",
    }
    assert command(Path("my run"), made) == "longsift select 'my run' --dedup exact --alpha 0.7"


def test_many_groups_are_all_in_the_table_and_the_largest_have_a_chart(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(f"g{i:02d}", n_tokens=10 + i) for i in range(60)]])
    html = page(tmp_path)
    parsed = _Page(html)
    assert html.count("data-histogram=") == 24
    assert all(f" g{i:02d} " in parsed.text for i in range(60))
    assert "the 24 groups with most tokens, of 60" in html
    assert "36 others 36 990 36 990 100 %" in parsed.text


def test_a_run_without_a_measured_window_still_has_a_report(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(status="failed", strength=None)]])
    assert "0 of 0 windows selected" in page(tmp_path)


def test_the_same_run_has_the_same_page(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(f"g{i % 3}", i / 50) for i in range(50)]])
    assert page(tmp_path) == page(tmp_path)


def test_windows_of_another_run_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(), Row()]])
    write_tables(tmp_path / "other", [[Row(window_id="x:0"), Row(window_id="x:1")]])
    with choose(tmp_path / "scores", LONGATTN, keep=0.5) as choice:
        with pytest.raises(OutputError, match="does not hold the windows that were scored"):
            write_report(tmp_path, manifest(2), choice, tmp_path / "other" / "windows")
        with pytest.raises(OutputError, match="cannot be read"):
            write_report(tmp_path, manifest(2), choice, tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.234, "1.23"), (-0.2, "−0.200"), (12345.6, "12,346"), (9.87e-10, "9.87·10⁻¹⁰"), (None, "–")],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    from longsift.report.words import number

    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (75, "1 min 15 s"),
        (3600, "1 h"),
        (86_400 + 7200, "1 day 2 h"),
        (1e9, "11,574 days 1 h"),
    ],
)
def test_times_have_their_two_largest_units(seconds: float, shown: str) -> None:
    from longsift.report.words import duration

    assert duration(seconds) == shown
