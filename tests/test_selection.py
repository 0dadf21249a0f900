from __future__ import annotations

import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longsift import selection
from longsift.errors import OutputError, UsageError
from longsift.selection import ScoreRule, Term, choose, select_table
from longsift.tables import parquet_files
from made_tables import LONGATTN, STRENGTH, Row, kept_rows, write_tables


def random_shards(seed: int, sizes: dict[str, int], shards: int = 3) -> list[list[Row]]:
    draw = random.Random(seed)
    rows = [
        Row(group, draw.gauss(0.3, 0.1), draw.gauss(1e-9, 1e-10), n_tokens=draw.randint(50, 150))
        for group, size in sizes.items()
        for _ in range(size)
    ]
    draw.shuffle(rows)
    return [rows[s::shards] for s in range(shards)]


def ranking(shards: list[list[Row]], rule: ScoreRule) -> dict[str, list[tuple[str, int, float, int]]]:
    """Plain Python: group → (window_id, n_tokens, score, place) from the best to the worst."""
    groups: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for s, rows in enumerate(shards):
        for i, row in enumerate(rows):
            if row.status == "ok" and row.strength is not None and math.isfinite(row.strength):
                groups[row.group].append((row.window_id or f"d{s}-{i}:0", row))

    def value(row: Row, column: str) -> float:
        return {"dependency_strength": row.strength, "variance": row.variance}[column] or 0.0

    result = {}
    for group, members in groups.items():
        scored = []
        for window_id, row in members:
            score = 0.0
            for term in rule.terms:
                values = [value(other, term.column) for _, other in members]
                low, high = min(values), max(values)
                x = value(row, term.column)
                if rule.normalize == "zscore":
                    x = (x - statistics.fmean(values)) / statistics.pstdev(values) if high > low else 0.0
                elif rule.normalize == "minmax":
                    x = (x - low) / (high - low) if high > low else 0.0
                score += term.weight * x
            scored.append((window_id, row.n_tokens, score))
        scored.sort(key=lambda item: (-item[2], item[0]))
        result[group] = [(*item, rank) for rank, item in enumerate(scored, 1)]
    return result


@pytest.mark.parametrize("normalize", ["zscore", "minmax", "none"])
def test_score_and_rank_are_those_of_the_plain_definition(tmp_path: Path, normalize: str) -> None:
    shards = random_shards(1, {"arxiv": 17, "book": 9, "code": 1})
    rule = ScoreRule(LONGATTN.terms, normalize)  # type: ignore[arg-type]
    write_tables(tmp_path, shards)
    with choose(tmp_path / "scores", rule, keep=1.0) as choice:
        found = {window_id: (score, rank) for _, _, window_id, score, rank in kept_rows(choice)}
    for rows in ranking(shards, rule).values():
        for window_id, _, score, rank in rows:
            assert found.pop(window_id) == (pytest.approx(score, rel=1e-9, abs=1e-12), rank)
    assert not found


def scores_with_layers(groups: list[str], layers: list[list[float | None] | None]) -> pa.Table:
    n = len(groups)
    return pa.table(
        {
            "window_id": [f"d{i}:0" for i in range(n)],
            "doc_id": [f"d{i}" for i in range(n)],
            "group": groups,
            "n_tokens": pa.array([100] * n, pa.int32()),
            "status": ["failed" if values is None else "ok" for values in layers],
            "reason": pa.array([None] * n, pa.string()),
            "cds": pa.array([0.5] * n, pa.float64()),
            "cds_layers": pa.array(layers, pa.list_(pa.float64())),
        }
    )


