"""Pages of Parquet and record batches of Arrow that are too large to be held give the rows that small ones give."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longsift import bodies, columnar, pages
from longsift.documents import BadRow, Document
from longsift.errors import InputError
from test_documents import bad, read, texts

ODD_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.one_of(
                st.none(),
                st.sampled_from(["", " ", "the same text", "nul\0"]),
                st.text(max_size=30),
                st.builds(
                    lambda words, times: " ".join(words) * times, st.lists(st.text(max_size=4)), st.integers(0, 60)
                ),
            ),
            "id": st.one_of(st.none(), st.text(max_size=3)),
            "n": st.one_of(st.none(), st.integers(0, 5)),
            "flag": st.booleans(),
            "tags": st.lists(st.text(max_size=3), max_size=3),
            "meta": st.fixed_dictionaries(
                {"body": st.text(max_size=9), "ids": st.lists(st.integers(0, 9), max_size=3)}
            ),
            "input_ids": st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=40)),
        }
    ),
    max_size=40,
)
ODD_SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "id": pa.large_string(),
        "n": pa.int64(),
        "flag": pa.bool_(),
        "tags": pa.list_(pa.string()),
        "meta": pa.struct({"body": pa.string(), "ids": pa.list_(pa.int32())}),
        "input_ids": pa.large_list(pa.int32()),
    }
)
LIMIT = 300  # bytes of a row
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def told(rows: list[Document | BadRow]) -> list[object]:
    """What has to be the same however a file is read; an excerpt tells the size of a row in one way or the other."""
    return [
        (row.row, row.reason)
        if isinstance(row, BadRow)
        else (
            row.row,
            row.doc_id,
            row.text,
            row.group,
            row.metadata,
            None if row.input_ids is None else [*row.input_ids],
        )
        for row in rows
    ]


def as_if_large(path: Path) -> list[Document | BadRow]:
    """Read a file as one is whose pages and batches are too large to be held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columnar, "_PAGE_BYTES", 0)
        patch.setattr(columnar, "_GROUP_BYTES", 0)
        patch.setattr(columnar, "_READ_BYTES", 64)
        patch.setattr(bodies, "_LARGE_BYTES", 0)
        patch.setattr(pages, "_READ_BYTES", 50)
        patch.setattr(pages, "_SPOOL_BYTES", 100)
        return read(path, max_document_bytes=LIMIT)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_large_parquet_pages_give_the_same_rows(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "x.parquet"

    @FEW
    @given(ODD_ROWS, st.booleans(), st.sampled_from(["1.0", "2.0"]), st.sampled_from([1, 500, 1 << 20]), st.booleans())
    def run(rows: list[dict[str, object]], dictionary: bool, version: str, page: int, nullable: bool) -> None:
        schema = ODD_SCHEMA
        if not nullable:
            rows = [row | {"text": row["text"] or "-"} for row in rows]
            schema = schema.set(0, pa.field("text", pa.string(), nullable=False))
        pq.write_table(
            pa.Table.from_pylist(rows, schema),
            path,
            compression=codec,
            use_dictionary=dictionary,
            data_page_version=version,
            data_page_size=page,
            dictionary_pagesize_limit=page,
            write_batch_size=7,
            row_group_size=15,
        )
        assert told(as_if_large(path)) == told(read(path, max_document_bytes=LIMIT))

    run()


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_large_arrow_batches_give_the_same_rows(tmp_path: Path, compression: str | None) -> None:
    path = tmp_path / "x.arrow"

    @FEW
    @given(ODD_ROWS, st.booleans())
    def run(rows: list[dict[str, object]], dictionary: bool) -> None:
        table = pa.Table.from_pylist(rows, ODD_SCHEMA)
        if dictionary:
            table = table.set_column(1, "id", table["id"].dictionary_encode())
        with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
            stream.write_table(table, max_chunksize=15)
        assert told(as_if_large(path)) == told(read(path, max_document_bytes=LIMIT))

    run()


DAMAGED_ROWS = [
    {
        "text": f"text {i % 9} " + "word " * (i % 7) if i % 5 else None,
        "id": f"d{i}",
        "n": i,
        "flag": True,
        "tags": ["a"],
    }
    | {"meta": {"body": "b", "ids": [i]}, "input_ids": None if i % 5 else [i, 5]}
    for i in range(40)
]


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("parquet", "none"), ("parquet", "snappy"), ("parquet", "zstd"), ("arrow", "none"), ("arrow", "zstd")],
)
def test_every_row_of_damaged_large_pages_and_batches_is_a_document_or_a_bad_row(
    tmp_path: Path, ending: str, codec: str
) -> None:
    path = tmp_path / f"x.{ending}"
    table = pa.Table.from_pylist(DAMAGED_ROWS, ODD_SCHEMA)
    if ending == "parquet":
        pq.write_table(table, path, row_group_size=15, compression=codec)
    else:
        options = pa.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
        with pa.ipc.new_stream(path, table.schema, options=options) as stream:
            stream.write_table(table, max_chunksize=15)
    whole = path.read_bytes()

    @FEW
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.binary(max_size=3)), min_size=1, max_size=4))
    def run(changes: list[tuple[int, bytes]]) -> None:
        data = bytearray(whole)
        for place, change in changes:
            data[place : place + len(change)] = change
            if not change:
                del data[place : place + 7]
        path.write_bytes(data)
        rows = as_if_large(path)
        if [row.row for row in rows] == [None]:
            return
        seen: list[int] = []
        for row in rows:
            assert row.row is not None
            lost = re.match(r"rows (\d+) to (\d+) are lost", row.excerpt) if isinstance(row, BadRow) else None
            seen += range(int(lost[1]), int(lost[2]) + 1) if lost else [row.row]
        assert seen == list(range(len(seen)))

    run()


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_of_large_pages_and_batches_only_the_rows_that_are_too_long_are_set_aside(tmp_path: Path, ending: str) -> None:
    table = pa.table({"text": ["first", "long " * 100, "last"], "n": [1, 2, 3]})
    path = tmp_path / f"x.{ending}"
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    rows = as_if_large(path)
    assert texts(rows) == ["first", "last"]
    assert bad(rows) == [(1, "longer than 300 bytes")]
    assert isinstance(rows[1], BadRow)
    assert rows[1].excerpt in ("500 bytes", "508 bytes")


def test_pages_that_only_pyarrow_reads_are_set_aside_where_they_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts_ = ["short", "long " * 1000, "short too"]
    table = pa.table({"data": [{"body": text} for text in texts_], "n": range(3)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    monkeypatch.setattr(columnar, "_PAGE_BYTES", 1000)
    monkeypatch.setattr(columnar, "_HELD_BYTES", 2000)
    rows = read(tmp_path, text_key="data.body")
    assert texts(rows) == ["short", "short too"]
    assert bad(rows) == [(1, "parquet pages too large")]
    assert isinstance(rows[1], BadRow)
    assert rows[1].excerpt == (
        "rows 1 to 1 are lost: a page of the column data.body takes 5,004 bytes. "
        "Write the file with fewer rows in a row group"
    )


def test_a_dictionary_that_finds_no_room_on_the_disk_is_an_error_not_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": ["a" * 200, "b" * 200]}), tmp_path / "x.parquet")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="set TMPDIR"):
        as_if_large(tmp_path / "x.parquet")
