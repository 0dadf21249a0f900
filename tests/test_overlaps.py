"""Windows of a document that overlap, and windows with the same ids: which of them are selected."""

from __future__ import annotations

import math
import random
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longsift.errors import OutputError
from longsift.selection import choose, select_table
from made_tables import LONGATTN, STRENGTH, Row, document, kept_rows, write_tables


def order(out: Path, group: str = "book", **request: Any) -> list[str]:
    """Window ids from rank 1 on, overlaps apart."""
    with choose(out / "scores", STRENGTH, keep=1.0, overlap=False, **request) as choice:
        return [window.window_id for window in choice.ranked(group, 1, choice.windows)]


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ((0.9, 0.8, 0.1), ["d:0", "x:0", "d:2", "d:1"]),  # the last overlaps only what stands behind
        ((0.1, 0.8, 0.9), ["d:2", "x:0", "d:0", "d:1"]),
        ((0.8, 0.9, 0.7), ["d:1", "x:0", "d:0", "d:2"]),
        ((0.5, 0.1, 0.5), ["d:0", "d:2", "x:0", "d:1"]),
        ((0.6, 0.6, 0.6), ["d:0", "d:2", "x:0", "d:1"]),  # of equals the first is the better
    ],
    ids=["falling", "rising", "peak", "valley", "equal"],
)
def test_a_window_that_overlaps_a_better_one_stands_behind_all_that_do_not(
    tmp_path: Path, strengths: tuple[float, ...], expected: list[str]
) -> None:
    rows = document("d", *zip((0, 75, 150), strengths, strict=True))
    write_tables(tmp_path, [[*rows, Row(strength=0.45, window_id="x:0")]])
    assert order(tmp_path) == expected


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.tuples(
            st.integers(0, 2),  # of three ids, so that some stand twice
            st.lists(st.tuples(st.integers(46, 110), st.sampled_from([0.1, 0.2, 0.3, None])), min_size=1, max_size=7),
        ),
        min_size=1,
        max_size=12,
    ),
    shard=st.integers(1, 9),
    keep=st.floats(0.01, 1.0),
)
def test_overlaps_are_left_out_as_when_windows_are_taken_one_by_one(
    documents: list[tuple[int, list[tuple[int, float | None]]]], shard: int, keep: float
) -> None:
    rows: list[Row] = []
    behind: set[int] = set()
    for name, steps in documents:
        starts = [sum(step for step, _ in steps[:i]) for i in range(len(steps))]
        places = range(len(rows), len(rows) + len(steps))
        rows += document(f"d{name}", *zip(starts, [strength for _, strength in steps], strict=True))
        taken: list[int] = []
        measured = [place for place in places if rows[place].strength is not None]
        for place in sorted(measured, key=lambda place: (-(rows[place].strength or 0), place)):
            if any(abs(rows[place].start - rows[other].start) < 100 - 8 for other in taken):
                behind.add(place)
            else:
                taken.append(place)
    measured = [place for place, row in enumerate(rows) if row.strength is not None]
    measured.sort(key=lambda place: (place in behind, -(rows[place].strength or 0), rows[place].window_id, place))
    expected = measured[: math.ceil(Fraction(str(keep)) * len(measured))]
    cut = min((rows[place].strength or 0 for place in expected), default=1.0)
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), [rows[i : i + shard] for i in range(0, len(rows), shard)])
        with choose(Path(folder) / "scores", STRENGTH, keep=keep, overlap=False) as choice:
            found = {int(name[6:]) * shard + row: rank for name, row, _, _, rank in kept_rows(choice)}
            assert sorted(found, key=found.__getitem__) == expected
            assert sum(group.behind for group in choice.groups) == len(behind)
            assert choice.overlapping == len(behind & set(expected))
            left_out = behind - set(expected)
            assert choice.passed_over == sum((rows[place].strength or 0) >= cut for place in left_out)


@pytest.mark.parametrize(("start", "expected"), [(92, ["d:0", "d:1", "x:0"]), (91, ["d:0", "x:0", "d:1"])])
def test_neighbours_that_share_the_count_of_special_tokens_alone_do_not_overlap(
    tmp_path: Path, start: int, expected: list[str]
) -> None:
    write_tables(tmp_path, [[*document("d", (0, 0.9), (start, 0.8)), Row(strength=0.5, window_id="x:0")]])
    assert order(tmp_path) == expected


def test_a_document_goes_on_in_the_next_file_and_another_of_its_name_is_another(tmp_path: Path) -> None:
    first, second = document("d", (0, 0.9), (50, 0.8))
    write_tables(tmp_path, [[first], [second, *document("d", (0, 0.7)), Row(strength=0.1, window_id="x:0")]])
    with choose(tmp_path / "scores", STRENGTH, keep=1.0, overlap=False) as choice:
        found = [(window.shard[-1], window.row) for window in choice.ranked("book", 1, 4)]
    assert found == [("0", 0), ("1", 1), ("1", 2), ("1", 0)]


