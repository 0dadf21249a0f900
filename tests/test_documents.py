"""What rows become: documents, or bad rows with a reason; and that damage takes nothing else with it."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from longsift.documents import BadRow, Document, ReadOptions, find_sources, read_documents
from longsift.errors import InputError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": lambda data: data,
    "jsonl.gz": gzip.compress,
    "jsonl.zst": zstandard.compress,
}


def read(path: Path | str, **options: Any) -> list[Document | BadRow]:
    return [row for source in find_sources([str(path)]) for row in read_documents(source, ReadOptions(**options))]


def read_bytes(folder: Path, data: bytes, ending: str = "jsonl", **options: Any) -> list[Document | BadRow]:
    path = folder / f"x.{ending}"
    path.write_bytes(data)
    return read(path, **options)


def read_row(folder: Path, row: object, **options: Any) -> Document | BadRow:
    [result] = read_bytes(folder, json.dumps(row).encode(), **options)
    return result


def document(row: Document | BadRow) -> Document:
    assert isinstance(row, Document), row
    return row


def texts(rows: list[Document | BadRow]) -> list[str | None]:
    return [row.text for row in rows if isinstance(row, Document)]


def bad(rows: list[Document | BadRow]) -> list[tuple[int | None, str]]:
    return [(row.row, row.reason) for row in rows if isinstance(row, BadRow)]


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# --- formats ---


@pytest.fixture(params=["jsonl", "json.gz", "ndjson.zst", "parquet", "save_to_disk"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same 70 rows in every format."""
    rows = [{"text": f"text {i} \u00e9\U0001f600\r\n", "id": f"d{i}", "source": "web", "n": i} for i in range(70)]
    if request.param == "save_to_disk":
        Dataset.from_list(rows).save_to_disk(tmp_path / "x", num_shards=2)
        return tmp_path / "x"
    path = tmp_path / f"x.{request.param}"
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=30)
    else:
        pack = PACK["jsonl" + path.suffix.replace(".jsonl", "")]
        path.write_bytes(pack(lines(*rows)))
    return path


def test_every_format_gives_the_same_documents(corpus: Path) -> None:
    rows = [document(row) for row in read(corpus)]
    assert [row.text for row in rows] == [f"text {i} \u00e9\U0001f600\r\n" for i in range(70)]
    assert [row.doc_id for row in rows] == [f"d{i}" for i in range(70)]
    assert {row.group for row in rows} == {"web"}
    assert [row.metadata for row in rows] == [{"source": "web", "n": i} for i in range(70)]
    assert all(Path(row.file).is_relative_to(corpus) for row in rows)


def test_every_byte_of_a_file_is_reported_as_it_is_read(corpus: Path) -> None:
    for source in find_sources([str(corpus)]):
        reported: list[int] = []
        list(read_documents(source, ReadOptions(), reported.append))
        slack = 70_000 if source.format == "parquet" else 0  # its footer is read apart
        assert source.size <= sum(reported) <= source.size + slack