@pytest.mark.parametrize("normalize", ["zscore", "minmax", "none"])
def test_each_element_of_a_list_is_normalized_by_itself_within_its_group(normalize: str) -> None:
    draw = np.random.default_rng(0)
    layers = draw.normal(size=(60, 9)) * 0.3 ** np.arange(9) + np.arange(9)
    layers[:, 4] = 7.5  # a layer that says the same of every window
    groups = ["arxiv" if i % 3 else "book" for i in range(60)]
    rule = ScoreRule((Term("cds_layers", 2.0, each=True), Term("cds", -1.0)), normalize)  # type: ignore[arg-type]
    kept = select_table(scores_with_layers(groups, layers.tolist()), rule, keep=1.0)
    for group in ("arxiv", "book"):
        places = [i for i in range(60) if groups[i] == group]
        own = layers[places]
        spread = {"zscore": own.std(0), "minmax": np.ptp(own, axis=0), "none": np.ones(9)}[normalize]
        origin = {"zscore": own.mean(0), "minmax": own.min(0), "none": np.zeros(9)}[normalize]
        changing = np.ptp(own, axis=0) > 0
        value = np.divide(own - origin, spread, where=changing | (normalize == "none"), out=np.zeros_like(own))
        expected = 2 * value.mean(1) - (0.5 if normalize == "none" else 0.0)
        found = {row["window_id"]: row["score"] for row in kept.to_pylist() if row["group"] == group}
        assert found == pytest.approx({f"d{i}:0": x for i, x in zip(places, expected, strict=True)}, rel=1e-9)


def test_layers_weigh_the_same_whatever_their_size() -> None:
    # The first layer is a thousand times larger, and against the two others.
    layers = [[1000.0 * i, -0.1 * i, -0.2 * i] for i in range(5)]
    rule = ScoreRule((Term("cds_layers", 1.0, each=True),), "zscore")
    kept = select_table(scores_with_layers(["book"] * 5, layers), rule, keep=0.2)
    assert kept["window_id"].to_pylist() == ["d0:0"]
    assert rule.describe() == "mean(Z(cds_layers))"


def test_windows_that_lack_a_layer_are_counted_as_failed(tmp_path: Path) -> None:
    rows = [[1.0, 2.0], None, [1.0, None], [math.nan, 2.0], [3.0, 1.0]]
    (tmp_path / "scores").mkdir()
    pq.write_table(scores_with_layers(["book"] * 5, rows), tmp_path / "scores" / "a.parquet")
    rule = ScoreRule((Term("cds_layers", 1.0, each=True),), "zscore")
    with choose(tmp_path / "scores", rule, keep=1.0) as choice:
        assert (choice.windows, choice.failed) == (2, 3)
        assert choice.groups[0].columns["cds_layers"].mean == pytest.approx(1.75)
        assert [window.columns["cds_layers"] for window in choice.ranked("book", 1, 2)] == [1.5, 2.0]


@pytest.mark.parametrize("rows", [[None, None], [[], []]], ids=["all-failed", "no-layers"])
def test_a_group_without_a_layer_keeps_nothing(tmp_path: Path, rows: list[list[float | None] | None]) -> None:
    (tmp_path / "scores").mkdir()
    pq.write_table(scores_with_layers(["book"] * 2, rows), tmp_path / "scores" / "a.parquet")
    with choose(tmp_path / "scores", ScoreRule((Term("cds_layers", 1.0, each=True),), "zscore"), keep=1.0) as choice:
        assert (choice.windows, choice.failed, choice.kept) == (0, 2, 0)


def test_lists_of_several_lengths_are_refused() -> None:
    scores = scores_with_layers(["book"] * 2, [[1.0, 2.0], [1.0, 2.0, 3.0]])
    with pytest.raises(OutputError, match=r"have 2 to 3 numbers in cds_layers.*--layer-aggregation mean"):
        select_table(scores, ScoreRule((Term("cds_layers", 1.0, each=True),), "zscore"), keep=1.0)


@pytest.mark.parametrize(
    ("keep", "windows", "kept"), [(0.1, 30, 3), (0.125, 8, 1), (0.125, 9, 2), (1.0, 5, 5), (0.001, 7, 1)]
)
def test_keep_takes_the_rounded_up_share_of_every_group(tmp_path: Path, keep: float, windows: int, kept: int) -> None:
    write_tables(tmp_path, random_shards(2, {"a": windows, "b": windows}))
    with choose(tmp_path / "scores", LONGATTN, keep=keep) as choice:
        assert [group.kept for group in choice.groups] == [kept, kept]
        assert max(rank for *_, rank in kept_rows(choice)) == kept


