"""Processes that cut: the same windows in the same order as without them, whatever the sources hold."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from engines.test_children import gone
from longsift.cli import app
from longsift.documents import BadRow, Document
from longsift.engines import cutters
from longsift.engines.cutters import Cutters
from longsift.errors import InputError, ProcessLost
from longsift.tables import parquet_files
from longsift.windows import TooShort, Window, WindowTokenizer, cut_windows

LENGTH = 40


@pytest.fixture(scope="module")
def tokenizer(model) -> WindowTokenizer:
    return WindowTokenizer.load(str(model))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cutters, "_CHARS", 500)
    monkeypatch.setattr(cutters, "_GIANT_CHARS", 5000)


def document(number: int, words: int) -> Document:
    text = " ".join(f"word{(number * 7 + i * i) % 91}" for i in range(words))
    return Document(f"d{number}", text, None, "all", {"n": number}, "file", number)


def given_ids(number: int) -> Document:
    return Document(f"d{number}", None, np.arange(5, dtype=np.int32), "all", {}, "file", number)


def bad(number: int) -> BadRow:
    return BadRow("file", number, "broken JSON", "{")


SOURCES = [
    [document(0, 30), bad(1), document(2, 300), given_ids(3), document(4, 1), document(5, 90)],
    [],
    [given_ids(0), bad(1)],
    [document(i, 40) for i in range(60)],
    [document(0, 2000), document(1, 50)],  # a giant
    [bad(0)],
]


def plain(row: Window | TooShort | BadRow) -> tuple[object, ...]:
    if isinstance(row, Window):
        return (row.window_id, row.start, row.input_ids.tolist(), row.text, row.metadata)
    return (row,)


@pytest.mark.parametrize("processes", [1, 3])
def test_every_source_gives_what_it_gives_without_processes(processes, tokenizer):
    with Cutters(processes, lambda: (tokenizer, LENGTH)) as crew:
        cut = [[plain(row) for row in rows] for rows in crew.cut_each(SOURCES)]
        assert len(crew._cutters) == processes
    assert len(cut) == len(SOURCES)
    for rows, source in zip(cut, SOURCES, strict=True):
        parts = ([row] for row in source)  # one by one, since rows of ids need no tokenizer
        assert rows == [plain(row) for part in parts for row in cut_windows(part, tokenizer, LENGTH)]


def test_no_process_is_started_for_ids():
    def load():
        raise AssertionError("no tokenizer is needed")

    with Cutters(2, load) as crew:
        assert [len(list(rows)) for rows in crew.cut_each([[given_ids(0), bad(1)], [given_ids(2)]])] == [2, 1]
        assert not crew._cutters


def test_reading_is_ahead_by_a_bounded_number_of_rows(tokenizer):
    read = 0

    def rows() -> Iterator[Document]:
        nonlocal read
        for read in range(1, 501):
            yield document(read, 100)  # one a batch

    with Cutters(2, lambda: (tokenizer, LENGTH)) as crew:
        source = next(crew.cut_each([rows()]))
        for taken, row in enumerate((row for row in source if row.index == 0), 1):  # type: ignore[union-attr]
            assert row.doc_id == f"d{taken}"
            assert read - taken <= 4 * 2 + 1
    assert read == 500


def test_an_error_of_a_source_comes_after_all_rows_before_it(tokenizer):
    def broken():
        yield document(0, 100)
        raise InputError("the storage failed")

    with Cutters(2, lambda: (tokenizer, LENGTH)) as crew:
        sources = crew.cut_each([[document(i, 100) for i in range(10)], broken()])
        assert len({row.doc_id for row in next(sources)}) == 10
        second = next(sources)
        assert next(second).doc_id == "d0"
        with pytest.raises(InputError, match="the storage failed"):
            list(second)


@pytest.fixture
def mortal(monkeypatch, tmp_path):
    """Have processes die at some documents, as `child_functions.cut` says; gives such a document."""
    monkeypatch.setattr(cutters, "_TARGET", "engines.child_functions:cut")

    def make(number: int, what: str) -> Document:
        text = f"{what} {document(number, 100).text}"
        return replace(document(number, 1), text=text, file=str(tmp_path / f"tries-{number}"))

    return make


def test_a_process_that_dies_costs_its_documents_one_more_try(mortal, tokenizer, caplog):
    rows = [mortal(i, "kill once") if i in (3, 20, 21) else document(i, 100) for i in range(60)]
    with Cutters(2, lambda: (tokenizer, LENGTH)) as crew:
        cut = [plain(row) for row in next(crew.cut_each([rows]))]
        pids = [cutter.child.pid for cutter in crew._cutters]
    assert cut == [plain(row) for row in cut_windows(rows, tokenizer, LENGTH)]
    assert [Path(rows[i].file).read_text() for i in (3, 20, 21)] == ["xx"] * 3
    assert f"killed by SIGKILL) at row 3 of {rows[3].file}" in caplog.text
    assert all(map(gone, pids))


def test_documents_that_end_two_processes_end_the_run(mortal, tokenizer):
    rows = [mortal(i, "kill") if i == 3 else document(i, 100) for i in range(60)]
    with Cutters(2, lambda: (tokenizer, LENGTH)) as crew:
        with pytest.raises(ProcessLost, match=rf"\(killed by SIGKILL\) at row 3 of {rows[3].file}"):
            list(next(crew.cut_each([rows])))
        pids = [cutter.child.pid for cutter in crew._cutters]
    assert Path(rows[3].file).read_text() == "xx"
    assert all(map(gone, pids))


def test_processes_that_die_when_they_have_nothing_to_do_are_not_missed(tokenizer):
    rows = [document(i, 100) for i in range(20)]

    def sources() -> Iterator[list[Document]]:
        yield rows[:1]
        for cutter in crew._cutters:
            if cutter.batches:
                assert cutter.child.connection.poll(60)  # it has sent what it had to
            os.kill(cutter.child.pid, signal.SIGKILL)
            assert gone(cutter.child.pid)
        yield rows[1:]

    with Cutters(2, lambda: (tokenizer, LENGTH)) as crew:
        cut = [plain(row) for some in crew.cut_each(sources()) for row in some]
    assert cut == [plain(row) for row in cut_windows(rows, tokenizer, LENGTH)]


@pytest.mark.parametrize("flags", [[], ["--limit", "7"], ["--sample", "9"]], ids=" ".join)
def test_any_number_of_processes_writes_the_same_windows(flags, corpus, model, tmp_path):
    def windows(name: str, *workers: str) -> dict[str, bytes]:
        command = ["windows", corpus, "-o", tmp_path / name, "--model", model, "--window", "256", *flags, *workers]
        run = CliRunner().invoke(app, [*map(str, command), "--shard-tokens", "2000", "--json", "-q"])
        assert run.exit_code == 0, run.output
        counts.append(json.loads(run.stdout))
        return {path.name: path.read_bytes() for path in parquet_files(Path(tmp_path / name / "windows"))}

    counts: list[dict[str, int]] = []
    assert windows("one") == windows("two", "--cut-workers", "2")
    assert counts[0] == counts[1]