def test_rows_are_numbered_across_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{i}" for i in range(50)]}), tmp_path / "x.parquet", row_group_size=20)
    assert [row.doc_id for row in map(document, read(tmp_path))] == [f"x:{i}" for i in range(50)]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("jsonl.gz", gzip.compress), ("jsonl.zst", zstandard.compress)],
    ids=["gzip members", "zstd frames"],
)
def test_a_file_of_several_streams_is_read_whole(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    data = lines({"text": "a"}, {"text": "b"}, {"text": "c"})
    packed = pack(data[:5]) + pack(b"") + pack(data[5:20]) + pack(data[20:])
    assert texts(read_bytes(tmp_path, packed, ending)) == ["a", "b", "c"]


def test_skippable_zstd_frames_and_gzip_padding_are_passed_over(tmp_path: Path) -> None:
    skippable = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"seek"
    packed = skippable + zstandard.compress(lines({"text": "a"})) + skippable
    assert texts(read_bytes(tmp_path, packed, "jsonl.zst")) == ["a"]
    padded = gzip.compress(lines({"text": "a"})) + b"\0" * 512
    assert texts(rows := read_bytes(tmp_path, padded, "jsonl.gz")) == ["a"]
    assert bad(rows) == []


def test_zstd_with_a_two_gigabyte_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(lines({"text": "a"})) + compressor.flush()
    assert texts(read_bytes(tmp_path, packed, "jsonl.zst")) == ["a"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'\xef\xbb\xbf{"text": "a"}\n', ["a"]),
        (b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
        (b'{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        ('{"text": "a\u2028b\u0085c"}'.encode(), ["a\u2028b\u0085c"]),
        (b"", []),
        (b"\n\n", []),
    ],
    ids=["byte order mark", "CRLF", "no last newline", "unicode line separators", "empty file", "blank lines"],
)
def test_lines_end_at_newlines_only(tmp_path: Path, data: bytes, expected: list[str]) -> None:
    assert texts(rows := read_bytes(tmp_path, data)) == expected
    assert bad(rows) == []


def test_blank_lines_count_as_rows(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, b'\n{"text": "a"}\n  \nbroken\n')
    assert [row.row for row in rows] == [1, 3]


# --- ids, groups, metadata ---


@pytest.mark.parametrize(
    ("given_id", "expected"),
    [("a", "a"), (7, "7"), (None, "x:0"), ("", "x:0"), ("\u00e9", "\u00e9")],
    ids=["string", "integer", "null", "empty", "unicode"],
)
def test_the_id_is_the_rows_own_or_made_from_file_and_row(tmp_path: Path, given_id: object, expected: str) -> None:
    assert document(read_row(tmp_path, {"text": "t", "id": given_id})).doc_id == expected


def test_ids_made_from_rows_differ_between_folders(tmp_path: Path) -> None:
    for language in ("de", "en"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "part.jsonl").write_bytes(lines({"text": "t"}))
    assert [document(row).doc_id for row in read(tmp_path)] == ["de/part:0", "en/part:0"]


def test_dotted_keys_reach_into_objects(tmp_path: Path) -> None:
    row = {"data": {"body": "t", "lang": "en"}, "meta": {"key": 5, "set": {"name": "books"}}}
    options = {"text_key": "data.body", "id_key": "meta.key", "group_by": "meta.set.name"}
    result = document(read_row(tmp_path, row, **options))
    assert (result.text, result.doc_id, result.group) == ("t", "5", "books")
    assert result.metadata == {"data": {"lang": "en"}, "meta": {"set": {"name": "books"}}}


def test_a_literal_key_with_a_dot_wins(tmp_path: Path) -> None:
    row = {"a.b": "literal", "a": {"b": "nested"}}
    result = document(read_row(tmp_path, row, text_key="a.b"))
    assert (result.text, result.metadata) == ("literal", {"a": {"b": "nested"}})


@pytest.mark.parametrize(
    ("row", "group_by", "expected"),
    [
        ({"source": "web"}, None, "web"),
        ({}, None, "all"),
        ({"source": {"url": "u"}}, None, "all"),
        ({"source": "web", "year": 1999}, "year", "1999"),
    ],
    ids=["source column", "no column", "source is no string", "explicit column"],
)
def test_the_group_of_a_row(tmp_path: Path, row: dict[str, object], group_by: str | None, expected: str) -> None:
    result = document(read_row(tmp_path, {"text": "t", **row}, group_by=group_by))
    assert result.group == expected
    assert result.metadata == row


def test_metadata_is_always_valid_json(tmp_path: Path) -> None:
    data = rb'{"text": "t", "a": NaN, "b": [1e999, -Infinity, 1.5], "c": {"\ud800k": "x\ud800"}, "d": 1' + b"0" * 50
    metadata = document(read_bytes(tmp_path, data + b"}")[0]).metadata
    assert metadata == {"a": None, "b": [None, None, 1.5], "c": {"?k": "x?"}, "d": 10**50}
    json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()


def test_parquet_types_become_json(tmp_path: Path) -> None:
    row = {"text": "t", "day": date(2024, 2, 29), "price": Decimal("1.50"), "raw": b"\xff\0", "nan": math.nan}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    metadata = document(read(tmp_path)[0]).metadata
    assert metadata == {"day": "2024-02-29", "price": "1.50", "raw": "/wA=", "nan": None}


def test_tab_ids_are_read_from_before_the_tab(tmp_path: Path) -> None:
    data = b'a-1\t{"text": "a\\tb", "id": "other"}\n{"text": "no tab"}\n'
    rows = read_bytes(tmp_path, data, tab_ids=True)
    assert (document(rows[0]).doc_id, texts(rows)) == ("a-1", ["a\tb"])
    assert bad(rows) == [(1, "no tab between id and JSON")]


# --- rows of token ids ---


@pytest.mark.parametrize("text", ["the text", None, ""], ids=["with text", "null text", "empty text"])
def test_a_row_of_token_ids_is_a_document(tmp_path: Path, text: str | None) -> None:
    result = document(read_row(tmp_path, {"input_ids": [5, 0, 2**31 - 1], "text": text}))
    assert result.input_ids is not None
    assert result.input_ids.dtype == np.int32
    assert result.input_ids.tolist() == [5, 0, 2**31 - 1]
    assert result.text == (text or None)
    assert result.metadata == {}


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint16(), pa.int8()], ids=str)
@pytest.mark.parametrize(
    "make", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)], ids=["list", "large", "fixed"]
)
def test_parquet_token_ids_of_any_integer_type(
    tmp_path: Path, kind: pa.DataType, make: Callable[[pa.DataType], pa.DataType]
) -> None:
    column = pa.array([[1, 2, 3], [4, 5, 6]], type=make(kind))
    pq.write_table(pa.table({"input_ids": column}), tmp_path / "x.parquet")
    assert [document(row).input_ids.tolist() for row in read(tmp_path)] == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "input_ids is empty"),
        ("1 2", "input_ids is not a list"),
        ([1, "2"], "input_ids holds something other than integers"),
        ([1, True], "input_ids holds something other than integers"),
        ([1, 2.0], "input_ids holds something other than integers"),
        ([1, None], "input_ids holds something other than integers"),
        ([1, -1], "input_ids holds an integer below 0 or above 2147483647"),
        ([1, 2**31], "input_ids holds an integer below 0 or above 2147483647"),
        ([1, 2**80], "input_ids holds an integer below 0 or above 2147483647"),
    ],
    ids=["empty", "string", "string inside", "bool", "float", "null", "negative", "beyond int32", "beyond int64"],
)
def test_wrong_token_ids_make_a_bad_row(tmp_path: Path, ids: object, reason: str) -> None:
    assert bad([read_row(tmp_path, {"input_ids": ids, "text": "t"})]) == [(0, reason)]


