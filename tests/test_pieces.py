"""The pieces of a file: together they give each row of it once, under its own number."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longsift.documents import BadRow, Document, ReadOptions, count_lines, find_sources, read_documents, read_piece
from longsift.errors import InputError
from longsift.sources import Source, listed_sources

OPTIONS = ReadOptions(max_document_bytes=60)

line = st.one_of(
    st.just(b""),
    st.just(b"\xff"),
    st.text(max_size=8).map(lambda text: json.dumps({"text": text}).encode()),
    st.integers(0, 90).map(lambda size: b"x" * size),
)
content = st.builds(
    lambda lines, end: b"\n".join(lines) + end, st.lists(line, max_size=12), st.sampled_from([b"", b"\n"])
)


def source_of(path: Path) -> Source:
    [source] = find_sources([str(path)])
    return source


def in_pieces(source: Source, most: int) -> list[Document | BadRow]:
    """The rows of all pieces, each read alone, from the row on that the lines before it are counted to."""
    rows: list[Document | BadRow] = []
    first = 0

    def read(piece):
        nonlocal first
        end = yield from read_piece(piece, first, OPTIONS)
        if source.format == "jsonl":
            assert piece.stop == source.size or end == first + count_lines(piece)
            first = end

    for piece in source.pieces(most):
        rows += read(piece)
    return rows


@given(content=content, most=st.integers(1, 80))
def test_pieces_of_lines_give_every_row_once(tmp_path_factory, content, most):
    path = tmp_path_factory.mktemp("pieces") / "rows.jsonl"
    path.write_bytes(content)
    source = source_of(path)
    assert in_pieces(source, most) == list(read_documents(source, OPTIONS))


def parquet(path: Path, rows: int, group: int) -> Source:
    table = pa.table({"text": [None if row % 7 == 3 else f"text {row}" for row in range(rows)]})
    pq.write_table(table, path, row_group_size=group)
    return source_of(path)


@pytest.mark.parametrize("most", [1, 100, 400, 1 << 20])
@pytest.mark.parametrize(("rows", "group"), [(0, 10), (1, 10), (95, 10), (95, 95), (40, 1)])
def test_pieces_of_row_groups_give_every_row_once(tmp_path, rows, group, most):
    source = parquet(tmp_path / "rows.parquet", rows, group)
    assert in_pieces(source, most) == list(read_documents(source, OPTIONS))


def test_row_groups_are_dealt_out_evenly(tmp_path):
    source = parquet(tmp_path / "rows.parquet", rows=80, group=10)
    sizes = [len(list(read_piece(piece, 0, OPTIONS))) for piece in source.pieces(-(-source.size // 4))]
    assert sizes == [20, 20, 20, 20]


def test_a_broken_parquet_file_is_told_of_once(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    assert [row.reason for row in in_pieces(source_of(path), 10)] == ["unreadable parquet file"]


def test_a_parquet_file_without_text_gives_every_row_once(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a"] * 9}), path, row_group_size=2)
    rows = in_pieces(source_of(path), 50)
    assert [(row.row, row.reason) for row in rows] == [(row, "missing text key 'text'") for row in range(9)]


def test_a_compressed_file_is_one_piece(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100))
    [piece] = source_of(path).pieces(1)
    assert piece.whole


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 1000])
def test_pieces_are_of_one_size_and_cover_the_file(size):
    pieces = Source("/corpus/a.jsonl", "a", "jsonl", size).pieces(100)
    assert [piece.start for piece in pieces] + [size] == [0] + [piece.stop for piece in pieces]
    assert max(piece.size for piece in pieces) - min(piece.size for piece in pieces) <= 1
    assert len(pieces) == max(1, -(-size // 100))


@pytest.mark.parametrize("grown", [b'{"text": "b"}\n', b""], ids=["longer", "same size, written later"])
def test_a_piece_of_a_file_that_changed_is_not_read(tmp_path, grown):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10)
    *_, last = source_of(path).pieces(50)
    path.write_bytes(b'{"text": "b"}\n' * 10 + grown)
    os.utime(path, (1, 1))
    for read in (lambda: list(read_piece(last, 0, OPTIONS)), lambda: count_lines(last)):
        with pytest.raises(InputError, match=r"rows\.jsonl changed"):
            read()


def test_sources_are_the_same_from_their_list(tmp_path):
    for name in ("a/1.jsonl", "a/2.parquet", "b/1.jsonl.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    sources = find_sources([str(tmp_path)])
    assert listed_sources([(source.url, source.size, source.version) for source in sources]) == sources
