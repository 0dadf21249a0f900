"""Large inputs take bounded memory: the peak of a process of its own, of all that it holds."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from conftest import library_text
from test_pipeline import table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc"),
]
MOST = 1500  # MB, of a process with the embedded calculator
GIGABYTE = 1 << 30


def peak_of(code: str, *arguments: object) -> int:
    """Run Python code in a process of its own; returns the most memory that it had, in MB."""
    # Not ru_maxrss, which begins with what the process had that started this one.
    tell = "print('peak', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    command = [sys.executable, "-c", f"{code}\n{tell}", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return int(process.stdout.rpartition("peak ")[2]) >> 10


def peak_of_command(*arguments: object) -> int:
    code = "import sys; from longsift.cli import app; app(sys.argv[1:], standalone_mode=False)"
    return peak_of(code, *arguments)


def row(text: str) -> bytes:
    return json.dumps({"id": "after", "text": text}).encode() + b"\n"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst"])
def test_a_line_of_a_gigabyte_is_set_aside_and_the_next_is_scored(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    begin, end, after = b'{"text": "', b'"}\n', row(library_text("argparse.py")[:60_000])
    if ending == "jsonl":
        with path.open("wb") as file:
            file.write(begin)
            file.seek(GIGABYTE)  # a hole, which takes no room on the disk
            file.write(end + after)
    else:
        with zstandard.open(path, "wb") as file:
            file.write(begin)
            for _ in range(1024):
                file.write(b"far away " * (GIGABYTE // 1024 // 9))
            file.write(end + after)
    out = tmp_path / "out"
    peak = peak_of_command("run", path, "-o", out, "--window", 4096, "--max-bad", 1, "--keep", 1, "-q")
    print(f"{ending}: {peak} MB")
    assert peak <= MOST
    assert [(r["row"], r["reason"]) for r in table(out / "quarantine").to_pylist()] == [
        (0, "longer than 33,554,432 bytes")
    ]
    assert set(table(out / "scores")["doc_id"].to_pylist()) == {"after"}
    assert set(table(out / "scores")["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize("mark", ["", "\U0001f600"], ids=["ASCII", "one emoji"])
def test_the_longest_document_that_is_not_set_aside_is_cut_in_bounded_memory(tmp_path: Path, mark: str) -> None:
    text = library_text("argparse.py") + mark
    path = tmp_path / "rows.jsonl"
    path.write_bytes(row(text * (31 * (1 << 20) // len(json.dumps(text)))))
    peak = peak_of_command("windows", path, "-o", tmp_path / "out", "--window", 4096, "-q")
    print(f"{path.stat().st_size:,} bytes: {peak} MB")
    assert peak <= MOST
    assert len(table(tmp_path / "out" / "windows")) > 1000


def test_the_longest_document_without_a_space_or_a_line_break_is_cut_in_bounded_memory(tmp_path: Path) -> None:
    signs = [chr(sign) for sign in range(0x4E00, 0x9FA5)]
    random.Random(0).shuffle(signs)
    path = tmp_path / "rows.jsonl"
    text = "".join(signs) * (31 * (1 << 20) // (3 * len(signs)))
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", "utf-8")
    peak = peak_of_command("windows", path, "-o", tmp_path / "out", "--window", 4096, "-q")
    print(f"{len(text):,} Chinese characters: {peak} MB")
    assert peak <= MOST
    assert len(table(tmp_path / "out" / "windows")) > 1000


@pytest.mark.parametrize("name", ["English", "Chinese"])
def test_the_longest_document_is_tokenised_in_bounded_memory_with_every_start_marked(tmp_path: Path, name: str) -> None:
    english = library_text("pydoc_data/topics.py")
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([english], trainers.BpeTrainer(vocab_size=8000, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    for token in ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]:
        model["vocab"].setdefault(token, len(model["vocab"]))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])  # as Llama 2's
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    unit = english if name == "English" else "".join(map(chr, range(0x4E00, 0x9FA5)))
    path = tmp_path / "text"
    path.write_text(unit * (31 * (1 << 20) // len(unit.encode())), "utf-8")
    code = """