def test_equal_scores_are_ordered_by_window_id_then_place(tmp_path: Path) -> None:
    write_tables(
        tmp_path,
        [[Row(window_id="d:9"), Row(window_id="d:10")], [Row(window_id="d:10"), Row(window_id="a:0")]],
    )
    with choose(tmp_path / "scores", LONGATTN, keep=1.0) as choice:
        order = [(w.window_id, w.shard, w.row) for w in choice.ranked("book", 1, 4)]
    assert order == [
        ("a:0", "shard-00001", 1),
        ("d:10", "shard-00000", 1),
        ("d:10", "shard-00001", 0),
        ("d:9", "shard-00000", 0),
    ]


def test_a_constant_column_adds_nothing(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(strength=0.1, variance=0.3) for _ in range(7)]])
    for normalize in ("zscore", "minmax"):
        with choose(tmp_path / "scores", ScoreRule(LONGATTN.terms, normalize), keep=1.0) as choice:  # type: ignore[arg-type]
            assert {score for *_, score, _ in kept_rows(choice)} == {0.0}


def test_rows_without_a_measure_are_counted_and_never_kept(tmp_path: Path) -> None:
    bad = [
        Row(status="failed", strength=None, variance=None),
        Row(status="failed", strength=9.0),
        Row(strength=None),
        Row(strength=math.nan),
        Row(variance=math.inf),
    ]
    write_tables(tmp_path, [[*bad, Row(), Row(group="empty", strength=None)]])
    with choose(tmp_path / "scores", LONGATTN, keep=1.0) as choice:
        book, empty = choice.groups
        assert (book.windows, book.failed, book.kept, choice.failed) == (1, 5, 1, 6)
        assert (empty.windows, empty.kept, empty.cut, empty.columns) == (0, 0, None, {})
        assert [(shard, row) for shard, row, *_ in kept_rows(choice)] == [("shard-00000", 5)]


def test_group_table_states_counts_tokens_and_ranges(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(strength=value / 10, n_tokens=value) for value in (1, 2, 3, 4)]])
    with choose(tmp_path / "scores", STRENGTH, keep=0.5) as choice:
        (group,) = choice.groups
    assert (group.windows, group.tokens, group.kept, group.kept_tokens) == (4, 10, 2, 7)
    assert (group.best, group.cut, group.worst) == (0.4, 0.3, 0.1)
    spread = group.columns["dependency_strength"]
    assert spread.mean == pytest.approx(0.25)
    assert spread.std == pytest.approx(statistics.pstdev([0.1, 0.2, 0.3, 0.4]))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("abcde"), st.integers(1, 12), min_size=1),
    budget=st.integers(1, 5000),
    seed=st.integers(0, 9),
)
def test_budget_takes_the_same_top_share_and_is_never_exceeded(sizes: dict[str, int], budget: int, seed: int) -> None:
    shards = random_shards(seed, sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), shards)
        with choose(Path(folder) / "scores", LONGATTN, budget=budget) as choice:
            kept = {group.group: group.kept for group in choice.groups}
            assert choice.kept_tokens <= budget
            quota = choice.quotas[0]
    rows = [(rank, group, tokens) for group, found in ranking(shards, LONGATTN).items() for _, tokens, _, rank in found]
    rows.sort(key=lambda row: (Fraction(row[0], sizes[row[1]]), row[1]))
    expected, spent = dict.fromkeys(sizes, 0), 0
    for _, group, tokens in rows:
        spent += tokens
        if spent > budget:
            break
        expected[group] += 1
    assert kept == expected
    shares = [(Fraction(kept[group], size), Fraction(1, size)) for group, size in sizes.items()]
    for share, window in shares:
        assert all(abs(share - other) <= max(window, others) for other, others in shares)
    assert quota.shortfall == (budget - quota.kept if kept == sizes else 0)


def test_mix_fills_each_quota_with_the_best_of_its_group(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(group, i / 100) for group in ("a", "b", "c", "d") for i in range(20)]])
    with choose(tmp_path / "scores", STRENGTH, budget=2000, mix={"a": 0.3, "b": 0.2}) as choice:
        assert {g.group: g.kept_tokens for g in choice.groups} == {"a": 600, "b": 400, "c": 500, "d": 500}
        assert [(q.groups, q.tokens, q.shortfall) for q in choice.quotas] == [
            (("a",), 600, 0),
            (("b",), 400, 0),
            (("c", "d"), 1000, 0),
        ]
    with choose(tmp_path / "scores", STRENGTH, keep=0.25, mix={"a": 0.9, "b": 0.1}) as choice:
        assert {g.group: g.kept_tokens for g in choice.groups} == {"a": 1800, "b": 200, "c": 0, "d": 0}


