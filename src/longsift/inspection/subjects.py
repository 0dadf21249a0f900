"""What is looked at: one window of a file, of standard input or of a finished run, and the text of its spans."""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import numpy.typing as npt

from longsift.documents import BadRow, Document, ReadOptions, read_documents
from longsift.errors import InputError, OutputError, UsageError
from longsift.shards import RunFolder
from longsift.sources import FORMATS, find_sources
from longsift.tables import parquet_files
from longsift.windows import WindowTokenizer, window_starts

_CLOSEST = 3  # ids that an error names


@dataclass(frozen=True, slots=True)
class Subject:
    """One window and where it comes from.

    Attributes:
        name: what a reader calls it.
        input_ids: (n,) int32, special tokens included.
        text: the characters that it covers; None where it was given as token ids.
        cuts: (n,) where in `text` each token begins, ascending; None where that is not known.
        facts: what else is known of it, by name.
    """

    name: str
    input_ids: npt.NDArray[np.int32]
    text: str | None = None
    cuts: npt.NDArray[np.int64] | None = None
    facts: dict[str, str] = field(default_factory=dict)


def read_subject(
    source: str,
    tokenizer: WindowTokenizer | None,
    window: int,
    *,
    document: str | None = None,
    index: int = 0,
    text_key: str = "text",
    id_key: str = "id",
) -> Subject:
    """A window of a text or of one document of a file of documents.

    Args:
        source: a file of text, of documents (`longsift.sources.FORMATS`), or "-" for text on standard input.
        tokenizer: of the calculator; not needed for documents of ids.
        window: tokens of a window; a text of fewer is one window as it is, a longer one is cut by LongAttn's rule.
        document: id, or 0-based number among the documents of the file; by default the first.
        index: which window of a document of several.
        text_key, id_key: columns of a file of documents.

    Raises:
        InputError: the source cannot be read, or holds no such document.
        UsageError: an index beyond the last window; a document for a source that is a text.
    """
    found = _read(source, document, ReadOptions(text_key=text_key, id_key=id_key))
    facts = {"File": found.file}
    if found.input_ids is not None:
        if index:
            raise UsageError(f"--index {index}: {found.doc_id} is given as token ids, which are one window.")
        return Subject(found.doc_id, found.input_ids, found.text, facts=facts)
    if tokenizer is None:
        raise UsageError(f"The text of {source} needs a tokenizer: give a --model that has one.")
    text = found.text or ""
    encoded = tokenizer.encode([text])[0]
    if not len(encoded.ids):
        raise InputError(f"{source} holds no text.")
    room = window - len(tokenizer.prefix) - len(tokenizer.suffix)
    if room < 1:
        raise UsageError(f"A window of {window} tokens has no room for text: give a larger --window.")
    starts = [0] if len(encoded.ids) <= room else window_starts(len(encoded.ids), room)
    if index >= len(starts):
        raise UsageError(
            f"--index {index}: the last window of {window:,} tokens of {found.doc_id} is --index {len(starts) - 1}."
        )
    start = starts[index]
    end = min(start + room, len(encoded.ids))
    if len(starts) > 1:
        facts["Window"] = f"{index + 1} of {len(starts)}, from token {start:,} of {len(encoded.ids):,}"
    ids = np.concatenate([tokenizer.prefix, encoded.ids[start:end], tokenizer.suffix])
    first, last = int(encoded.offsets[start, 0]), int(encoded.offsets[end - 1, 1])
    cuts = _cuts(encoded.offsets[start:end, 0] - first, tokenizer, last - first)
    return Subject(found.doc_id, ids, text[first:last], cuts, facts)


def _read(source: str, document: str | None, options: ReadOptions) -> Document:
    if source != "-" and source.lower().endswith(tuple(FORMATS)):
        return _pick(source, document, options)
    if document is not None:
        raise UsageError(f"--document picks one of a file of documents (.jsonl, .parquet, …); {source} is one text.")
    try:
        if source == "-":
            content = sys.stdin.buffer.read()
        else:
            with fsspec.open(source, "rb") as file:
                content = file.read()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is no UTF-8 text ({error.reason} at byte {error.start:,}): convert it.") from error
    except IsADirectoryError as error:
        raise InputError(f"{source} is a folder: give a file in it, or WINDOW_ID --run {source}.") from error
    except FileNotFoundError as error:
        raise InputError(
            f"There is no file {source}. For a window of a finished run: longsift inspect WINDOW_ID --run OUT."
        ) from error
    except Exception as error:  # each file system has its own exceptions
        raise InputError(f"{source} cannot be read: {type(error).__name__}: {error}") from error
    name, file = ("standard input",) * 2 if source == "-" else (posixpath.basename(source), source)
    return Document(name, text, None, "all", {}, file, 0)


def _pick(source: str, wanted: str | None, options: ReadOptions) -> Document:
    number = int(wanted) if wanted is not None and wanted.isdecimal() else 0 if wanted is None else None
    numbered: Document | None = None
    count = 0
    bad: BadRow | None = None
    for row in _rows(source, options):
        if isinstance(row, BadRow):
            bad = bad or row
            continue
        if wanted is not None and row.doc_id == wanted:
            return row
        if count == number:
            if wanted is None:
                return row
            numbered = row
        count += 1
    if numbered is not None:
        return numbered
    damage = f" Its row {bad.row} cannot be read: {bad.reason}." if bad else ""
    if not count:
        raise InputError(f"{source} holds no document.{damage} --text-key names the column of the text.")
    raise InputError(f"{source} holds no document {wanted!r}; by number they are 0 to {count - 1:,}.{damage}")