def test_wrong_token_ids_in_parquet_make_bad_rows(tmp_path: Path) -> None:
    column = pa.array([[1], [], [2, None], [-1], None], type=pa.list_(pa.int64()))
    pq.write_table(pa.table({"input_ids": column}), tmp_path / "x.parquet")
    assert [row for row, _ in bad(read(tmp_path))] == [1, 2, 3, 4]
    pq.write_table(pa.table({"input_ids": [[0.5]], "text": ["t"]}), tmp_path / "x.parquet")
    assert bad(read(tmp_path)) == [(0, "input_ids holds something other than integers")]


# --- bad rows ---

BAD_LINES = {
    "half an object": (b'{"text": "a"', "broken JSON"),
    "a raw tab within a string": (b'{"text": "a\tb"}', "broken JSON"),
    "an integer of 5000 digits": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "broken JSON"),
    "objects nested 100,000 deep": (b"[" * 100_000, "JSON nested too deeply"),
    "a list": (b'["text"]', "not a JSON object"),
    "a number": (b"1", "not a JSON object"),
    "Latin-1": (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    "an encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-be"), "broken JSON"),
    "no text": (b'{"body": "a"}', "missing text key 'text'"),
    "null text": (b'{"text": null}', "text is null"),
    "a number as text": (b'{"text": 5}', "text is not a string"),
    "empty text": (b'{"text": ""}', "text is empty"),
    "white space only": (b'{"text": " \\n\\u00a0"}', "text is empty"),
    "a lone surrogate": (b'{"text": "a\\ud800b"}', "text holds a lone surrogate"),
    "NUL": (b'{"text": "a\\u0000b"}', "text holds a NUL character"),
    "an id that is a list": (b'{"text": "a", "id": [1]}', "id is neither a string nor an integer"),
    "an id that is a bool": (b'{"text": "a", "id": true}', "id is neither a string nor an integer"),
    "a surrogate in the id": (b'{"text": "a", "id": "\\udfff"}', "id holds a lone surrogate"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("ending", PACK)
def test_a_bad_line_has_its_reason_and_takes_nothing_with_it(tmp_path: Path, case: str, ending: str) -> None:
    line, reason = BAD_LINES[case]
    data = lines({"text": "before"}) + line + b"\n" + lines({"text": "after"})
    rows = read_bytes(tmp_path, PACK[ending](data), ending)
    assert texts(rows) == ["before", "after"]
    assert bad(rows) == [(1, reason)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing group key 'topic'"),
        ({"topic": None}, "missing group key 'topic'"),
        ({"topic": ["a"]}, "group is neither a string nor an integer"),
        ({"topic": "\ud800"}, "group holds a lone surrogate"),
    ],
    ids=["absent", "null", "list", "surrogate"],
)
def test_a_row_without_the_group_asked_for_is_bad(tmp_path: Path, row: dict[str, object], reason: str) -> None:
    assert bad([read_row(tmp_path, {"text": "t", **row}, group_by="topic")]) == [(0, reason)]