def test_a_quota_that_its_group_cannot_fill_is_reported_not_refilled(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row("a"), *(Row("b") for _ in range(20))]])
    with choose(tmp_path / "scores", LONGATTN, budget=1000, mix={"a": 0.5, "b": 0.4}) as choice:
        assert {g.group: g.kept_tokens for g in choice.groups} == {"a": 100, "b": 400}
        assert [(q.groups, q.shortfall) for q in choice.quotas] == [(("a",), 400), (("b",), 0), ((), 100)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "either --keep"),
        ({"keep": 0.5, "budget": 10}, "either --keep"),
        ({"keep": 0.0}, "--keep is a share"),
        ({"keep": 12.5}, "--keep is a share"),
        ({"keep": math.nan}, "--keep is a share"),
        ({"budget": 0}, "--budget is a number"),
        ({"keep": 0.5, "mix": {"book": 0.6, "web": 0.5}}, "sum to 1.1"),
        ({"keep": 0.5, "mix": {"book": -0.1}}, "book=-0.1"),
        ({"keep": 0.5, "mix": {}}, "names no group"),
        ({"keep": 0.5, "mix": {"bok": 0.5}}, "there is no window: bok. There are: book"),
    ],
    ids=lambda value: str(value),
)
def test_a_request_that_cannot_work_is_refused(tmp_path: Path, request_: dict[str, object], message: str) -> None:
    write_tables(tmp_path, [[Row()]])
    with pytest.raises(UsageError, match=message):
        choose(tmp_path / "scores", LONGATTN, **request_)  # type: ignore[arg-type]


def test_scores_that_are_missing_or_of_another_method_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no scores"):
        choose(tmp_path / "scores", LONGATTN, keep=0.5)
    write_tables(tmp_path, [[Row()]])
    with pytest.raises(OutputError, match="no column cds"):
        choose(tmp_path / "scores", ScoreRule((Term("cds", 1.0),), "none"), keep=0.5)
    (tmp_path / "scores" / "shard-00001.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(OutputError, match="could not be read"):
        choose(tmp_path / "scores", LONGATTN, keep=0.5)


def test_threads_and_runs_do_not_change_a_bit(tmp_path: Path) -> None:
    shards = random_shards(5, {"a": 4000, "b": 3000, "c": 50}, shards=12)
    for s, rows in enumerate(shards):
        for i, row in enumerate(rows):
            row.window_id, row.start, row.ids = f"d{s}-{i // 3}:{i % 3}", i % 3 * 60, [s, i - (i % 7 == 6)]
    write_tables(tmp_path, shards, row_group=97)
    outcomes = []
    for threads in (1, 2, 4, 2):
        request: dict[str, Any] = {"budget": 120_000, "overlap": False, "dedup": "exact", "threads": threads}
        with choose(tmp_path / "scores", LONGATTN, **request) as choice:
            outcomes.append((kept_rows(choice), choice.groups, choice.histograms()))
            assert choice.passed_over > 100 < choice.duplicates
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_histograms_count_every_window_once_and_the_kept_apart(tmp_path: Path) -> None:
    write_tables(tmp_path, random_shards(6, {"a": 40, "b": 25}))
    with choose(tmp_path / "scores", LONGATTN, keep=0.2) as choice:
        histograms = choice.histograms(bins=10)
        for group in choice.groups:
            histogram = histograms[group.group]
            assert sum(histogram.counts) == group.windows
            assert sum(histogram.kept) == group.kept
            assert histogram.low <= (group.worst or 0) <= (group.best or 0) <= histogram.high


def test_a_group_name_is_data_not_sql(tmp_path: Path) -> None:
    name = """x"'; DROP TABLE ranked; --"""
    write_tables(tmp_path, [[Row(group=name), Row(group=name, strength=0.1)]])
    with choose(tmp_path / "scores", LONGATTN, budget=1000, mix={name: 1.0}) as choice:
        assert [window.rank for window in choice.ranked(name, 1, 2)] == [1, 2]
        assert choice.kept == 2


def test_the_whole_ranking_is_written_with_the_place_of_every_window(tmp_path: Path) -> None:
    rows = [Row("ab"[i % 2], i / 9) for i in range(7)]
    write_tables(tmp_path, [rows[:3], [], [Row("a", None, status="failed"), *rows[3:]]])
    with choose(tmp_path / "scores", STRENGTH, keep=0.5) as choice:
        choice.write_ranking(tmp_path / "ranking.parquet")
        kept = {(shard, row): (score, rank) for shard, row, _, score, rank in kept_rows(choice)}
    written = {(row["shard"], row["row"]): row for row in pq.read_table(tmp_path / "ranking.parquet").to_pylist()}
    scores = {path.stem: pq.read_table(path).to_pylist() for path in parquet_files(tmp_path / "scores")}
    assert set(written) == {(shard, row) for shard, table in scores.items() for row in range(len(table))}
    assert {place: (row["score"], row["rank"]) for place, row in written.items() if row["kept"]} == kept
    for (shard, row), line in written.items():
        assert [line[name] for name in ("window_id", "group", "n_tokens")] == [
            scores[shard][row][name] for name in ("window_id", "group", "n_tokens")
        ]
        assert line["score"] == scores[shard][row]["dependency_strength"]
    assert [line["rank"] for line in written.values() if line["score"] is None] == [None]


def test_closing_removes_the_ranking_from_disk(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row()]])
    before = set(tmp_path.rglob("*"))
    with choose(tmp_path / "scores", LONGATTN, keep=0.5) as choice:
        kept_rows(choice)
        assert set(tmp_path.rglob("*")) - before
    with pytest.raises(UsageError):
        choose(tmp_path / "scores", LONGATTN, keep=0.5, mix={"nobody": 1.0})
    assert set(tmp_path.rglob("*")) == before