def test_overlaps_come_back_in_order_where_a_budget_needs_them(tmp_path: Path) -> None:
    overlapping = document("d", (0, 0.9), (50, 0.8)) + document("e", (0, 0.6), (50, 0.7))
    write_tables(tmp_path, [[*overlapping, *document("x", (0, 0.1)), *document("y", (0, 0.2), group="web")]])

    def kept(budget: int) -> tuple[list[str], int, int]:
        with choose(tmp_path / "scores", STRENGTH, budget=budget, mix={"book": 1.0}, overlap=False) as choice:
            ids = [window_id for _, _, window_id, *_ in sorted(kept_rows(choice), key=lambda row: row[-1])]
            return ids, choice.passed_over, choice.overlapping

    assert kept(200) == (["d:0", "e:1"], 1, 0)  # d:1 scores more than e:1
    assert kept(300) == (["d:0", "e:1", "x:0"], 2, 0)
    assert kept(400) == (["d:0", "e:1", "x:0", "d:1"], 1, 1)
    assert kept(900) == (["d:0", "e:1", "x:0", "d:1", "e:0"], 0, 2)


def without_columns(folder: Path, columns: list[str], files: str = "*") -> None:
    for path in folder.glob(f"{files}.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(columns), path)


@pytest.mark.parametrize("files", ["*", "*1", "*0"], ids=["all", "the last", "the first"])
def test_scores_without_starts_take_them_from_the_windows(tmp_path: Path, files: str) -> None:
    overlapping = document("d", (0, 0.9), (50, 0.8))
    write_tables(tmp_path, [[*overlapping, *document("x", (0, 0.1))], document("e", (0, 0.6), (50, 0.7))])
    expected = order(tmp_path)
    without_columns(tmp_path / "scores", ["start", "ids_hash"], files)
    assert order(tmp_path, windows=tmp_path / "windows") == expected == ["d:0", "e:1", "x:0", "d:1", "e:0"]
    with choose(tmp_path / "scores", STRENGTH, keep=1.0) as choice:
        assert [group.behind for group in choice.groups] == [0]
    with pytest.raises(OutputError, match=r"no column start.*--overlap"):
        order(tmp_path)
    write_tables(tmp_path / "other", [document("y", (0, 0.9), (50, 0.8), (100, 0.1)), document("e", (0, 0.6))])
    with pytest.raises(OutputError, match="not those that were scored"):
        order(tmp_path, windows=tmp_path / "other" / "windows")


# --- windows with the same ids ----------------------------------------------------------------------------


def test_of_windows_with_the_same_ids_one_is_ranked_and_the_others_count_for_nothing(tmp_path: Path) -> None:
    draw = random.Random(9)
    rows = [Row(draw.choice("ab"), draw.random(), draw.random(), window_id=f"d{i:02}:0", ids=[i]) for i in range(30)]
    copies = [
        Row(draw.choice("abc"), row.strength, row.variance, window_id=f"e{i}:0", ids=row.ids)
        for i, row in enumerate(rows[:9])
    ]
    # A copy that could not be measured stands for none, though its window id comes first.
    failed = Row("a", None, None, window_id="a:0", ids=[29], status="failed")
    write_tables(tmp_path / "all", [[failed, *copies[:5], *rows[:20]], [*copies[5:], *rows[20:]]])
    write_tables(tmp_path / "distinct", [[failed, *rows]])

    def outcome(out: Path, **request: Any) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        with choose(out / "scores", LONGATTN, budget=1500, **request) as choice:
            groups = [(g.group, g.windows, g.failed, g.kept, g.cut) for g in choice.groups if g.windows]
            return sorted((window_id, score, rank) for _, _, window_id, score, rank in kept_rows(choice)), groups

    windows, groups = outcome(tmp_path / "all", dedup="exact")
    expected, expected_groups = outcome(tmp_path / "distinct")
    assert [(window_id, rank) for window_id, _, rank in windows] == [
        (window_id, rank) for window_id, _, rank in expected
    ]
    assert [score for _, score, _ in windows] == pytest.approx([score for _, score, _ in expected])
    assert [group[:4] for group in groups] == [group[:4] for group in expected_groups]
    with choose(tmp_path / "all" / "scores", LONGATTN, budget=1500, dedup="exact") as choice:
        assert {g.group: g.duplicates for g in choice.groups} == {g: [c.group for c in copies].count(g) for g in "abc"}
    assert outcome(tmp_path / "all")[0] != windows


def test_scores_without_hashes_cannot_be_deduplicated(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row()]])
    without_columns(tmp_path / "scores", ["ids_hash"])
    with pytest.raises(OutputError, match=r"no column ids_hash.*without --dedup"):
        choose(tmp_path / "scores", LONGATTN, keep=1.0, dedup="exact")


def test_of_a_table_in_memory_overlaps_and_copies_are_left_out_as_of_one_on_disk(tmp_path: Path) -> None:
    rows = [*document("d", (0, 0.9), (60, 0.8), (160, 0.1)), *document("e", (0, 0.7), (100, 0.6))]
    rows[4].ids = rows[0].ids = [7, 7]
    write_tables(tmp_path, [rows])
    table = pq.read_table(tmp_path / "scores")
    asked: dict[str, Any] = {"keep": 0.5, "overlap": False, "dedup": "exact"}
    with choose(tmp_path / "scores", STRENGTH, **asked) as choice:
        expected = sorted(window_id for _, _, window_id, _, _ in kept_rows(choice))
    assert sorted(select_table(table, STRENGTH, **asked)["window_id"].to_pylist()) == expected
    assert sorted(select_table(table, STRENGTH, keep=0.6)["window_id"].to_pylist()) != expected