def test_an_excerpt_is_short_printable_ascii(tmp_path: Path) -> None:
    [row] = read_bytes(tmp_path, b'{"text": 1, "a": "\xc3\xa9\xff\x1b[31m' + b"x" * 5000 + b'"}')
    assert isinstance(row, BadRow)
    assert row.excerpt.startswith('{"text": 1, "a": "\\xe9\\udcff\\x1b[31mxxx')
    assert row.excerpt.isascii()
    assert row.excerpt.isprintable()
    assert len(row.excerpt) < 300


def test_a_line_over_the_limit_is_skipped_without_being_held(tmp_path: Path) -> None:
    data = lines({"text": "a" * 80}) + b"y" * 3_000_000 + b"\n" + lines({"text": "b"}) + b"z" * 101
    rows = read_bytes(tmp_path, data, max_document_bytes=100)
    assert texts(rows) == ["a" * 80, "b"]
    assert bad(rows) == [(row, "longer than 100 bytes") for row in (1, 3)]
    assert rows[1].excerpt == "y" * 200


def test_parquet_rows_are_checked_one_by_one(tmp_path: Path) -> None:
    values = pa.array([b"good", b"caf\xe9", None, b"", b"also good"], type=pa.binary())
    text = pa.Array.from_buffers(pa.string(), 5, values.buffers())  # strings that are not UTF-8
    pq.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    rows = read(tmp_path)
    assert texts(rows) == ["good", "also good"]
    assert bad(rows) == [(1, "invalid UTF-8"), (2, "text is null"), (3, "text is empty")]


def test_a_parquet_file_without_the_column_gives_a_bad_row_for_each_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"] * 1000}), tmp_path / "x.parquet", row_group_size=300)
    rows = read(tmp_path)
    assert bad(rows) == [(row, "missing text key 'text'") for row in range(1000)]
    assert rows[0].excerpt == "columns: body"


def test_a_parquet_column_of_another_type_gives_bad_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "x.parquet")
    assert bad(read(tmp_path)) == [(0, "text is not a string"), (1, "text is not a string")]


def test_dotted_keys_reach_into_parquet_structs(tmp_path: Path) -> None:
    pq.write_table(pa.table({"data": [{"body": "t"}, None]}), tmp_path / "x.parquet")
    rows = read(tmp_path, text_key="data.body")
    assert texts(rows) == ["t"]
    assert bad(rows) == [(1, "missing text key 'data.body'")]


# --- damaged files ---