def test_the_ranking_of_a_killed_process_is_removed_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row()]])
    code = (
        "import os, sys; from pathlib import Path; from longsift.selection import *\n"
        "choose(Path(sys.argv[1]), ScoreRule((Term('variance', 1.0),), 'none'), keep=1.0)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "scores"], check=False)
    (killed,) = tmp_path.glob(".selection-*")
    with choose(tmp_path / "scores", LONGATTN, keep=0.5) as running:
        assert not killed.exists()
        with choose(tmp_path / "scores", LONGATTN, keep=0.5) as other:
            assert kept_rows(running) == kept_rows(other)
    assert not list(tmp_path.glob(".selection-*"))


@pytest.mark.parametrize(
    ("memory", "file_size"),
    [pytest.param("30MB", 1 << 20, id="full-disk"), pytest.param("2MB", None, id="too-little-memory")],
)
def test_a_ranking_without_room_names_the_folder_and_what_to_do(
    memory: str, file_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 400_000
    random = np.random.default_rng(0)
    columns = {
        "window_id": [f"{i}:{value}" for i, value in enumerate(random.random(rows))],
        "doc_id": [str(i) for i in range(rows)],
        "group": ["a"] * rows,
        "start": [0] * rows,
        "n_tokens": [1] * rows,
        "status": ["ok"] * rows,
        "dependency_strength": random.random(rows),
    }
    (tmp_path / "scores").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "scores" / "00000.parquet")
    monkeypatch.setattr(selection, "_MEMORY", memory)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size or before[0], before[1]))
    try:
        with pytest.raises(OutputError, match=rf"no room to rank the windows in {tmp_path}, .* 230 bytes a window"):
            choose(tmp_path / "scores", STRENGTH, keep=0.5, overlap=False, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob(".selection-*"))


def test_a_table_in_memory_is_ranked_as_one_on_disk(tmp_path: Path) -> None:
    write_tables(tmp_path, random_shards(8, {"a": 20, "b": 11}, shards=1))
    table = pq.read_table(tmp_path / "scores")
    with choose(tmp_path / "scores", LONGATTN, keep=0.3) as choice:
        expected = {window_id: (score, rank) for _, _, window_id, score, rank in kept_rows(choice)}
    kept = select_table(table, LONGATTN, keep=0.3)
    assert {row["window_id"]: (row["score"], row["rank"]) for row in kept.to_pylist()} == expected
    assert kept["rank"].to_pylist() == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert len(select_table(table, LONGATTN, budget=1)) == 0
