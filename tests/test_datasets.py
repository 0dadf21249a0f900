from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

import longsift.datasets
from longsift.datasets import Written, write_dataset
from longsift.errors import OutputError, UsageError
from longsift.selection import choose
from made_tables import LONGATTN, STRENGTH, Row, write_tables

CARD: dict[str, Any] = {
    "method": "longattn",
    "parameters": {"alpha": 0.5},
    "model": "org/model",
    "revision": "0123abc",
    "window": 32768,
    "group_by": "meta.source",
    "citation": "Wu et al. LongAttn. arXiv:2502.16860",
}


def select(out: Path, keep: float = 1.0, **options: Any) -> Written:
    with choose(out / "scores", STRENGTH, keep=keep) as choice:
        return write_dataset(choice, out / "windows", out, card=CARD, **options)


def parquet_rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((out / "selected").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def jsonl_rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in sorted((out / "selected").glob("*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return rows


def loaded(out: Path, cache: Path) -> Any:
    import datasets

    return datasets.load_dataset(str(out / "selected"), cache_dir=str(cache))["train"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_kept_rows_come_in_the_order_of_the_windows_table_with_all_columns(tmp_path: Path) -> None:
    shards = [
        [Row("a", 0.1), Row("b", 0.9, text="β" * 3, metadata={"url": "u1"}), Row("a", 0.5)],
        [Row("b", 0.2), Row("a", 0.8, text=None)],
    ]
    write_tables(tmp_path, shards, row_group=2)
    written = select(tmp_path, keep=0.5)
    assert (written.rows, written.tokens, len(written.files)) == (3, 300, 1)
    assert parquet_rows(tmp_path) == [
        {"window_id": "d0-1:0", "doc_id": "d0-1", "group": "b", "n_tokens": 100, "score": 0.9, "rank": 1,
         "text": "βββ", "input_ids": [0, 1], "url": "u1"},
        {"window_id": "d0-2:0", "doc_id": "d0-2", "group": "a", "n_tokens": 100, "score": 0.5, "rank": 2,
         "text": "once upon a time", "input_ids": [0, 2], "url": None},
        {"window_id": "d1-1:0", "doc_id": "d1-1", "group": "a", "n_tokens": 100, "score": 0.8, "rank": 1,
         "text": None, "input_ids": [1, 1], "url": None},
    ]  # fmt: skip


def test_both_formats_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [Row("g", i / 9, metadata={"n": i, "tags": ["x"] * i, "meta": {"lang": "fr"}}) for i in range(9)]
    write_tables(tmp_path, [rows[:4], rows[4:]])
    select(tmp_path, keep=0.5)
    from_parquet = parquet_rows(tmp_path)
    written = select(tmp_path, keep=0.5, format="jsonl")
    assert [name.partition("-00000.")[2] for name in written.files] == ["jsonl.zst"]
    assert jsonl_rows(tmp_path) == from_parquet
    assert not list((tmp_path / "selected").glob("*.parquet"))


@pytest.mark.parametrize("left_out", ["text", "input_ids"])
def test_text_or_ids_can_be_left_out(tmp_path: Path, left_out: str) -> None:
    write_tables(tmp_path, [[Row(metadata={"text": "kept apart"})]])
    select(tmp_path, **{left_out: False})
    (row,) = parquet_rows(tmp_path)
    own = ["window_id", "doc_id", "group", "n_tokens", "score", "rank", "text", "input_ids", "doc_text"]
    assert list(row) == [name for name in own if name != left_out]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_without_text_and_ids_the_scores_alone_are_needed(tmp_path: Path, format: str) -> None:
    rows = [Row("ab"[i % 2], i / 9, start=i, metadata={"url": "u"}) for i in range(9)]
    write_tables(tmp_path, [rows[:4], rows[4:]], row_group=2)
    select(tmp_path, keep=0.5)
    whole = parquet_rows(tmp_path)
    shutil.rmtree(tmp_path / "windows")
    written = select(tmp_path, keep=0.5, text=False, input_ids=False, format=format)
    names = ["window_id", "doc_id", "group", "n_tokens", "score", "rank"]
    found = parquet_rows(tmp_path) if format == "parquet" else jsonl_rows(tmp_path)
    assert found == [{name: row[name] for name in names} for row in whole]
    assert (written.rows, written.tokens) == (5, 500)


def test_only_row_groups_with_kept_windows_are_read_and_their_texts_and_ids_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strengths = [[0.9, 0.1, 0.1, 0.1, 0.8, 0.1], [0.1] * 6, [0.1, 0.1, 0.7, 0.1, 0.1, 0.1]]
    write_tables(tmp_path, [[Row(strength=strength) for strength in shard] for shard in strengths], row_group=2)
    reads: Counter[tuple[str, int, str]] = Counter()

    class Noted(pq.ParquetFile):
        def __init__(self, path: Path, **options: Any) -> None:
            super().__init__(path, **options)
            self.path = path

        def iter_batches(self, *, row_groups: list[int] | None = None, columns: Any = None, **options: Any) -> Any:
            if self.path.parent.name == "windows":
                reads.update((self.path.stem, group, name) for group in row_groups or [] for name in columns)
            return super().iter_batches(row_groups=row_groups, columns=columns, **options)

    monkeypatch.setattr(pq, "ParquetFile", Noted)
    select(tmp_path, keep=0.15)
    assert {(row["window_id"]) for row in parquet_rows(tmp_path)} == {"d0-0:0", "d0-4:0", "d2-2:0"}
    groups = {("shard-00000", 0), ("shard-00000", 2), ("shard-00002", 1)}
    assert {(shard, group) for shard, group, _ in reads} == groups
    assert {reads[*group, name] for group in groups for name in ("text", "input_ids")} == {1}


@pytest.mark.parametrize(
    ("values", "type_", "stored"),
    [
        ([1, 2], pa.int64(), [1, 2]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**60, 1], pa.int64(), [2**60, 1]),
        ([2**60, 1.5], pa.string(), [str(2**60), "1.5"]),
        ([2**70, 1], pa.string(), [str(2**70), "1"]),
        ([1, "x"], pa.string(), ["1", '"x"']),
        ([True, 1], pa.string(), ["true", "1"]),
        ([None, True], pa.bool_(), [None, True]),
        ([None, None], pa.string(), [None, None]),
        ([[], [1]], pa.list_(pa.int64()), [[], [1]]),
        ([[1], ["x"]], pa.string(), ["[1]", '["x"]']),
        ([{}, {}], pa.string(), ["{}", "{}"]),
        (
            [{"a": 1}, {"b": [{"c": "é"}]}],
            pa.struct([("a", pa.int64()), ("b", pa.list_(pa.struct([("c", pa.string())])))]),
            [{"a": 1, "b": None}, {"a": None, "b": [{"c": "é"}]}],
        ),
        ([{"a": 1}, "x"], pa.string(), ['{"a": 1}', '"x"']),
        (
            [{str(i): i for i in range(300)}, None],
            pa.string(),
            [json.dumps({str(i): i for i in range(300)}), None],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_columns_have_the_narrowest_type_that_holds_all_values(
    tmp_path: Path, values: list[Any], type_: pa.DataType, stored: list[Any]
) -> None:
    rows = [Row(metadata={"key": value}) for value in values]
    write_tables(tmp_path, [rows[:1], rows[1:]])
    select(tmp_path)
    table = pq.read_table(next((tmp_path / "selected").glob("part-*-00000.parquet")))
    assert table.column("key").to_pylist() == stored
    assert table.schema.field("key").type == type_


def test_a_metadata_key_with_the_name_of_a_column_gets_a_prefix(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(metadata={"score": 7, "doc_score": 8, "id": "x", "doc_id": "y"})]])
    for format, rows in (("parquet", parquet_rows), ("jsonl", jsonl_rows)):
        select(tmp_path, format=format)
        (row,) = rows(tmp_path)
        assert row["score"] == 0.5
        assert {key: row[key] for key in ("doc_doc_score", "doc_score", "id", "doc_doc_id")} == {
            "doc_doc_score": 7, "doc_score": 8, "id": "x", "doc_doc_id": "y",
        }  # fmt: skip


def test_metadata_that_no_reader_takes_is_made_readable(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(metadata='{"x": NaN, "y": "half \\ud83d", "z": "\\ud83d\\ude00"}')]])
    for format, rows in (("parquet", parquet_rows), ("jsonl", jsonl_rows)):
        select(tmp_path, format=format)
        (row,) = rows(tmp_path)
        assert (row["x"], row["y"], row["z"]) == (None, "half ?", "😀")


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_load_dataset_reads_the_folder_unchanged(tmp_path: Path, format: str) -> None:
    rows = [Row("g", i / 500, text="x" * 50_000, metadata={"late": None, "a": 1}) for i in range(500)]
    rows += [Row(metadata={"late": {"deep": [[1], [2]]}, "a": 1.5, "only": ["last"], "mixed": 1, "n": [{"k": 1}]})]
    rows += [Row(text="\x00\u2028\x85 line", metadata={"mixed": "x"})]
    write_tables(tmp_path, [rows])
    select(tmp_path, format=format)
    data = loaded(tmp_path, tmp_path / "cache")
    assert len(data) == 502
    assert data[500]["late"] == {"deep": [[1], [2]]}
    assert (data[500]["only"], data[500]["mixed"], data[500]["a"], data[500]["n"]) == (
        ["last"],
        "1",
        1.5,
        [{"k": 1}],
    )
    assert data[501]["text"] == "\x00\u2028\x85 line"
    assert data[0]["only"] is None
    assert data[3]["input_ids"] == [0, 3]
    assert str(data.features["input_ids"]) == "List(Value('int32'))"


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_an_empty_selection_is_an_empty_data_set(tmp_path: Path, format: str) -> None:
    write_tables(tmp_path, [[Row(status="failed", strength=None)]])
    written = select(tmp_path, format=format)
    assert (written.rows, len(written.files)) == (0, 1)
    assert (parquet_rows if format == "parquet" else jsonl_rows)(tmp_path) == []


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_large_selection_is_rolled_into_parts_in_order(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longsift.datasets, "_PART_BYTES", 100_000)
    monkeypatch.setattr(longsift.datasets, "_ROW_GROUP_BYTES", 100_000)
    noise = [os.urandom(20_000).hex() for _ in range(40)]
    shards = [[Row(text=text) for text in noise[:25]], [Row(text=text) for text in noise[25:]]]
    write_tables(tmp_path, shards, row_group=4)
    written = select(tmp_path, format=format)
    assert len(written.files) > 3
    assert [row["text"] for row in (parquet_rows if format == "parquet" else jsonl_rows)(tmp_path)] == noise
    assert len(loaded(tmp_path, tmp_path / "cache")) == 40


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_the_same_selection_has_the_same_bytes(tmp_path: Path, format: str) -> None:
    write_tables(tmp_path, [[Row("g", i / 70, metadata={"i": i}) for i in range(70)]], row_group=9)

    def contents() -> dict[str, bytes]:
        select(tmp_path, keep=0.3, format=format)
        return {path.name: path.read_bytes() for path in (tmp_path / "selected").iterdir()}

    assert contents() == contents()


def test_a_failure_leaves_the_older_selection_as_it_was(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row("g", i / 9) for i in range(9)]])
    select(tmp_path, keep=0.3)
    before = parquet_rows(tmp_path)
    other = tmp_path / "other"
    write_tables(other, [[Row(window_id=f"other:{i}") for i in range(9)]])
    for windows, message in ((other / "windows", "does not hold"), (tmp_path / "none", "cannot be read")):
        with (
            choose(tmp_path / "scores", LONGATTN, keep=0.5) as choice,
            pytest.raises(OutputError, match=message),
        ):
            write_dataset(choice, windows, tmp_path, card=CARD)
    with pytest.raises(UsageError, match="parquet or jsonl"):
        select(tmp_path, format="csv")
    assert parquet_rows(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "scores", "selected", "windows"]