@pytest.mark.parametrize(("ending", "kind"), [("jsonl.gz", "gzip"), ("jsonl.zst", "zstd")])
def test_what_precedes_the_end_of_a_truncated_stream_survives(tmp_path: Path, ending: str, kind: str) -> None:
    chance = np.random.default_rng(0)
    words = [" ".join(map(str, chance.integers(0, 10**9, 200))) for _ in range(400)]
    packed = PACK[ending](lines(*({"text": text} for text in words)))
    rows = read_bytes(tmp_path, packed[: len(packed) // 2], ending)
    survived = texts(rows)
    assert len(survived) > 100
    assert survived == words[: len(survived)]
    assert bad(rows) == [(len(survived), f"truncated {kind} stream")]


@pytest.mark.parametrize(("ending", "kind"), [("jsonl.gz", "gzip"), ("jsonl.zst", "zstd")])
def test_what_precedes_a_corrupt_stream_survives(tmp_path: Path, ending: str, kind: str) -> None:
    packed = PACK[ending](lines({"text": "a"})) + PACK[ending](lines({"text": "b"})) + b"garbage"
    filler = PACK[ending](b"\n" * 100) * 200  # damage is found within 4 KiB
    rows = read_bytes(tmp_path, packed[: -len(b"garbage")] + filler + b"garbage", ending)
    assert texts(rows) == ["a", "b"]
    assert [reason for _, reason in bad(rows)] == [f"corrupt {kind} stream"]
    assert rows[-1].row is not None


def test_a_file_that_is_not_what_its_ending_says_is_one_bad_row(tmp_path: Path) -> None:
    for ending in ("jsonl.gz", "jsonl.zst", "parquet", "arrow"):
        rows = read_bytes(tmp_path, b'{"text": "plain"}\n' * 10, ending)
        assert len(rows) == 1
        assert isinstance(rows[0], BadRow)
        (tmp_path / f"x.{ending}").unlink()


@pytest.mark.parametrize(("ending", "kind"), [("jsonl.gz", "gzip"), ("jsonl.zst", "zstd")])
def test_a_file_of_zero_bytes_as_a_crash_leaves_it_is_one_bad_row(tmp_path: Path, ending: str, kind: str) -> None:
    assert bad(read_bytes(tmp_path, b"\0" * 10_000, ending)) == [(0, f"corrupt {kind} stream")]


def test_a_truncated_parquet_file_is_one_bad_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        assert bad(read_bytes(tmp_path, whole[:size], "parquet")) == [(None, "unreadable parquet file")]


def test_the_other_row_groups_of_a_corrupt_parquet_file_survive(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"text": [f"text {i}" for i in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    rows = read_bytes(tmp_path, bytes(data), "parquet")
    assert texts(rows) == [f"text {i}" for i in (*range(10), *range(20, 30))]
    assert bad(rows) == [(10, "corrupt parquet row group")]
    assert "rows 10 to 19 are lost" in rows[10].excerpt


def test_what_precedes_the_end_of_a_truncated_arrow_file_survives(tmp_path: Path) -> None:
    Dataset.from_dict({"text": [f"text {i}" * 50 for i in range(2500)]}).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    rows = read(tmp_path / "saved")
    assert texts(rows) == [f"text {i}" * 50 for i in range(2000)]
    assert bad(rows) == [(2000, "corrupt arrow stream")]


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines({"text": "a"}))
    [source] = find_sources([str(path)])
    path.unlink()
    with pytest.raises(InputError, match=r"x\.jsonl"):
        list(read_documents(source, ReadOptions()))


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "parquet", "arrow"])
def test_a_storage_that_fails_is_an_error_not_a_bad_row(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileOpener

    path = tmp_path / f"x.{ending}"
    pq.write_table(pa.table({"text": ["a"]}), path)
    [source] = find_sources([str(path)])

    def fail(self: LocalFileOpener, size: int = -1) -> bytes:
        raise OSError("connection reset")

    monkeypatch.setattr(LocalFileOpener, "read", fail, raising=False)
    with pytest.raises(InputError, match="connection reset"):
        list(read_documents(source, ReadOptions()))


def test_rows_of_more_token_ids_than_the_limit_are_bad(tmp_path: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1] * 5, [1] * 6]}), tmp_path / "x.parquet")
    assert bad(read(tmp_path, max_ids=5)) == [(1, "more than 5 token ids")]
    assert bad([read_row(tmp_path, {"input_ids": [1] * 6}, max_ids=5)]) == [(0, "more than 5 token ids")]


# --- fuzzing ---

fuzzed_lines = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(max_size=10)),
        st.builds(
            lambda row: json.dumps(row).encode(),
            st.dictionaries(
                st.sampled_from(["text", "id", "input_ids"]),
                st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=3)),
            ),
        ),
    ).map(lambda line: line.replace(b"\n", b" ")),
    max_size=12,
)


@given(fuzzed_lines, st.sampled_from(list(PACK)))
@settings(max_examples=150, deadline=None)
def test_every_line_is_a_document_a_bad_row_or_blank(
    tmp_path_factory: pytest.TempPathFactory, given_lines: list[bytes], ending: str
) -> None:
    rows = read_bytes(tmp_path_factory.mktemp("fuzz"), PACK[ending](b"\n".join(given_lines)), ending)
    blank = [row for row, line in enumerate(given_lines) if not line or line.isspace()]
    if given_lines and given_lines[0] == b"\xef\xbb\xbf":
        blank.append(0)
    assert sorted([row.row for row in rows if row.row is not None] + blank) == list(range(len(given_lines)))
    for row in rows:
        if isinstance(row, Document):
            json.dumps(row.metadata, allow_nan=False)
            (row.doc_id + row.group + (row.text or "")).encode()


@given(st.data(), st.sampled_from(["jsonl.gz", "jsonl.zst"]))
@settings(max_examples=150, deadline=None)
def test_no_damage_to_a_compressed_file_is_silent(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ending: str
) -> None:
    whole = lines(*({"text": f"text {i}"} for i in range(30)))
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    packed = bytearray(gzip.compress(whole, mtime=0) if ending.endswith("gz") else checked(whole))
    cut = data.draw(st.integers(0, len(packed)))
    del packed[cut:]
    if packed and data.draw(st.booleans()):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    rows = read_bytes(tmp_path_factory.mktemp("fuzz"), bytes(packed), ending)
    try:
        same = bytes(packed) == b"" or unpack(bytes(packed), ending) == whole
    except (zlib.error, zstandard.ZstdError, EOFError, OSError):
        same = False
    assert same or any(isinstance(row, BadRow) for row in rows)


def unpack(packed: bytes, ending: str) -> bytes:
    return gzip.decompress(packed) if ending.endswith("gz") else zstandard.decompress(packed)