def _rows(source: str, options: ReadOptions) -> Iterator[Document | BadRow]:
    for file in find_sources([source]):
        yield from read_documents(file, options)


def window_of_run(
    run: Path | str,
    window_id: str,
    tokenizer: WindowTokenizer | None,
    *,
    index: int = 0,
    place: tuple[str, int] | None = None,
) -> Subject:
    """A window of a finished run.

    Args:
        run: its folder.
        window_id: as in the windows table.
        tokenizer: of the calculator, for where the text's tokens begin; None where there is none.
        index: which of several windows of that id, which documents of the same id have.
        place: its shard and row, where they are known; then no other file is looked into.

    Raises:
        OutputError: the run has no finished windows, or none of that id.
        UsageError: several have it, and `index` is beyond them.
    """
    folder = RunFolder(run)
    folder.section("windows")
    folder.check_linked_windows()
    files = [str(path) for path in parquet_files(folder.windows)]
    with duckdb.connect() as database:
        if place is not None:
            files = [str(folder.windows / f"{place[0]}.parquet")]
        places = database.execute(
            """SELECT filename, file_row_number FROM read_parquet(?, filename = true, file_row_number = true)
               WHERE window_id = ? AND file_row_number = coalesce(?, file_row_number) ORDER BY ALL""",
            [files, window_id, None if place is None else place[1]],
        ).fetchall()
        if not places:
            closest = database.execute(
                """SELECT window_id FROM read_parquet(?)
                   ORDER BY jaro_winkler_similarity(window_id, ?) DESC, window_id LIMIT ?""",
                [files, window_id, _CLOSEST],
            ).fetchall()
            named = ", ".join(repr(name) for (name,) in closest)
            raise OutputError(f"{run} has no window {window_id!r}. The closest ids are {named}.")
        if index >= len(places):
            raise UsageError(f"--index {index}: {run} has {len(places)} windows {window_id!r}, 0 to {len(places) - 1}.")
        file, number = places[index]
        doc_id, group, part, start, ids, text = database.execute(
            """SELECT doc_id, "group", "index", start, input_ids, text FROM read_parquet(?, file_row_number = true)
               WHERE file_row_number = ?""",
            [file, number],
        ).fetchall()[0]
        scores = _scores(database, folder, Path(file).name, number, window_id)
    facts = {"Document": doc_id, "Group": group, "Window": f"{part + 1}, from token {start:,} of the document"}
    if len(places) > 1:
        facts["Same id"] = f"{index + 1} of {len(places)} windows; --index chooses"
    input_ids = np.asarray(ids, dtype=np.int32)
    cuts = None if text is None or tokenizer is None else _find_cuts(text, input_ids, tokenizer)
    return Subject(window_id, input_ids, text, cuts, facts | scores)


def _scores(
    database: duckdb.DuckDBPyConnection, folder: RunFolder, file: str, number: int, window_id: str
) -> dict[str, str]:
    """The numbers of the scores table of a window; none where it is not scored."""
    path = folder.scores / file
    if not path.exists():
        return {}
    found = database.execute(
        "SELECT * FROM read_parquet(?, file_row_number = true) WHERE file_row_number = ? AND window_id = ?",
        [str(path), number, window_id],
    )
    names = [column[0] for column in found.description or ()]
    for row in found.fetchall():
        values = dict(zip(names, row, strict=True))
        if values["status"] != "ok":
            return {"Score": f"failed: {values['reason']}"}
        return {name: f"{value:.4g}" for name, value in values.items() if isinstance(value, float)}
    return {}


def _find_cuts(text: str, ids: npt.NDArray[np.int32], tokenizer: WindowTokenizer) -> npt.NDArray[np.int64] | None:
    """Where the tokens of a run's window begin in its text, unless that alone gives other tokens than the document."""
    encoded = tokenizer.encode([text])[0]
    if not np.array_equal(np.concatenate([tokenizer.prefix, encoded.ids, tokenizer.suffix]), ids):
        return None
    return _cuts(encoded.offsets[:, 0], tokenizer, len(text))


def _cuts(starts: npt.NDArray[np.signedinteger[Any]], tokenizer: WindowTokenizer, end: int) -> npt.NDArray[np.int64]:
    """Where each token begins, special ones included; ascending, though two tokens may share a character."""
    cuts = np.concatenate([np.zeros_like(tokenizer.prefix), starts, np.full_like(tokenizer.suffix, end)])
    ascending: npt.NDArray[np.int64] = np.maximum.accumulate(cuts.astype(np.int64))
    return ascending


def passages(subject: Subject, starts: npt.NDArray[np.int64], tokenizer: WindowTokenizer | None) -> list[str]:
    """The text of each span, and before them what precedes the first, (1 + spans).

    They are slices of the document that join to the window's text, where it is known in which characters the tokens
    lie; else the tokens decoded, or, without a tokenizer, their ids.

    Args:
        starts: first token of each span.
    """
    edges = [0, *starts.tolist(), len(subject.input_ids)]
    if subject.text is not None and subject.cuts is not None:
        places = [*subject.cuts[edges[1:-1]].tolist(), len(subject.text)]
        return [subject.text[first:last] for first, last in pairwise([0, *places])]
    parts = [subject.input_ids[first:last].tolist() for first, last in pairwise(edges)]
    if tokenizer is not None:
        return [tokenizer.decode(ids) for ids in parts]
    return [" ".join(map(str, ids)) for ids in parts]