def test_windows_with_fewer_rows_than_the_scores_are_refused(tmp_path: Path) -> None:
    write_tables(tmp_path, [[Row(), Row()]])
    path = tmp_path / "windows" / "shard-00000.parquet"
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    with pytest.raises(OutputError, match="does not hold the windows that were scored"):
        select(tmp_path)


def test_the_card_states_what_was_done(tmp_path: Path) -> None:
    write_tables(tmp_path, [[*(Row("arxiv|x\n<b>", i / 4) for i in range(4)), Row(status="failed")]])
    with choose(tmp_path / "scores", LONGATTN, budget=250, mix={"arxiv|x\n<b>": 1.0}) as choice:
        write_dataset(choice, tmp_path / "windows", tmp_path, card=CARD)
    card = (tmp_path / "selected" / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(io.StringIO(front))
    assert matter["tags"] == ["long-context", "longsift"]
    assert matter["size_categories"] == ["n<1K"]
    assert "license" not in matter
    for fact in (
        "org/model",
        "0123abc",
        "alpha=0.5",
        "32768",
        "250 tokens",
        "Z(dependency_strength) − 0.5·Z(variance)",
    ):
        assert fact in body
    assert "| arxiv\\|x &lt;b> | 4 | 400 | 2 | 200 |" in body
    assert "arXiv:2502.16860" in body
    assert "1 windows could not be measured" in body
