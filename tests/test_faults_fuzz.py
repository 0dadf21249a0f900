"""Any bytes, in a file of any format: every row is a document or a bad row, and nothing else happens.

A valid file is cut, and bytes of it are changed, taken out or put in; or the file is any bytes at all.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longsift.documents import BadRow, Document, ReadOptions, find_sources, read_documents

FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"]
ROWS = [
    {
        "text": f"text {i} \u00e9\U0001f600 " + "word " * (i % 7),
        "id": f"d{i}",
        "source": "web",
        "n": i,
        "input_ids": [i],
    }
    for i in range(40)
]
LIMIT = 4096  # bytes of a row
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl.gz": lambda data: gzip.compress(data, mtime=0),
    "jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def valid(ending: str) -> bytes:
    if ending == "jsonl":
        return LINES
    if ending in PACK:
        return PACK[ending](LINES[:999]) + PACK[ending](LINES[999:])
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    if ending == "parquet":
        pq.write_table(table, sink, row_group_size=15, compression="zstd", write_page_checksum=True)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=15)
    return sink.getvalue()


VALID = {ending: valid(ending) for ending in FORMATS}


@st.composite
def damaged(draw: st.DrawFn, ending: str) -> bytes:
    data = bytearray(VALID[ending])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["change", "insert", "remove", "cut"])):
            case "change":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case "remove":
                del data[at : at + draw(st.integers(1, 30))]
            case "cut":
                del data[at:]
    return bytes(data)


def read(folder: Path, data: bytes, ending: str) -> list[Document | BadRow]:
    path = folder / f"x.{ending}"
    path.write_bytes(data)
    [source] = find_sources([str(path)])
    counted: list[int] = []
    rows = list(read_documents(source, ReadOptions(max_document_bytes=LIMIT), counted.append))
    if ending.startswith("jsonl") and not any("corrupt" in row.reason for row in rows if isinstance(row, BadRow)):
        assert sum(counted) == len(data)
    for row in rows:
        if isinstance(row, Document):
            json.dumps(row.metadata, allow_nan=False)
            (row.doc_id + row.group + (row.text or "")).encode()
            assert row.text or (row.input_ids is not None and len(row.input_ids))
        else:
            assert row.reason
            assert row.excerpt.isascii()
    return rows


def decoded(data: bytes, ending: str) -> bytes:
    """What a compressed file holds, up to where it is damaged, byte by byte."""
    if ending == "jsonl":
        return data
    content = io.BytesIO()
    try:
        if ending == "jsonl.gz":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                while piece := file.read(1):
                    content.write(piece)
        else:
            decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            stream = decoder.decompressobj()
            for byte in data:
                stream = decoder.decompressobj() if stream.eof else stream
                content.write(stream.decompress(bytes([byte])))
    except (zlib.error, zstandard.ZstdError, OSError, EOFError):
        pass
    return content.getvalue()


def check_lines(folder: Path, data: bytes, ending: str) -> None:
    rows = read(folder, data, ending)
    numbers = [row.row for row in rows]
    damage = [row for row in rows if isinstance(row, BadRow) and re.match("corrupt|truncated", row.reason)]
    assert numbers == sorted(set(numbers))  # each row once, in order
    assert damage in ([], rows[-1:])
    lines = decoded(data, ending).split(b"\n")
    if not damage:
        blank = {i for i, line in enumerate(lines) if not line.removeprefix(b"\xef\xbb\xbf" * (i == 0)).strip()}
        assert {*numbers, *blank} == set(range(len(lines)))
    for row in rows:
        if isinstance(row, Document):  # it is what stands in its line, and that line is whole
            assert (row.text or "") == (json.loads(lines[row.row].removeprefix(b"\xef\xbb\xbf")).get("text") or "")


def check_table(folder: Path, data: bytes, ending: str) -> None:
    rows = read(folder, data, ending)
    if [row.row for row in rows] == [None]:
        return
    accounted: list[int] = []
    for row in rows:
        assert row.row is not None
        lost = re.match(r"rows (\d+) to (\d+) are lost", row.excerpt) if isinstance(row, BadRow) else None
        accounted += range(int(lost[1]), int(lost[2]) + 1) if lost else [row.row]
    assert accounted == list(range(len(accounted)))
    if ending == "parquet":
        metadata = pq.read_metadata(io.BytesIO(data))
        assert len(accounted) == sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def check(folder: Path, data: bytes, ending: str) -> None:
    (check_lines if ending.startswith("jsonl") else check_table)(folder, data, ending)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_whole_file_gives_all_its_rows(tmp_path: Path, ending: str) -> None:
    rows = read(tmp_path, VALID[ending], ending)
    assert [(row.doc_id, row.text) for row in rows if isinstance(row, Document)] == [(r["id"], r["text"]) for r in ROWS]
    check(tmp_path, VALID[ending], ending)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_row_of_a_damaged_file_is_a_document_or_a_bad_row(tmp_path: Path, ending: str) -> None:
    @quick
    @given(damaged(ending))
    def run(data: bytes) -> None:
        check(tmp_path, data, ending)

    run()


@pytest.mark.parametrize("ending", FORMATS)
def test_any_bytes_are_rows_or_a_bad_file(tmp_path: Path, ending: str) -> None:
    heads = [b"", b"PAR1", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"\xff\xff\xff\xff", b'{"text": "', b"\xef\xbb\xbf"]
    pieces = st.one_of(st.binary(max_size=200), st.sampled_from([b"\n", b'{"text":"a"}\n', b"\0" * 50, b"[" * 3000]))

    @quick
    @given(st.sampled_from(heads), st.lists(pieces, max_size=6))
    def run(head: bytes, rest: list[bytes]) -> None:
        check(tmp_path, head + b"".join(rest), ending)

    run()


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst"])
def test_wherever_a_compressed_file_is_cut_off_what_is_left_of_it_is_read_and_the_rest_is_told_of(
    tmp_path: Path, ending: str
) -> None:
    texts = [row["text"] for row in ROWS]
    between = len(PACK[ending](LINES[:999]))  # the end of the first of its two streams
    for cut in range(len(VALID[ending])):
        rows = read(tmp_path, VALID[ending][:cut], ending)
        survived = [row.text for row in rows if isinstance(row, Document)]
        assert survived == texts[: len(survived)]
        assert cut == 0 or isinstance(rows[-1], BadRow)
        if cut not in (0, between):
            assert rows[-1].reason == f"truncated {ending[6:].replace('zst', 'zstd').replace('gz', 'gzip')} stream"