import sys
from tokenizers import Tokenizer
from longsift.documents import Document
from longsift.windows import WindowTokenizer, cut_windows
document = Document("d", open(sys.argv[2], encoding="utf-8", newline="").read(), None, "web", {}, "x.jsonl", 0)
windows = cut_windows([document], WindowTokenizer(Tokenizer.from_file(sys.argv[1])), 4096)
assert sum(window.text in document.text for window in windows) > 1000
"""
    peak = peak_of(code, tmp_path / "tokenizer.json", path)
    print(f"{name}, {path.stat().st_size:,} bytes: {peak} MB")
    assert peak <= MOST


@pytest.mark.parametrize("codec", ["snappy", "none"])
def test_a_million_parquet_rows_are_all_read_in_bounded_memory(tmp_path: Path, codec: str) -> None:
    n = 1_000_000
    text = pa.array([f"{i} {'words of a row ' * 20}" for i in range(1000)] * (n // 1000))
    ids = pa.array(range(n))
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": text, "id": ids}), path, use_dictionary=False, compression=codec)
    code = """
import sys
from longsift.documents import Document, ReadOptions, find_sources, read_documents
[source] = find_sources(sys.argv[1:])
count = 0
for count, row in enumerate(read_documents(source, ReadOptions()), start=1):
    assert isinstance(row, Document) and row.doc_id == str(row.row) == str(count - 1)
assert count == 1_000_000
"""
    peak = peak_of(code, path)
    print(f"{path.stat().st_size:,} bytes: {peak} MB")
    assert peak <= 250


def write_at_once(table: pa.Table, path: Path, codec: str) -> None:
    """All rows in one row group, whose texts are one page, or in one record batch."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression=codec)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_value_of_a_gigabyte_is_set_aside_and_the_rows_beside_it_are_scored(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    short = library_text("argparse.py")[:60_000]
    texts = [short, "far away " * (GIGABYTE // 9), short]
    write_at_once(pa.table({"id": ["before", "long", "after"], "text": texts}), path, "zstd")
    out = tmp_path / "out"
    peak = peak_of_command("run", path, "-o", out, "--window", 4096, "--max-bad", 1, "--keep", 1, "-q")
    print(f"{ending}: {peak} MB")
    assert peak <= MOST
    assert [(r["row"], r["reason"]) for r in table(out / "quarantine").to_pylist()] == [
        (1, "longer than 33,554,432 bytes")
    ]
    assert set(table(out / "scores")["doc_id"].to_pylist()) == {"before", "after"}
    assert set(table(out / "scores")["status"].to_pylist()) == {"ok"}


@pytest.mark.parametrize(("ending", "codec"), [("parquet", "snappy"), ("arrow", "none")], ids=["Parquet", "Arrow"])
def test_a_thousand_books_in_one_page_or_batch_are_all_read_in_bounded_memory(
    tmp_path: Path, ending: str, codec: str
) -> None:
    path = tmp_path / f"rows.{ending}"
    text = library_text("argparse.py") + library_text("inspect.py")
    books = [(f"{number} {text[number:]}" * (1 + (1 << 20) // len(text)))[: 1 << 20] for number in range(1000)]
    write_at_once(pa.table({"text": books, "id": range(1000)}), path, codec)
    code = """
import sys
from longsift.documents import Document, ReadOptions, find_sources, read_documents
[source] = find_sources(sys.argv[1:])
count = 0
for count, row in enumerate(read_documents(source, ReadOptions()), start=1):
    assert isinstance(row, Document) and row.doc_id == str(row.row) == str(count - 1), row
    assert row.text.startswith(f"{row.row} ") and len(row.text) == 1 << 20
assert count == 1000
"""
    peak = peak_of(code, path)
    print(f"{path.stat().st_size:,} bytes: {peak} MB")
    assert peak <= 250


def test_the_longest_row_of_token_ids_that_is_not_set_aside_is_scored_in_bounded_memory(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [{"input_ids": [chance.randrange(5, 250) for _ in range(length)]} for length in (1 << 16, (1 << 16) + 1)]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    peak = peak_of_command("run", tmp_path / "rows.jsonl", "-o", tmp_path / "out", "--keep", 1, "--max-bad", 1, "-q")
    print(f"{1 << 16:,} ids: {peak} MB")
    assert peak <= MOST
    assert table(tmp_path / "out" / "scores")["status"].to_pylist() == ["ok"]
    assert table(tmp_path / "out" / "quarantine")["reason"].to_pylist() == ["more than 65,536 token ids"]
