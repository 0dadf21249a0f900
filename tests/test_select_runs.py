"""Selecting from runs: what the score files hold for it, through the command line."""

from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longsift.shards import RunFolder
from test_pipeline import as_json, longsift, table


@pytest.fixture(scope="module")
def scored(corpus, model, tmp_path_factory) -> Path:
    """A scored LongAttn run, with shards of a few windows."""
    out = tmp_path_factory.mktemp("scored") / "out"
    flags = ["--model", model, "--method", "longattn", "--window", 512, "--shard-tokens", 4096]
    longsift("score", corpus, "-o", out, *flags, "-q")
    return out


def test_scores_tell_where_a_window_starts_and_whether_it_has_the_ids_of_another(scored):
    windows, scores = table(scored / "windows"), table(scored / "scores")
    assert scores["start"].to_pylist() == windows["start"].to_pylist()
    assert len(set(scores["start"].to_pylist())) > 3
    hashes = [
        hashlib.blake2b(np.array(ids, "<i4").tobytes(), digest_size=16).digest()
        for ids in windows["input_ids"].to_pylist()
    ]
    assert scores["ids_hash"].to_pylist() == hashes


def selected(out: Path, *flags: object) -> dict:
    return as_json(longsift("select", out, *flags, "--json"))


def overlaps(rows: list[dict]) -> int:
    """Pairs of windows of one document that share tokens; a window has 512, of which one is special."""
    by_document: dict[str, list[int]] = {}
    for row in rows:
        by_document.setdefault(row["doc_id"], []).append(row["start"])
    return sum(b - a < 511 for starts in map(sorted, by_document.values()) for a, b in pairwise(starts))


def starts_of(scored: Path) -> dict[str, int]:
    scores = table(scored / "scores")
    return dict(zip(scores["window_id"].to_pylist(), scores["start"].to_pylist(), strict=True))


@pytest.fixture
def run(scored, tmp_path) -> Path:
    """A copy of the scored run, to be spoilt."""
    return Path(shutil.copytree(scored, tmp_path / "run"))


def test_overlapping_windows_are_selected_only_where_they_are_asked_for_or_needed(run):
    def kept(*flags: object) -> tuple[dict, list[dict]]:
        result, starts = selected(run, *flags), starts_of(run)
        return result, [row | {"start": starts[row["window_id"]]} for row in table(run / "selected").to_pylist()]

    apart, rows = kept("--keep", 0.5)
    assert len(rows) == apart["kept"]
    assert overlaps(rows) == apart["overlapping"] == 0
    assert apart["passed_over"] > 0
    alike, rows = kept("--keep", 0.5, "--overlap")
    assert (alike["kept"], alike["passed_over"], alike["overlapping"]) == (apart["kept"], 0, 0)
    assert overlaps(rows) > 0
    everything, rows = kept("--keep", 1)
    assert everything["kept"] == everything["of"] == len(rows)
    assert everything["overlapping"] > 0 == everything["passed_over"]
    manifest = RunFolder(run).manifest()["selected"]
    assert manifest["result"] == everything
    assert (manifest["identity"]["overlap"], manifest["identity"]["dedup"]) == (False, None)


def test_what_a_budget_bought_is_told_by_group(run):
    result = selected(run, "--budget", 20 * 512, "--mix", "code=0.25")
    assert [quota["groups"] for quota in result["quotas"]] == ["code", "mixed"]
    assert [quota["tokens"] for quota in result["quotas"]] == [5 * 512, 15 * 512]
    groups = {group["group"]: group for group in result["groups"]}
    assert sum(group["kept_tokens"] for group in groups.values()) == result["kept_tokens"] <= 20 * 512
    for group in groups.values():
        assert group["share"] == group["kept"] / group["windows"]
        assert group["mix"] == group["kept_tokens"] / result["kept_tokens"]
        assert group["tokens"] == 512 * group["windows"]


def test_windows_with_the_same_ids_are_selected_once(scored, model, tmp_path):
    ids = table(scored / "windows")["input_ids"].to_pylist()[:6]
    rows = [{"id": f"d{i:02}", "input_ids": ids[i % 6]} for i in range(15)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ids.parquet")
    out = tmp_path / "out"
    longsift("score", tmp_path / "ids.parquet", "-o", out, "--model", model, "--method", "longattn", "-q")
    assert selected(out, "--keep", 1)["kept"] == 15
    result = selected(out, "--keep", 1, "--dedup", "exact")
    assert (result["kept"], result["of"], result["duplicates"]) == (6, 6, 9)
    assert sorted(table(out / "selected")["doc_id"].to_pylist()) == [f"d{i:02}" for i in range(6)]


def test_ids_and_scores_are_selected_from_the_scores_alone(run):
    selected(run, "--keep", 0.5)
    longsift("report", run)
    whole = table(run / "selected")
    shutil.rmtree(run / "windows")
    selected(run, "--keep", 0.5, "--no-text", "--no-ids")
    columns = ["window_id", "doc_id", "group", "n_tokens", "score", "rank"]
    assert table(run / "selected").to_pylist() == whole.select(columns).to_pylist()
    assert not (run / "report.html").exists()  # it showed another selection, and needs the windows


def test_a_run_of_an_earlier_version_is_selected_from(run):
    expected = selected(run, "--keep", 0.5)
    for path in (run / "scores").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["start", "ids_hash"]), path)
    assert selected(run, "--keep", 0.5) == expected
    longsift("select", run, "--dedup", "exact", code=1)
    shutil.rmtree(run / "windows")
    assert "Select with --overlap" in longsift("select", run, "--no-text", "--no-ids", code=1)
    assert selected(run, "--no-text", "--no-ids", "--overlap", "--keep", 0.5)["kept"] == expected["kept"]
