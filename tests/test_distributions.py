from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from longsift.selection import Choice, choose
from made_tables import LONGATTN, STRENGTH, Row, write_tables

SIZES = {"tiny": 1, "few": 7, "some": 61, "many": 2345}


def rows(seed: int = 0) -> list[Row]:
    """Groups of uneven sizes, windows of uneven lengths; documents of one to four windows that overlap by half."""
    draw = np.random.default_rng(seed)
    made = []
    for group, size in SIZES.items():
        for i in range(size):
            document, index = divmod(i, 4)
            made.append(
                Row(
                    group,
                    strength=round(float(draw.normal()), 2),  # with equal ones
                    variance=float(draw.random()),
                    window_id=f"{group}-{document}:{index}",
                    start=50 * index,
                    n_tokens=100 + int(draw.integers(0, 9)),
                )
            )
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "no-overlap"])
def choice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Choice]:
    out = tmp_path_factory.mktemp("run")
    write_tables(out, [rows()[:1000], rows()[1000:]])
    with choose(out / "scores", LONGATTN, keep=0.25, overlap=request.param) as chosen:
        yield chosen


@pytest.mark.parametrize("share", [0.001, 0.004, 0.125, 0.333, 0.5, 0.999, 1.0])
def test_a_sketch_says_what_a_selection_keeps(choice: Choice, share: float) -> None:
    overlap = not any(group.behind for group in choice.groups)
    sketches = choice.sketches(["few", "many"])
    with choose(choice.scores, LONGATTN, keep=share, overlap=overlap) as selected:
        expected = {group.group: (group.kept, group.kept_tokens, group.cut) for group in selected.groups}
    for name, sketch in sketches.items():
        until = sum(step <= round(1000 * share) for step in sketch.steps)
        kept = sum(sketch.windows[:until]), sum(sketch.tokens[:until])
        if name is None:
            assert kept == tuple(sum(expected[group][part] for group in ("tiny", "some")) for part in (0, 1))
            assert sketch.cuts == ()
        else:
            assert (*kept, sketch.cuts[until - 1]) == expected[name]


def test_a_sketch_of_all_groups_has_no_others(choice: Choice) -> None:
    assert set(choice.sketches(list(SIZES))) == set(SIZES)
    assert set(choice.sketches([])) == {None}


def test_histograms_count_what_stands_behind(choice: Choice) -> None:
    histograms = choice.histograms(bins=13)
    for group in choice.groups:
        histogram = histograms[group.group]
        assert sum(histogram.counts) == group.windows == SIZES[group.group]
        assert sum(histogram.kept) == group.kept
        assert sum(histogram.behind) == group.behind


def test_cells_hold_every_window_once(choice: Choice) -> None:
    found = choice.measures(0, 1, bins=10)
    assert sum(cell.windows for cell in found) == choice.windows
    assert sum(cell.kept for cell in found) == choice.kept
    middle = next(cell for cell in found if cell.windows > 2 and cell.x > -2 and cell.x2 < 2)
    inside = [
        row
        for row in rows()
        if middle.x <= row.strength < middle.x2 and middle.y <= row.variance < middle.y2  # type: ignore[operator]
    ]
    assert len(inside) == middle.windows


def test_lengths_are_those_of_documents(tmp_path: Path) -> None:
    write_tables(
        tmp_path,
        [
            [Row(window_id="a:0"), Row(window_id="a:1", start=900)],
            [Row(window_id="b:0"), Row(window_id="c:0", strength=0.1)],
        ],
    )
    with choose(tmp_path / "scores", STRENGTH, keep=0.75) as choice:
        cells = choice.lengths(bins=2)
        assert cells is not None
        found = [(round(cell.x), round(cell.x2), cell.windows, cell.kept) for cell in cells]
        assert found == [(100, 316, 1, 0), (100, 316, 1, 1), (316, 1000, 2, 2)]
        assert choice.depths(bins=4) == ((1, 0, 0, 1), (1, 0, 0, 1), 2)


def test_places_are_not_known_where_the_scores_do_not_say(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row()]])
    (path,) = (tmp_path / "scores").glob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["start"]), path)
    with choose(tmp_path / "scores", STRENGTH, keep=1.0) as choice:
        assert choice.lengths(bins=2) is None
        assert choice.depths(bins=2) is None


def test_a_run_without_a_measured_window_has_no_cells(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(status="failed", strength=None)]])
    with choose(tmp_path / "scores", STRENGTH, keep=1.0) as choice:
        assert choice.lengths(bins=2) == []
        assert choice.depths(bins=2) == ((0, 0), (0, 0), 0)
        assert choice.sketches([]) == {}


def test_failures_are_found_by_reason_in_order(tmp_path: Path) -> None:
    failed = Row(status="failed", strength=None)
    write_tables(tmp_path, [[Row(), failed, failed], [failed]])
    with choose(tmp_path / "scores", STRENGTH, keep=1.0) as choice:
        found = choice.failures(["out of memory", "other"], 2)
    assert {reason: [(one.shard, one.row, one.window_id) for one in some] for reason, some in found.items()} == {
        "out of memory": [("shard-00000", 1, "d0-1:0"), ("shard-00000", 2, "d0-2:0")]
    }


def test_a_range_without_a_width_gets_one(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(), Row()]])
    with choose(tmp_path / "scores", LONGATTN, keep=1.0) as choice:
        (cell,) = choice.measures(0, 1, bins=4)
    assert cell.x <= 0.5 < cell.x2
    assert (cell.windows, cell.kept) == (2, 2)
    assert math.isfinite(cell.y2)
